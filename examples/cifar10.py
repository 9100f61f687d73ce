"""CIFAR-10: ResNet-20, -56, -110, -18 and -50, VGG-16, MobileNetV2, a small Swin and a small MLP-Mixer.

    export SLRC_DATA=~/data
    slrc compile examples/cifar10.py --pattern columns:2 --sparsity 0.5 --epochs 10 --out build/resnet20
    slrc compile examples/cifar10.py:vgg16 --pattern channel --sparsity 0.75 --epochs 10 --out build/vgg16

`SLRC_DATA` names a folder with CIFAR-10 as torchvision unpacks it, or with `cifar10.npz`, a pack of JPEG
scans. The dense network is trained once and cached; it starts from
`$SLRC_DATA/weights/cifar10_NAME.safetensors` if there is one. Also read from the environment:

- `SLRC_MODEL`: the network that `workload()` takes; `resnet20` unless given.
- `SLRC_CACHE`: where decoded images and dense networks are kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; 4 from a weights file and 30 from scratch unless given.
- `SLRC_SUBSET`: take only so many training and test images, evenly spread, with a dense network of their own.
"""

import io
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torchvision import models

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder
from slrc.machine.processor import processor

ORIGINAL = "cifar-10-batches-py"
PACK = "cifar10.npz"
MEAN = torch.tensor([0.485, 0.456, 0.406]) * 255
STD = torch.tensor([0.229, 0.224, 0.225]) * 255
PADDING = 4
SCRATCH_EPOCHS, USUAL_LR = 30, 0.05
SCRATCH_LR = {"vgg16": 0.01}
"""Where it is not the usual one, at which VGG-16 learns nothing: its loss stays at ln 10."""
ADAPT_EPOCHS, ADAPT_LR = 4, 0.02


