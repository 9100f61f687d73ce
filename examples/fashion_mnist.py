"""Fashion-MNIST: a small residual network and a small MLP-Mixer on 28×28 images.

    export SLRC_DATA=~/data
    slrc compile examples/fashion_mnist.py --pattern block:8x1 --sparsity 0.75 --epochs 6 --out build/fashion
    slrc compile examples/fashion_mnist.py:mixer --pattern columns:2 --sparsity 0.5 --epochs 6 --out build/mixer

`SLRC_DATA` names a folder that holds `fashion_mnist/`, or torchvision's `FashionMNIST/raw/`, with the original four idx
files, gzipped or not. Dense networks are trained once and cached. Also read from the environment:

- `SLRC_CACHE`: where dense networks are kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; 10 unless given.
- `SLRC_SUBSET`: take only so many training images, with a dense network of their own.
"""

import gzip
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder

FOLDERS = ("fashion_mnist", "FashionMNIST/raw")
MEAN, STD = 0.286 * 255, 0.353 * 255
EPOCHS, LR = 10, 0.05


class Block(nn.Module):
    """Two 3×3 convolutions; where the shape changes, the shortcut is a 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h/stride, w/stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem that halves the image and three residual blocks of 16, 32 and 64 channels: 78,000 parameters.

    `width` is in place of 16.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 1, 28, 28)` to `(n, 10)`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.blocks(x).mean(dim=(2, 3)))


class Mixing(nn.Module):
    """One layer of an MLP-Mixer: an MLP over patches, then one over channels, both residual."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, patches, width)` to the same."""
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """16 patches of 7×7 pixels, 64 channels, three layers (Tolstikhin et al., arXiv 2105.01601): 58,000 parameters."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, 7)
        self.layers = nn.Sequential(*(Mixing(16, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 1, 28, 28)` to `(n, 10)`."""
        x = self.layers(self.embed(x).flatten(2).transpose(1, 2))
        return self.linear(self.norm(x).mean(dim=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": ResNet, "mixer": Mixer}


class Batches:
    """Shuffled batches `(x, y)`, `(n, 1, 28, 28)` and `(n,)`, moved by up to 2 pixels; images are mirrored at random.

    What an epoch holds is drawn from torch's global generator as it starts. The last images, too few for a batch,
    are left out.

    Args:
        pixels: uint8 `(images, 28, 28)`.
        labels: int64 `(images,)`.
        batch_size: images in a batch.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, batch_size: int = 64) -> None:
        self.pixels, self.labels, self.batch_size = pixels, labels, batch_size

    def __len__(self) -> int:
        return max(1, len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = order[start : start + self.batch_size]
            shift = torch.randint(-2, 3, (2,)).tolist()
            x = normalize(self.pixels[part]).roll(shift, (2, 3))  # borders are black
            mirrored = torch.rand(len(part), 1, 1, 1) < 0.5
            yield torch.where(mirrored, x.flip(3), x), self.labels[part]


def normalize(pixels: Tensor) -> Tensor:
    """Turn uint8 `(n, 28, 28)` into float32 `(n, 1, 28, 28)`."""
    return ((pixels.float() - MEAN) / STD).unsqueeze(1)


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Return the images of `train` or `test`: uint8 pixels `(n, 28, 28)` and int64 labels `(n,)`.

    Raises:
        WorkloadError: there are none.
    """
    stem = "train" if split == "train" else "t10k"
    pixels = read_idx(f"{stem}-images-idx3-ubyte", header=16).reshape(-1, 28, 28)
    labels = read_idx(f"{stem}-labels-idx1-ubyte", header=8)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))


def read_idx(name: str, header: int) -> np.ndarray:
    """Return the bytes of an idx file after its header."""
    folder = os.environ.get("SLRC_DATA")
    for path in [Path(folder).expanduser() / f / name for f in FOLDERS] if folder else []:
        if path.exists():
            return np.frombuffer(path.read_bytes(), np.uint8, offset=header)
        if (zipped := path.with_name(f"{name}.gz")).exists():
            return np.frombuffer(gzip.decompress(zipped.read_bytes()), np.uint8, offset=header)
    raise WorkloadError(
        f"no Fashion-MNIST in `SLRC_DATA={folder}`: expected `{FOLDERS[0]}/{name}` there"
        if folder
        else "no Fashion-MNIST: `SLRC_DATA` is not set",
        hint="run `torchvision.datasets.FashionMNIST('DATA', download=True)`; then set SLRC_DATA to that folder",
    )


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share of images that a model in evaluation mode gets right, on the device that it is on."""
    device = next(model.parameters(), pixels).device
    right = 0
    for x, y in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(normalize(x).to(device)).argmax(1).cpu() == y).sum())
    return right / len(labels)


def train_dense(model: nn.Module, batches: Batches, epochs: int) -> None:
    """Train in place with SGD and a cosine schedule."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    for epoch in range(epochs):
        total = 0.0
        for x, y in batches:
            loss = cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"dense: epoch {epoch + 1}/{epochs}, loss {total / len(batches):.3f}", file=sys.stderr, flush=True)
    model.to("cpu")


def make_workload(name: str) -> slrc.Workload:
    """Return the workload of a network in `NETWORKS`, its dense weights trained or taken from the cache."""
    pixels, labels = load_images("train")
    subset = min(int(os.environ.get("SLRC_SUBSET", len(labels))), len(labels))
    batches, test = Batches(pixels[:subset], labels[:subset]), load_images("test")
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", EPOCHS))
    cache = cache_folder()
    dense = cache / f"fashion-mnist-{subset}-{name}-{epochs}epochs.safetensors"
    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        model = slrc.cached_weights(NETWORKS[name](), dense, lambda m: train_dense(m, batches, epochs))
    return slrc.Workload(
        model=model,
        example_inputs=(normalize(test[0][:1]),),
        train_batches=batches,
        evaluate=lambda model: {"accuracy": accuracy(model, *test)},
        name=f"fashion-mnist-{name}",
    )


resnet = partial(make_workload, "resnet")
mixer = partial(make_workload, "mixer")


def workload() -> slrc.Workload:
    """Return the residual network's workload."""
    return make_workload("resnet")
