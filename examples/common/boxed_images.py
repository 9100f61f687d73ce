"""Images with boxes as the input of a network: whole on grey, or varied for training as Darknet varies them.

What reads them in batches, and what measures a network on whole ones, is here too.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.average_precision import Found, Labels, average_precision
from common.coco import Split
from common.dense_training import device_of
from slrc.errors import WorkloadError

BATCH = 16
STRIDE = 32
"""Pixels of a coarse cell: the input's sides are multiples of it."""
GREY = (127, 127, 127)
ZOOM = 0.5, 1.5
"""The larger side of a training image, over that of the input."""
STRETCH = 0.3
"""By how much its width and height vary apart from that."""
HUE, COLOUR = 0.1, 1.5
"""How far hue is turned, as a share of the circle, and by what saturation and brightness are multiplied at most."""
LEAST_LEFT = 0.2
"""A box of which less is left in sight is no label."""


class Placement(NamedTuple):
    """Where an image lies in the network's input: pixels times `scale` plus `offset`, both `(x, y)`."""

    scale: tuple[float, float]
    offset: tuple[float, float]

    def forth(self, boxes: Tensor) -> Tensor:
        """Return boxes `(n, 4)` of the image in the input."""
        return boxes * torch.tensor(self.scale * 2) + torch.tensor(self.offset * 2)

    def back(self, boxes: Tensor) -> Tensor:
        """Return boxes `(n, 4)` of the input in the image."""
        return (boxes - torch.tensor(self.offset * 2)) / torch.tensor(self.scale * 2)


Placed = tuple[Image.Image, Placement]


def place(image: Image.Image, size: int, width: float, height: float, across: float, down: float) -> Placed:
    """Scale an image and put it on grey: return the input and the `Placement`.

    Args:
        image: in colour.
        size: the side of the input in pixels.
        width: of the scaled image in pixels.
        height: likewise.
        across: how much of the room beside it is at its left; where it is wider than the input, of what is cut off.
        down: likewise above it.
    """
    wide, high = max(1, round(width)), max(1, round(height))
    left, top = round((size - wide) * across), round((size - high) * down)
    canvas = Image.new("RGB", (size, size), GREY)
    canvas.paste(image.resize((wide, high), Image.Resampling.BILINEAR), (left, top))
    return canvas, Placement((wide / image.width, high / image.height), (left, top))


def letterbox(image: Image.Image, size: int) -> Placed:
    """Return the input that shows an image whole, in the middle, and the `Placement`."""
    scale = size / max(image.size)
    return place(image, size, image.width * scale, image.height * scale, 0.5, 0.5)


def augment(image: Image.Image, labels: Labels, size: int) -> tuple[Image.Image, Tensor]:
    """Return an image as it varies in training, and its labels `(m, 5)`: class and centre form in shares of it."""

    def draw(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high))

    def factor() -> float:
        return float(np.exp(draw(-np.log(COLOUR), np.log(COLOUR))))

    stretch = (1 + draw(-STRETCH, STRETCH)) / (1 + draw(-STRETCH, STRETCH)) * image.width / image.height
    side = size * draw(*ZOOM)
    shown, placement = place(
        recolour(image, draw(-HUE, HUE), factor(), factor()),
        size,
        side * min(1.0, stretch),
        side / max(1.0, stretch),
        draw(0, 1),
        draw(0, 1),
    )
    whole = placement.forth(labels.boxes)
    seen = whole.clamp(0, size)
    extent = (seen[:, 2:] - seen[:, :2]) / size
    before = ((whole[:, 2:] - whole[:, :2]) / size).prod(-1)
    kept = (extent > 0).all(-1) & (extent.prod(-1) > LEAST_LEFT * before) & ~labels.crowd
    centre = (seen[:, :2] + seen[:, 2:]) / (2 * size)
    if draw(0, 1) < 0.5:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        centre[:, 0] = 1 - centre[:, 0]
    return shown, torch.cat([labels.classes[:, None], centre, extent], -1)[kept]


def recolour(image: Image.Image, hue: float, saturation: float, brightness: float) -> Image.Image:
    """Turn the hue by a share of the circle, and multiply saturation and brightness."""
    h, s, v = image.convert("HSV").split()
    h = h.point([int(x + 256 * hue) % 256 for x in range(256)])
    s, v = (
        plane.point([min(255, int(x * factor)) for x in range(256)])
        for plane, factor in ((s, saturation), (v, brightness))
    )
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels as float32 `(3, h, w)` from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class TrainingImages(Dataset):
    """Varied images `(3, size, size)` and their labels `(m, 5)`, drawn from torch's global generator."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, labels = augment(self.split.image(number), self.split.labels[number], self.size)
        return to_tensor(image), labels


class LetterboxedImages(Dataset):
    """Whole images `(3, size, size)`, where they lie in that, and their own widths and heights."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[Tensor, Placement, tuple[int, int]]:
        image = self.split.image(number)
        shown, placement = letterbox(image, self.size)
        return to_tensor(shown), placement, image.size


def stack_labelled(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return images `(n, 3, size, size)` and labels `(n, m, 5)`, filled up with rows of -1."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), pad_sequence(list(labels), batch_first=True, padding_value=-1.0)


def read_size(usual: int = 416) -> int:
    """Return the side of the input in pixels that `SLRC_SIZE` asks for.

    Raises:
        WorkloadError: it is no multiple of 32.
    """
    text = os.environ.get("SLRC_SIZE", str(usual))
    if not text.isdecimal() or int(text) % STRIDE or not int(text):
        raise WorkloadError(f"`SLRC_SIZE={text}` must be a multiple of {STRIDE}", hint=f"{usual} is the usual one")
    return int(text)


def read_processes() -> int:
    """Return how many processes read images: with a GPU some, else this one, as reading takes little of the time."""
    return min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0


def training_batches(split: Split, size: int, batch_size: int = BATCH) -> DataLoader:
    """Return shuffled batches, anew every epoch; the last images, too few for a batch, are left out."""
    return DataLoader(
        TrainingImages(split, size),
        min(batch_size, len(split)),
        shuffle=True,
        drop_last=True,
        collate_fn=stack_labelled,
        num_workers=read_processes(),
    )


@torch.no_grad()
def measure(
    model: Callable[[Tensor], Any], find: Callable[[Any], list[Found]], split: Split, size: int
) -> dict[str, float]:
    """Return `mAP50` and `mAP` of what is found in whole images.

    Args:
        model: takes images `(n, 3, size, size)`, on the device of its parameters, if it has any.
        find: from what the model returns to what is found in each image, in the pixels of the input, on the CPU.
        split: images and labels.
        size: the side of the input in pixels.
    """
    device = device_of(model)
    loader = DataLoader(
        LetterboxedImages(split, size),
        BATCH,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
        num_workers=read_processes(),
    )
    found: list[Found] = []
    for images, placements, sizes in loader:
        in_input = find(model(torch.stack(images).to(device)))
        for ours, placement, (width, height) in zip(in_input, placements, sizes, strict=True):
            edges = torch.tensor([width, height, width, height])
            found.append(ours._replace(boxes=placement.back(ours.boxes).clamp(min=0).minimum(edges)))
    return average_precision(found, split.labels)
