"""What the block-sparse kernels take, said of a layer before it is packed.

The library checks the same when it loads a model (`layer_limits.h`); a test holds that the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

BLOCKS = (1, 4, 8, 16)
"""Consecutive outputs of a block."""
INT8_CHANNELS = 4
"""Consecutive input channels of an int8 block."""
MOST_ALONG = 4
"""Stride of a depthwise int8 layer along a row."""
MOST_DEPTHWISE = 2**10
"""Kernel positions of a depthwise int8 layer."""
MOST_STRIDE = 64
MOST_WINDOW = 2**15
"""Of a kernel's size, a dilation and a padding, along each axis."""
MOST_COLUMNS = 2**24
"""Input channels of a group × kernel positions."""
MOST_BLOCKS = 2**27 - 1
MOST_INPUT = 2**30
"""Floats of an image's padded input, of one group; each step of the strides counts as `STRIDE_MARGIN` rows and columns
more, the room between the parts that a stride splits it into."""
STRIDE_MARGIN = (3, 17)


def why_not_int8(weight_shape: Sequence[int], block: int, **layer: Any) -> str:
    """Return why the int8 kernels do not take a layer whose blocks all survive, or `""` if they do; as `why_not`."""
    out_channels, channels, *kernel = weight_shape
    if block == 1:
        if not kernel or channels != 1:
            return "int8 blocks of 1 output (the kernels take them of depthwise layers alone)"
        stride, dilation = layer.get("strides", (1, 1))[1], layer.get("dilations", (1, 1))[1]
        if stride > MOST_ALONG or dilation != 1:
            return f"stride {stride}, dilation {dilation} along a row (of depthwise int8 layers up to {MOST_ALONG}, 1)"
        if prod(kernel) > MOST_DEPTHWISE:
            return f"{prod(kernel)} weights of each output (of depthwise int8 layers up to {MOST_DEPTHWISE})"
    if kernel:
        channels = -(-channels // INT8_CHANNELS)
    return why_not((out_channels, channels, *kernel), block, **layer)


def why_not_pool(kernel: Sequence[int], **window: Any) -> str:
    """Return why the kernels do not take a max pool of bytes, or `""` if they do; `window` as of `why_not`."""
    return why_not((1, 1, *kernel), 1, **window)


def why_not(
    weight_shape: Sequence[int],
    block: int,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
    input_size: Sequence[int] = (1, 1),
) -> str:
    """Return why the kernels do not take a layer whose blocks all survive, or `""` if they do.

    Args:
        weight_shape: `(out, in/groups, kh, kw)` of a convolution, `(out, in)` of a matrix.
        block: consecutive outputs of a block.
        strides, pads, dilations: of the convolution, two each; `pads` are those of either side.
        groups: of the convolution.
        input_size: the height and width of the convolution's input.
    """
    out_channels, channels, *kernel = weight_shape
    if block not in BLOCKS:
        return f"blocks of {block} outputs (the kernels take 1, 4, 8 or 16)"
    for name, sizes, most in (
        ("kernel size", kernel, MOST_WINDOW),
        ("stride", strides, MOST_STRIDE),
        ("dilation", dilations, MOST_WINDOW),
        ("padding", pads, MOST_WINDOW),
    ):
        if (size := max(sizes, default=1)) > most:
            return f"{name} {size} (the kernels take up to {most})"
    columns = channels * prod(kernel)
    if columns > MOST_COLUMNS:
        return f"{columns} weights of each output (the kernels take up to {MOST_COLUMNS})"
    blocks = groups * -(-out_channels // groups // block) * columns
    if blocks > MOST_BLOCKS:
        return f"{blocks} blocks (the kernels take up to {MOST_BLOCKS})"
    rows, width = (
        size + 2 * pad + margin * stride
        for size, pad, margin, stride in zip(input_size, pads, STRIDE_MARGIN, strides, strict=True)
    )
    if kernel and channels * rows * width > MOST_INPUT:
        return (
            f"an input of {channels} × {rows} × {width} with its padding (the kernels take up to {MOST_INPUT} floats)"
        )
    return ""
