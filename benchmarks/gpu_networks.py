"""The networks of `gpu_latency.py`, of PyTorch alone, at their usual size or tiny for a dry run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).parents[1] / "examples"))
from common.darknet import TINY, Darknet, Row

CLASSES = 1000
DRY_WIDTH = 8
"""By how much the networks of a dry run are narrower."""


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """A block, added to its input or to a projection of it, and perhaps a ReLU behind."""

    def __init__(self, block: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.block, self.shortcut, self.last = block, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h', w')`."""
        return self.last(self.block(x) + self.shortcut(x))


def resnet50(width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """Return ResNet-50 (He et al., arXiv 1512.03385), with strides in the 3×3 layers."""
    layers = [*conv_bn(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, depth in enumerate(depths):
        inner = width << stage
        for number in range(depth):
            stride, outputs = 2 if stage and not number else 1, 4 * inner
            parts = [*conv_bn(inputs, inner, 1), nn.ReLU(), *conv_bn(inner, inner, 3, stride), nn.ReLU()]
            block = nn.Sequential(*parts, *conv_bn(inner, outputs, 1))
            shortcut = nn.Identity() if number else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))
            layers.append(Residual(block, shortcut, nn.ReLU()))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""MobileNetV2's stages: expansion, outputs, blocks and the first block's stride."""


def mobilenet_v2(divisor: int = 1) -> nn.Module:
    """Return MobileNetV2 (Sandler et al., arXiv 1801.04381), its widths divided."""
    inputs, last = 32 // divisor, 1280 // divisor
    layers = [*conv_bn(3, inputs, 3, 2), nn.ReLU6()]
    for expansion, width, depth, first_stride in INVERTED:
        outputs = width // divisor
        for number in range(depth):
            stride, inner = 1 if number else first_stride, inputs * expansion
            parts = [] if expansion == 1 else [*conv_bn(inputs, inner, 1), nn.ReLU6()]
            parts += [*conv_bn(inner, inner, 3, stride, inner), nn.ReLU6(), *conv_bn(inner, outputs, 1)]
            block = nn.Sequential(*parts)
            is_residual = stride == 1 and inputs == outputs
            layers.append(Residual(block, nn.Identity(), nn.Identity()) if is_residual else block)
            inputs = outputs
    layers += [*conv_bn(inputs, last, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES)]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A layer of a transformer: attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before_attention, self.before_mlp = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, tokens, width)` to the same."""
        n, tokens, width = x.shape
        qkv = self.qkv(self.before_attention(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(seen)
        return x + self.mlp(self.before_mlp(x))


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) with patches of 16 pixels."""

    def __init__(self, pixels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (pixels // 16) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, pixels, pixels)` to logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def narrower(rows: list[Row], by: int) -> list[Row]:
    """Return a Darknet's rows with fewer channels."""
    return [("conv", row[1] // by, *row[2:]) if row[0] == "conv" else row for row in rows]


@dataclass(frozen=True)
class Network:
    """A network and the side of its input in pixels; `tiny` and `tiny_pixels` are those of a dry run."""

    title: str
    make: Callable[[], nn.Module]
    pixels: int
    tiny: Callable[[], nn.Module]
    tiny_pixels: int


NETWORKS = {
    "resnet50": Network("ResNet-50", resnet50, 224, lambda: resnet50(64 // DRY_WIDTH, (1, 1, 1, 1)), 32),
    "mobilenet_v2": Network("MobileNetV2", mobilenet_v2, 224, lambda: mobilenet_v2(DRY_WIDTH // 2), 32),
    "vit_s": Network(
        "ViT-S/16", lambda: VisionTransformer(224, 384, 12, 6), 224, lambda: VisionTransformer(32, 64, 1, 2), 32
    ),
    "yolov3_tiny": Network("YOLOv3-tiny", lambda: Darknet(TINY), 416, lambda: Darknet(narrower(TINY, DRY_WIDTH)), 64),
}
