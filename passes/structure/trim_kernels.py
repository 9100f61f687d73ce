"""Cut off the taps of convolutions that read nothing but padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from slrc.ir.nodes import argument, conv_window, layer_weight, op_name
from slrc.ir.program import Program
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import call_before, get_tensor, layer_bias, reads, replace_tensor


@dataclass(frozen=True)
class TrimKernels(Transform):
    """Cut off the taps of a `conv2d` that read padding for every output.

    A convolution with a dilation of 24 on a map of 12×15 pixels, as in DeepLab (Chen et al., arXiv 1706.05587) on a
    small image, reads pixels with its middle tap alone: it is a 1×1 convolution.

    1. The image's size is known, and padding is as much on both sides, before and after.
    2. A weight that is read elsewhere is left alone.
    """

    name: ClassVar[str] = "trim-kernels"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with smaller kernels."""
        return PassResult(*program.rewrite(_trim_all))


def _trim_all(module: GraphModule) -> bool:
    convs = [node for node in module.graph.nodes if op_name(node) == "conv2d"]
    return sum(_trim(module, conv) for conv in convs) > 0


def _trim(module: GraphModule, conv: Node) -> bool:
    """Trim one convolution's kernel; returns whether a tap went."""
    name, shape = layer_weight(conv), conv.args[0].meta["val"].shape  # type: ignore[union-attr]
    is_same = isinstance(argument(conv, 4, "padding", 0), str)
    if name is None or is_same or not all(isinstance(size, int) for size in shape[-2:]):
        return False
    weight = get_tensor(module, name)
    strides, pads, dilations = conv_window(conv)
    kept, left = [], []
    sizes = zip(shape[-2:], conv.meta["val"].shape[-2:], weight.shape[2:], strides, pads, dilations, strict=True)
    for size, outputs, taps, stride, pad, dilation in sizes:
        read = [t for t in range(taps) if _reads(t * dilation - pad, int(size), int(outputs), stride)]
        if not read:
            return False
        before, after = pad - read[0] * dilation, pad - (taps - 1 - read[-1]) * dilation
        if before != after or before < 0:
            read, before = list(range(taps)), pad
        kept.append(slice(read[0], read[-1] + 1))
        left.append(before)
    trimmed = weight[:, :, kept[0], kept[1]]
    if trimmed.shape == weight.shape or reads(module, name) > 1:
        return False
    small = nn.Parameter(trimmed.detach().contiguous(), requires_grad=weight.requires_grad)
    read_small = replace_tensor(module, conv, name, small)
    rest = conv.args[5:]
    cut = call_before(conv, conv.target, conv.args[0], read_small, layer_bias(conv), strides, left, *rest)  # type: ignore[arg-type]
    conv.replace_all_uses_with(cut)
    return True


def _reads(start: int, size: int, outputs: int, stride: int) -> bool:
    """Tell whether a tap that reads from `start` on reads any of an image's pixels."""
    return any(0 <= start + output * stride < size for output in range(outputs))
