"""Operators on images that move between channels and positions, or from one grid of positions to another."""

from __future__ import annotations

import math

import numpy as np
from torch.fx import Node

from slrc.passes.analysis.index_rules.reduction import pooling
from slrc.passes.analysis.index_rules.table import Labels, LabelTable, Rule, Value, tensor_args

RESIZES = [
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]
POOLS_WITH_INDICES = [
    "adaptive_max_pool1d",
    "adaptive_max_pool3d",
    "max_pool1d_with_indices",
    "max_pool3d_with_indices",
]


def im2col(node: Node, table: LabelTable) -> Value:
    """`im2col(x (n, c, h, w), (kh, kw)) -> (n, c·kh·kw, positions)`: a channel becomes a run that goes together."""
    x, kernel = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(kernel, (list, tuple))
    value = table.value(x)
    *lead, channels, height, width = value.dims
    for spatial in (height, width):
        table.pin(spatial, "spatial position", node)
    repeated = np.repeat(channels, math.prod(kernel)) if channels is not None else None  # type: ignore[arg-type]
    return Value([*lead, repeated, None], value.vanishes)


def col2im(node: Node, table: LabelTable) -> Value:
    """`col2im(x (n, c·kh·kw, positions), size, (kh, kw)) -> (n, c, h, w)`: the places of a kernel go together."""
    x, kernel = node.args[0], node.args[2]
    assert isinstance(x, Node)
    assert isinstance(kernel, (list, tuple))
    value = table.value(x)
    *lead, channels, positions = value.dims
    table.pin(positions, "spatial position", node)
    places = math.prod(kernel)  # type: ignore[arg-type]
    return Value([*lead, _merged(channels, places, node, table), None, None], value.vanishes)


def unfold(node: Node, table: LabelTable) -> Value:
    """`unfold(x, dim, size, step)`: windows of a dimension, which stays; the places of a window come last."""
    x, dim = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    value = table.value(x)
    dim %= len(value.dims)
    table.pin(value.dims[dim], "taken in windows", node)
    return Value([*value.dims[:dim], None, *value.dims[dim + 1 :], None], value.vanishes)


def pixel_shuffle(node: Node, table: LabelTable) -> Value:
    """`pixel_shuffle(x (n, c·r², h, w), r) -> (n, c, h·r, w·r)`: the r² channels of a pixel go together."""
    x, factor = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(factor, int)
    value = table.value(x)
    *lead, channels, _, _ = value.dims
    return Value([*lead, _merged(channels, factor**2, node, table), None, None], value.vanishes)


def pixel_unshuffle(node: Node, table: LabelTable) -> Value:
    """`pixel_unshuffle(x (n, c, h·r, w·r), r) -> (n, c·r², h, w)`: a channel becomes r² that go together."""
    x, factor = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(factor, int)
    value = table.value(x)
    *lead, channels, _, _ = value.dims
    return Value([*lead, np.repeat(channels, factor**2) if channels is not None else None, None, None], value.vanishes)


def channel_shuffle(node: Node, table: LabelTable) -> Value:
    """`channel_shuffle(x (n, c, …), groups)`: the same place of every group goes together and ends up side by side."""
    x, groups = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(groups, int)
    value = table.value(x)
    dims = list(value.dims)
    labels = dims[1]
    if labels is not None:
        dims[1] = np.repeat(table.join_rows(labels.reshape(groups, -1).T), groups)
    return Value(dims, value.vanishes)


def grid_sampler(node: Node, table: LabelTable) -> Value:
    """`grid_sampler(x (n, c, …), grid (n, …, 2))`: channels pass through; positions are mixed."""
    x, grid = tensor_args(node)[:2]
    value = table.value(x)
    table.pin_all(table.value(grid), "used as positions", node)
    for labels in [value.dims[0], *value.dims[2:]]:
        table.pin(labels, "spatial position", node)
    return Value([None, value.dims[1], *[None] * (len(value.dims) - 2)], value.vanishes)


def _merged(channels: Labels, places: int, node: Node, table: LabelTable) -> Labels:
    """Join every run of `places` channels into one."""
    if channels is None:
        return None
    return table.at_least_two(table.join_rows(channels.reshape(-1, places)), node)


RULES: dict[str, Rule] = {
    "im2col": im2col,
    "col2im": col2im,
    "unfold": unfold,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    **dict.fromkeys(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d"], grid_sampler),
    **dict.fromkeys(RESIZES + POOLS_WITH_INDICES, pooling),
}
