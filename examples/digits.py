"""Handwritten digits: a small residual network on the 1,797 real 8×8 images that scikit-learn ships.

    slrc compile examples/digits.py --pattern channel --sparsity 0.5 --epochs 5 --out demo

The dense network is trained once, in seconds, and cached; `SLRC_CACHE` names the folder (default `~/.cache/slrc`).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc.machine.cache import cache_folder

CACHE = cache_folder()
DENSE_EPOCHS = 12


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h/stride, w/stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Images `(n, 1, 16, 16)` to ten logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width),
            Block(width, 2 * width, 2),
            Block(2 * width, 2 * width),
            Block(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, 1, 16, 16)` to `(n, 10)`."""
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,437 training and 360 test images, doubled in size to 16×16, values in [0, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train_dense(model: nn.Module, batches: DataLoader) -> None:
    """Train from scratch: SGD with a cosine schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DENSE_EPOCHS * len(batches))
    model.train()
    for _ in range(DENSE_EPOCHS):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()


def workload() -> slrc.Workload:
    """Return the workload that `slrc compile examples/digits.py` compiles."""
    train, test = data()
    batches = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model = slrc.cached_weights(DigitsNet(), CACHE / "digits.safetensors", lambda m: train_dense(m, batches))

    def evaluate(model: nn.Module) -> dict[str, float]:
        x, y = test.tensors
        device = next(model.parameters(), x).device
        return {"accuracy": (model(x.to(device)).argmax(1).cpu() == y).float().mean().item()}

    return slrc.Workload(
        model=model,
        example_inputs=(test.tensors[0][:1],),
        train_batches=batches,
        evaluate=evaluate,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
        name="digits",
    )
