"""`slrc::block_sparse_conv` and `slrc::block_sparse_gemm`: layers with packed blocks, as operators of a program.

`slrc::block_sparse_mlp` is two of the latter, `slrc::max_pool2x2` and `slrc::upsample_bilinear2x` go on in the
memory layout of the former, `slrc::channels_first` and `slrc::channels_last` lead from another one to it and back, and
`slrc::depth_to_space` makes an image of what it computes for each phase of a stride.

Here they mean what they compute, in PyTorch's own operators; a backend replaces them with its kernels. The packed
form is that of `slrc.forms.packed_weight.PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slrc.forms.activations import ACTIVATIONS
from slrc.forms.packed_weight import unpack


@torch.library.custom_op("slrc::block_sparse_conv", mutates_args=())
def block_sparse_conv(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointers: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out_channels: int,
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    activation: str,
    slope: float,
) -> Tensor:
    """`activation(conv2d(x, weight) + bias + residual)`; `x` is `(n, in, h, w)`, `pads` two sizes."""
    shape = (out_channels, x.shape[1] // group, *kernel_shape)
    weight = unpack(values, columns, row_pointers, shape, group)
    y = functional.conv2d(x, weight, bias, list(strides), list(pads), list(dilations), group)
    return _finish(y, residual, activation, slope)


@block_sparse_conv.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    out_channels, *window = others[5:10]
    sizes = [
        (size + 2 * pad - (kernel - 1) * dilation - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(x.shape[2:], *window, strict=True)
    ]
    return x.new_empty(x.shape[0], out_channels, *sizes)


@torch.library.custom_op("slrc::block_sparse_gemm", mutates_args=())
def block_sparse_gemm(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointers: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out_channels: int,
    activation: str,
    slope: float,
) -> Tensor:
    """`activation(linear(x, weight) + bias + residual)`; `x` is `(..., in)`."""
    weight = unpack(values, columns, row_pointers, (out_channels, x.shape[-1]))
    return _finish(functional.linear(x, weight, bias), residual, activation, slope)


@block_sparse_gemm.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], others[5])


@torch.library.custom_op("slrc::block_sparse_mlp", mutates_args=())
def block_sparse_mlp(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointers: Tensor,
    bias: Tensor,
    down_values: Tensor,
    down_columns: Tensor,
    down_row_pointers: Tensor,
    down_bias: Tensor,
    residual: Tensor | None,
    hidden_channels: int,
    out_channels: int,
    activation: str,
    slope: float,
) -> Tensor:
    """`linear(activation(linear(x, weight) + bias), down_weight) + down_bias + residual`; `x` is `(..., in)`."""
    weight = unpack(values, columns, row_pointers, (hidden_channels, x.shape[-1]))
    hidden = ACTIVATIONS[activation](functional.linear(x, weight, bias), slope)
    down_weight = unpack(down_values, down_columns, down_row_pointers, (out_channels, hidden_channels))
    return _finish(functional.linear(hidden, down_weight, down_bias), residual, "none", 0.0)


@block_sparse_mlp.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], others[10])


@torch.library.custom_op("slrc::max_pool2x2", mutates_args=())
def max_pool2x2(x: Tensor) -> Tensor:
    """The maxima of 2×2 windows side by side; `x` is `(n, c, h, w)`."""
    return functional.max_pool2d(x, 2)


@max_pool2x2.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)


@torch.library.custom_op("slrc::upsample_bilinear2x", mutates_args=())
def upsample_bilinear2x(x: Tensor) -> Tensor:
    """Twice the size, bilinear between the centers of pixels; `x` is `(n, c, h, w)`."""
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear")


@upsample_bilinear2x.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2)


@torch.library.custom_op("slrc::channels_first", mutates_args=())
def channels_first(x: Tensor) -> Tensor:
    """`(n, h, w, c)` to `(n, c, h, w)`."""
    return x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


@channels_first.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[3], *x.shape[1:3])


@torch.library.custom_op("slrc::channels_last", mutates_args=())
def channels_last(x: Tensor) -> Tensor:
    """`(n, c, h, w)` to `(n, h, w, c)`."""
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


@channels_last.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *x.shape[2:], x.shape[1])


@torch.library.custom_op("slrc::depth_to_space", mutates_args=())
def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Put the phases `(n, block·block·c, h, w)` of an image between each other: `(n, c, block·h, block·w)`."""
    n, channels, h, w = x.shape
    split = x.reshape(n, block, block, channels // block**2, h, w)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block).clone()


@depth_to_space.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // block**2, x.shape[2] * block, x.shape[3] * block)


def _finish(y: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    result = ACTIVATIONS[activation](y if residual is None else y + residual, slope)
    return result.clone() if result is y else result
