"""Transposed convolutions as convolutions, whose outputs are then put between each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from slrc.forms import packed_ops  # noqa: F401, registers the operators
from slrc.ir.nodes import argument, conv_groups, node_shape, op_name, pair
from slrc.passes.graph_edits import call_before


class Axis(NamedTuple):
    """One axis of a transposed convolution.

    Output `y` is row `q = (y + padding) // stride` of phase `r = (y + padding) % stride`. A phase is a convolution with
    every `stride`-th tap, of `taps` at most; tap `t` of it reads input `q − t`.
    """

    stride: int
    padding: int
    kernel: int
    size: int
    """Of the input."""
    out_size: int

    @property
    def taps(self) -> int:
        """Of the convolution that makes all phases."""
        last = self.out_size + self.padding - (self.size - 1) * self.stride  # of the outputs of the last input
        return -(-max(self.kernel, last) // self.stride)

    @property
    def pads(self) -> int:
        """Zeros on either side of the convolution's input: rows that are cut off on both sides are not computed."""
        last = self.out_size + self.padding - (self.size - 1) * self.stride
        unread = min(self.padding // self.stride, self.taps - 1, self.taps - -(-last // self.stride))
        return self.taps - 1 - max(0, unread)

    @property
    def rows(self) -> int:
        """Of each phase."""
        return self.size + 2 * self.pads - self.taps + 1

    @property
    def start(self) -> int:
        """The first output, among those of all phases."""
        return self.padding - (self.taps - 1 - self.pads) * self.stride


def axes_of(layer: Node) -> list[Axis]:
    """Return the two axes of a `conv_transpose2d` of a batch of images."""
    x, weight = layer.args[:2]
    strides, paddings = (pair(argument(layer, k, name, default)) for k, name, default in _WINDOW)
    kernel, sizes = node_shape(weight)[2:], node_shape(x)[2:]  # type: ignore[arg-type]
    return [Axis(*axis) for axis in zip(strides, paddings, kernel, sizes, node_shape(layer)[2:], strict=True)]


def why_not_unrolled(layer: Node, rows: int) -> str:
    """Return why a `conv_transpose2d` cannot become a convolution with blocks of `rows` outputs, or `""`."""
    x, weight = layer.args[:2]
    if len(node_shape(x)) != 4:  # type: ignore[arg-type]
        return "it is no transposed convolution of a batch of images"
    if not all(isinstance(size, int) for size in x.meta["val"].shape[2:]):  # type: ignore[union-attr]
        return "it is a transposed convolution of images of any size"
    if conv_groups(layer) > 1:
        return "it is a transposed convolution in groups"
    if pair(argument(layer, 7, "dilation", 1)) != [1, 1]:
        return "it is a transposed convolution with a dilation"
    outputs = node_shape(weight)[1]  # type: ignore[arg-type]
    return f"its {outputs} outputs do not fill blocks of {rows}" if outputs % rows else ""


def unroll_weight(weight: Tensor, axes: list[Axis]) -> Tensor:
    """Return the convolution's weight `(phases·out, in, *taps)` of a transposed one's `(in, out, *kernel)`.

    Outputs of one phase stay side by side, so that blocks of them stay blocks.
    """
    inputs, outputs = weight.shape[:2]
    (rows, columns) = axes
    beyond = [axis.taps * axis.stride - axis.kernel for axis in axes]
    whole = functional.pad(weight.detach(), (0, beyond[1], 0, beyond[0]))
    split = whole.reshape(inputs, outputs, rows.taps, rows.stride, columns.taps, columns.stride).flip(2, 4)
    return split.permute(3, 5, 1, 0, 2, 4).reshape(-1, inputs, rows.taps, columns.taps).contiguous()


def interleave(before: Node, phases: Node, axes: list[Axis]) -> Node:
    """Return a transposed convolution's result `(n, out, h, w)` of its phases `(n, phases·out, rows, columns)`."""
    (rows, columns), result = axes, phases
    aten = torch.ops.aten
    if rows.stride == columns.stride != 1:
        result = call_before(before, torch.ops.slrc.depth_to_space.default, result, rows.stride)
    elif rows.stride != columns.stride:
        shape = [-1, rows.stride, columns.stride, _outputs(before), rows.rows, columns.rows]
        split = call_before(before, aten.reshape.default, result, shape)
        moved = call_before(before, aten.permute.default, split, [0, 3, 4, 1, 5, 2])
        joined = [-1, shape[3], rows.rows * rows.stride, columns.rows * columns.stride]
        result = call_before(before, aten.reshape.default, moved, joined)
    for dim, axis in enumerate(axes, start=2):
        if axis.out_size != axis.rows * axis.stride:
            result = call_before(before, aten.slice.Tensor, result, dim, axis.start, axis.start + axis.out_size)
    return result


def is_unrolled(layer: Node) -> bool:
    """Tell whether a layer is packed by way of its phases."""
    return op_name(layer) == "conv_transpose2d"


_WINDOW = ((3, "stride", 1), (4, "padding", 0))


def _outputs(layer: Node) -> int:
    return node_shape(layer)[1]