class Block(nn.Module):
    """Two 3×3 convolutions; the shortcut subsamples and pads with zero channels, without weights (option A).

    He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.margin = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h/stride, w/stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.margin, self.margin))
        return torch.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth `6 * blocks + 2`: three stages of `width`, twice and four times as many channels."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(Block(width, width, 1) for _ in range(blocks)))
        width *= 2
        self.layer2 = nn.Sequential(Block(width // 2, width, 2), *(Block(width, width, 1) for _ in range(blocks - 1)))
        width *= 2
        self.layer3 = nn.Sequential(Block(width // 2, width, 2), *(Block(width, width, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, 32, 32)` to `(n, 10)`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


class VGG16(nn.Module):
    """Thirteen 3×3 convolutions with batch norm and, as 32×32 images end at 1×1, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, 32, 32)` to `(n, 10)`."""
        return self.classifier(self.features(x).flatten(1))


class Mixing(nn.Module):
    """One layer of an MLP-Mixer: an MLP over patches, then one over channels, both residual."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, patches, width)` to the same."""
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """64 patches of 4×4 pixels, 128 channels, six layers (Tolstikhin et al., arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 128, 4, 4)
        self.layers = nn.Sequential(*(Mixing(64, 128) for _ in range(6)))
        self.norm = nn.LayerNorm(128)
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, 32, 32)` to `(n, 10)`."""
        x = self.layers(self.embed(x).flatten(2).transpose(1, 2))
        return self.linear(self.norm(x).mean(dim=1))


def make_swin() -> nn.Module:
    """Return torchvision's Swin transformer with patches of 2×2, windows of 4×4 and two stages of 64 and 128."""
    return models.SwinTransformer(
        patch_size=[2, 2], embed_dim=64, depths=[2, 4], num_heads=[2, 4], window_size=[4, 4], num_classes=10
    )


def make_resnet(make: Callable[..., models.ResNet]) -> nn.Module:
    """Return a ResNet of torchvision's with a 3×3 stem and no pooling after it."""
    model = make(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def make_mobilenet_v2() -> nn.Module:
    """Return torchvision's MobileNetV2 with stride 1 in the stem and the second stage; it ends at 4×4."""
    stages = [
        # expansion, channels, blocks, stride
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model = models.MobileNetV2(num_classes=10, inverted_residual_setting=stages)
    model.features[0][0].stride = (1, 1)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: ResNet(3),
    "resnet56": lambda: ResNet(9),
    "resnet110": lambda: ResNet(18),
    "resnet18": lambda: make_resnet(models.resnet18),
    "resnet50": lambda: make_resnet(models.resnet50),
    "vgg16": VGG16,
    "mobilenet_v2": make_mobilenet_v2,
    "swin": make_swin,
    "mixer": Mixer,
}


class Batches:
    """Shuffled, randomly cropped and mirrored batches `(x, y)`: `(n, 3, height, width)` and `(n,)`.

    What an epoch holds is drawn from torch's global generator as it starts. The last images, too few for a
    batch, are left out.

    Args:
        pixels: uint8 `(images, height, width, 3)`.
        labels: int64 `(images,)`.
        batch_size: images in a batch.
        scale: turns uint8 `(n, h, w, 3)` into a network's input; `normalize` unless given.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, batch_size: int = 128, scale: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.pixels, self.labels, self.batch_size, self.scale = pixels, labels, batch_size, scale or normalize

    def __len__(self) -> int:
        return max(1, len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count)
        corners = torch.randint(2 * PADDING + 1, (2, count))
        mirrored = torch.rand(count) < 0.5
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = crop(self.pixels[order[part]], corners[:, part], mirrored[part])
            yield self.scale(pixels), self.labels[order[part]]


def crop(pixels: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Pad images `(n, h, w, 3)`, cut their size out at `corners` `(2, n)` and flip those `mirrored` `(n,)`."""
    count, height, width, _ = pixels.shape
    padded = pad(pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))
    columns = torch.arange(width)
    rows = corners[0, :, None] + torch.arange(height)
    columns = corners[1, :, None] + torch.where(mirrored[:, None], columns.flip(0), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalize(pixels: Tensor) -> Tensor:
    """Turn uint8 `(n, h, w, 3)` into float32 `(n, 3, h, w)`, channels last in memory."""
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2)


def find_data() -> tuple[Path, str]:
    """Return the data's file or folder, and which variant of the images it holds: `original` or `jpeg`.

    Raises:
        WorkloadError: there is none.
    """
    folder = os.environ.get("SLRC_DATA")
    for name, variant in ((ORIGINAL, "original"), (PACK, "jpeg")):
        if folder and (found := Path(folder).expanduser() / name).exists():
            return found, variant
    raise WorkloadError(
        f"no CIFAR-10 in `SLRC_DATA={folder}`: expected `{ORIGINAL}` or `{PACK}` there"
        if folder
        else "no CIFAR-10: `SLRC_DATA` is not set",
        hint="download and unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, or run "
        "`torchvision.datasets.CIFAR10('DATA', download=True)`; then set SLRC_DATA to the folder that holds "
        f"`{ORIGINAL}`",
    )


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Return the images of `train` or `test`: uint8 pixels `(n, 32, 32, 3)` and int64 labels `(n,)`."""
    data, variant = find_data()
    pixels, labels = read_original(data, split) if variant == "original" else read_pack(data, split)
    if "SLRC_SUBSET" in os.environ:
        count = min(int(os.environ["SLRC_SUBSET"]), len(labels))
        spread = np.arange(count) * len(labels) // count  # the pack is sorted by class
        pixels, labels = pixels[spread], labels[spread]
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


def read_original(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the pickled batches: `data` has rows of 3 planes of 32×32 pixels."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch["labels"] for batch in batches])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def read_pack(file: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the pack: JPEG scans that share one `head`. Their pixels are decoded once and cached."""
    pack = np.load(file)
    labels = pack[f"{split}_y"]
    cached = cache_folder() / f"cifar10-jpeg-{split}.npy"
    if not cached.exists():
        head, scans = pack["head"].tobytes(), pack[f"{split}_scan"].tobytes()
        ends = np.cumsum(pack[f"{split}_len"], dtype=np.int64)
        images = (head + scans[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_name(f"{cached.stem}.{os.getpid()}.npy")
        np.save(aside, pixels)
        aside.replace(cached)
    return np.load(cached), labels


def accuracy(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    scale: Callable[[Tensor], Tensor] = normalize,
) -> float:
    """Return the share of images that a model in evaluation mode gets right, on the device that it is on."""
    device = next(model.parameters(), pixels).device
    right = 0
    for x, y in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(scale(x).to(device)).argmax(1).cpu() == y).sum())
    return right / len(labels)


def train_dense(model: nn.Module, batches: Batches, lr: float, epochs: int, name: str) -> None:
    """Train in place with SGD and a cosine schedule, in bfloat16 where the processor computes in it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or has_bfloat16()):
                logits = model(x.to(device))
            loss = cross_entropy(logits.float(), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        line = f"dense {name}: epoch {epoch + 1}/{epochs}, loss {total / len(batches):.3f}, {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)
    model.to("cpu", memory_format=torch.contiguous_format)


def has_bfloat16() -> bool:
    """Tell whether the processor has instructions for bfloat16; without them autocast only costs time."""
    return not processor().features.isdisjoint({"avx512_bf16", "amx_bf16"})


def make_workload(name: str) -> slrc.Workload:
    """Return the workload of a network in `NETWORKS`, its dense weights trained or taken from the cache."""
    data, variant = find_data()
    batches, test = Batches(*load_images("train")), load_images("test")
    weights = data.parent / "weights" / f"cifar10_{name}.safetensors"
    adapts = weights.exists()
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", ADAPT_EPOCHS if adapts else SCRATCH_EPOCHS))
    subset = f"-{os.environ['SLRC_SUBSET']}" if "SLRC_SUBSET" in os.environ else ""
    dense = cache_folder() / f"cifar10-{variant}{subset}-{name}-{epochs}epochs.safetensors"

    def train(model: nn.Module) -> None:
        if adapts:
            load_model(model, str(weights))
        train_dense(model, batches, ADAPT_LR if adapts else SCRATCH_LR.get(name, USUAL_LR), epochs, name)

    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        model = slrc.cached_weights(NETWORKS[name](), dense, train)
    return slrc.Workload(
        model=model,
        example_inputs=(normalize(test[0][:1]).contiguous(),),
        train_batches=batches,
        evaluate=lambda model: {"accuracy": accuracy(model, *test)},
        name=f"cifar10-{name}",
    )


resnet20 = partial(make_workload, "resnet20")
resnet56 = partial(make_workload, "resnet56")
resnet110 = partial(make_workload, "resnet110")
resnet18 = partial(make_workload, "resnet18")
resnet50 = partial(make_workload, "resnet50")
vgg16 = partial(make_workload, "vgg16")
mobilenet_v2 = partial(make_workload, "mobilenet_v2")
swin = partial(make_workload, "swin")
mixer = partial(make_workload, "mixer")


def workload() -> slrc.Workload:
    """Return the workload of the network that `SLRC_MODEL` names."""
    name = os.environ.get("SLRC_MODEL", "resnet20")
    if name not in NETWORKS:
        raise WorkloadError(f"`SLRC_MODEL={name}` is unknown", hint=f"choose one of {', '.join(NETWORKS)}")
    return make_workload(name)
