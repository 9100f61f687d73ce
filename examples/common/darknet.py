"""Darknet's networks, YOLOv3 and YOLOv3-tiny (Redmon & Farhadi, arXiv 1804.02767), and its files of weights."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slrc.errors import WorkloadError

SLOPE = 0.1
HEAD = 3 * (5 + 80)
"""Channels of a head: centre, extent, objectness and COCO's classes for each of three anchors."""

Row = tuple[Any, ...]
"""A layer as in Darknet's files, of which those that are told to look back say how far, or at which layer."""


def residuals(width: int, count: int) -> list[Row]:
    """Return a halving and so many residual blocks."""
    block = [("conv", width // 2, 1, 1), ("conv", width, 3, 1), ("shortcut", -3)]
    return [("conv", width, 3, 2), *block * count]


def neck(width: int) -> list[Row]:
    """Return the layers in front of a head, and the head."""
    pair = [("conv", width, 1, 1), ("conv", 2 * width, 3, 1)]
    return [*pair * 3, ("head",), ("yolo",)]


def branch(width: int, source: int) -> list[Row]:
    """Return the layers from a neck to the next, which sees twice the resolution and an earlier layer."""
    return [("route", -4), ("conv", width, 1, 1), ("upsample",), ("route", -1, source)]


TINY: list[Row] = [
    *(row for width in (16, 32, 64, 128, 256) for row in (("conv", width, 3, 1), ("pool", 2))),
    *(("conv", 512, 3, 1), ("pool", 1), ("conv", 1024, 3, 1)),
    *(("conv", 256, 1, 1), ("conv", 512, 3, 1), ("head",), ("yolo",)),
    *branch(128, 8),
    *(("conv", 256, 3, 1), ("head",), ("yolo",)),
]
DARKNET53: list[Row] = [
    ("conv", 32, 3, 1),
    *(row for width, count in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)) for row in residuals(width, count)),
]
FULL: list[Row] = [*DARKNET53, *neck(512), *branch(256, 61), *neck(256), *branch(128, 36), *neck(128)]


class Convolution(nn.Module):
    """A convolution, batch norm and leaky ReLU; a head is the convolution alone, with a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, is_head: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=is_head)
        self.bn = None if is_head else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h/stride, w/stride)`."""
        x = self.conv(x)
        return x if self.bn is None else nn.functional.leaky_relu(self.bn(x), SLOPE)


class Darknet(nn.Module):
    """A network from rows of a Darknet file; layers bear the numbers that they have there.

    Args:
        rows: `("conv", outputs, kernel, stride)`, `("head",)`, `("pool", stride)`, `("upsample",)`,
            `("route", *layers)`, `("shortcut", layer)` and `("yolo",)`, where a head's output is returned.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self.rows, self.layers = rows, nn.ModuleList()
        widths: list[int] = []
        for row in rows:
            width = widths[-1] if widths else 3
            layer: nn.Module = nn.Identity()
            match row:
                case "conv", outputs, kernel, stride:
                    layer, width = Convolution(width, outputs, kernel, stride), outputs
                case ("head",):
                    layer, width = Convolution(width, HEAD, 1, 1, is_head=True), HEAD
                case "pool", 1:  # of the same size: padded at the right and below
                    layer = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -torch.inf), nn.MaxPool2d(2, 1))
                case "pool", stride:
                    layer = nn.MaxPool2d(2, stride)
                case ("upsample",):
                    layer = nn.Upsample(scale_factor=2)
                case "route", *sources:
                    width = sum(widths[source] for source in sources)
            self.layers.append(layer)
            widths.append(width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`(n, 3, h, w)` to raw heads `(n, 255, h/32, w/32)`, `(n, 255, h/16, w/16)` and perhaps a finer one."""
        outputs: list[Tensor] = []
        heads: list[Tensor] = []
        for row, layer in zip(self.rows, self.layers, strict=True):
            match row:
                case "route", source:
                    x = outputs[source]
                case "route", *sources:
                    x = torch.cat([outputs[source] for source in sources], 1)
                case "shortcut", source:
                    x = x + outputs[source]
                case ("yolo",):
                    heads.append(x)
                case _:
                    x = layer(x)
            outputs.append(x)
        return tuple(heads)


def load_weights(model: Darknet, file: Path) -> None:
    """Load weights that are kept by name, as safetensors, or one after another, as Darknet writes them.

    Raises:
        WorkloadError: they are those of another network.
    """
    try:
        held = load_file(file) if file.suffix == ".safetensors" else read_darknet(model, file)
        model.load_state_dict(held)
    except (RuntimeError, ValueError, SafetensorError) as error:
        reason = shorten(str(error), 200, placeholder=" …")
        raise WorkloadError(
            f"`{file}` does not fit the network: {reason}", hint="move it away to train anew"
        ) from error


def read_darknet(model: Darknet, file: Path) -> dict[str, Tensor]:
    """Return a file of Darknet's as tensors by name.

    Raises:
        ValueError: it holds more or fewer weights than the network.
    """
    major, minor, _ = np.fromfile(file, np.int32, 3)
    header = 20 if major * 10 + minor >= 2 else 16
    values, held, start = torch.from_numpy(np.fromfile(file, np.float32, offset=header)), {}, 0
    for name, layer in model.named_modules():
        if isinstance(layer, Convolution):
            norm = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var")
            for part in (*(("conv.bias",) if layer.bn is None else norm), "conv.weight"):
                shape = layer.state_dict()[part].shape
                held[f"{name}.{part}"] = values[start : start + shape.numel()].reshape(shape)
                start += shape.numel()
    if start != len(values):
        raise ValueError(f"expected {start} weights, got {len(values)}")
    return held
