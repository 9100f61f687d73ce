"""Operators that move indices: labels move with them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from slrc.ir.nodes import argument
from slrc.passes.analysis.index_rules.lookahead import feeds_attention, is_taken_apart
from slrc.passes.analysis.index_rules.table import Dims, LabelTable, Rule, Value, is_one, shape_of, tensor_args
from slrc.sparsity.choices import Attention

PRIME = 1_000_003
"""Stands for the symbolic batch when sizes are factored: no product of real sizes contains it."""


def reshape(node: Node, table: LabelTable) -> Value:
    """`view(x, sizes)`: dimensions that merge or split are matched by the product of their sizes."""
    x = node.args[0]
    assert isinstance(x, Node)
    value = table.value(x)
    before, after = [numeric(s) for s in shape_of(x)], [numeric(s) for s in shape_of(node)]
    dims: Dims = [None] * len(after)
    for inputs, outputs in segments(before, after):
        _reshape_segment(node, table, value.dims, inputs, outputs, before, after, dims)
    return Value(dims, value.vanishes)


def segments(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal product into the shortest runs of dimensions with equal products.

    `[2, 6, 5]` and `[2, 2, 3, 5]` give `([0], [0]), ([1], [1, 2]), ([2], [3])`.
    """
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins: list[int] = []
        outs: list[int] = []
        left = right = 1
        while True:
            if i < len(before) and (left <= right or j >= len(after)):
                left, ins, i = left * before[i], [*ins, i], i + 1
            elif j < len(after):
                right, outs, j = right * after[j], [*outs, j], j + 1
            else:
                break
            if left == right and ins and outs:
                break
        result.append((ins, outs))
    return result


def _reshape_segment(
    node: Node,
    table: LabelTable,
    dims: Dims,
    inputs: list[int],
    outputs: list[int],
    before: list[int],
    after: list[int],
    result: Dims,
) -> None:
    labelled = [d for d in inputs if dims[d] is not None]
    if not labelled:
        return
    outputs = [d for d in outputs if after[d] != 1] or outputs[:1]
    with_batch = [d for d in outputs if after[d] % PRIME == 0]
    # The batch, where it is in this run, counts as 1: what merges with it can carry no labels.
    sizes = [before[d] // PRIME if before[d] % PRIME == 0 else before[d] for d in inputs]
    shape = [after[d] // PRIME if d in with_batch else after[d] for d in outputs]
    free = [k for k, d in enumerate(outputs) if d not in with_batch]
    if not free or math.prod(sizes) != math.prod(shape):
        for d in labelled:
            table.pin(dims[d], "merged with the batch", node)
        return
    for d in labelled[1:]:
        table.pin(dims[d], "two removable dimensions merge", node)
    carried = dims[labelled[0]]
    assert carried is not None
    spread = carried.reshape([-1 if d == labelled[0] else 1 for d in inputs])
    grid = np.broadcast_to(spread, sizes).reshape(shape)
    axis = _carrying_axis(node, table, grid, outputs, free)
    result[outputs[axis]] = table.join_rows(np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1))


def _carrying_axis(node: Node, table: LabelTable, grid: NDArray[np.int64], outputs: list[int], free: list[int]) -> int:
    """Return the new dimension that takes the labels; they are joined along the others.

    It is the one along which they differ, if there is one only. Else never one that is later taken apart (the 3 of a
    fused qkv, the 2 of a channel shuffle) if another will do; then the heads of an attention, or their width, as the
    user chose; then the largest.
    """
    varying = _varying(grid, free)
    if len(varying) > 1:
        varying = _varying(table.union.roots()[grid], free)
    if len(varying) == 1:
        return varying[0]
    whole = [k for k in free if grid.shape[k] > 1 and not is_taken_apart(node, outputs[k])] or free
    if len(whole) > 1 and feeds_attention(node):
        return whole[0] if table.attention is Attention.HEADS else whole[-1]
    return max(whole, key=lambda k: grid.shape[k])


def _varying(grid: NDArray[np.int64], axes: list[int]) -> list[int]:
    return [k for k in axes if grid.shape[k] > 1 and (grid != np.take(grid, [0], k)).any()]


def permute(node: Node, table: LabelTable) -> Value:
    """`permute(x, order)`."""
    x, order = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(order, (list, tuple))
    value = table.value(x)
    return Value([value.dims[int(d)] for d in order], value.vanishes)  # type: ignore[arg-type]


def transpose(node: Node, table: LabelTable) -> Value:
    """`transpose(x, a, b)`."""
    x, a, b = node.args[:3]
    assert isinstance(x, Node)
    value = table.value(x)
    dims = list(value.dims)
    dims[a], dims[b] = dims[b], dims[a]  # type: ignore[index]
    return Value(dims, value.vanishes)


def matrix_transpose(node: Node, table: LabelTable) -> Value:
    """`t(x)`."""
    value = table.value(tensor_args(node)[0])
    return Value(value.dims[::-1], value.vanishes)


def unsqueeze(node: Node, table: LabelTable) -> Value:
    """`unsqueeze(x, dim)`."""
    x, dim = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    value = table.value(x)
    dim %= len(value.dims) + 1
    return Value([*value.dims[:dim], None, *value.dims[dim:]], value.vanishes)


def squeeze(node: Node, table: LabelTable) -> Value:
    """`squeeze(x, dims)`: dimensions of size 1 go."""
    x = node.args[0]
    assert isinstance(x, Node)
    value, gone = table.value(x), squeezed_dims(node)
    return Value([labels for d, labels in enumerate(value.dims) if d not in gone], value.vanishes)


def squeezed_dims(node: Node) -> list[int]:
    """Return the dimensions of size 1 that a `squeeze` removes."""
    x = node.args[0]
    assert isinstance(x, Node)
    shape = shape_of(x)
    asked = argument(node, 1, "dim", list(range(len(shape))))
    return sorted({d % len(shape) for d in ([asked] if isinstance(asked, int) else asked) if is_one(shape[d])})


def expand(node: Node, table: LabelTable) -> Value:
    """`expand(x, sizes)`: new copies of a dimension of size 1 have no labels, but for those of an index."""
    x = node.args[0]
    assert isinstance(x, Node)
    value = table.value(x)
    lead = len(shape_of(node)) - len(value.dims)
    return _with_copies(node, table, Value([*[None] * lead, *value.dims], value.vanishes))


def _with_copies(node: Node, table: LabelTable, value: Value) -> Value:
    """Let copies of an index that is written out for each channel, as for a scatter, go with these channels."""
    x = node.args[0]
    assert isinstance(x, Node)
    if x.meta["val"].is_floating_point():
        return value
    lead, before, after = len(value.dims) - len(shape_of(x)), shape_of(x), shape_of(node)
    copied = [isinstance(n, int) and n > 1 and (d < lead or is_one(before[d - lead])) for d, n in enumerate(after)]
    dims = [table.union.new(n) if new else own for n, new, own in zip(after, copied, value.dims, strict=True)]
    return Value(dims, vanishes=False) if any(copied) else value


def cat(node: Node, table: LabelTable) -> Value:
    """`cat(xs, dim)`: labels are concatenated along `dim` and joined along the others."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    nodes = [p for p in parts if isinstance(p, Node)]
    rank = len(shape_of(node))
    dim = int(argument(node, 1, "dim", 0)) % rank
    values = [table.value(p) for p in nodes]
    result: Dims = []
    for d in range(rank):
        met = [v.dims[d] for v in values]
        if all(labels is None for labels in met):
            result.append(None)
        elif d == dim:
            pieces = []
            for part, labels in zip(nodes, met, strict=True):
                if labels is None:
                    labels = table.union.new(shape_of(part)[d])
                    table.pin(labels, "concatenated part of a fixed size", node)
                pieces.append(labels)
            result.append(np.concatenate(pieces))
        else:
            merged = met[0]
            for labels in met[1:]:
                merged = table.join(merged, labels, node)
            result.append(merged)
    return Value(result, all(v.vanishes for v in values))


def stack(node: Node, table: LabelTable) -> Value:
    """`stack(xs, dim)`: labels are joined; the new dimension has none."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    values = [table.value(p) for p in parts if isinstance(p, Node)]
    dims: Dims = []
    for met in zip(*(v.dims for v in values), strict=True):
        merged = met[0]
        for labels in met[1:]:
            merged = table.join_if_labelled(merged, labels, node)
        dims.append(merged)
    dim = int(argument(node, 1, "dim", 0)) % (len(dims) + 1)
    return Value([*dims[:dim], None, *dims[dim:]], all(v.vanishes for v in values))


def roll(node: Node, table: LabelTable) -> Value:
    """`roll(x, shifts, dims)`: rolled dimensions stay."""
    x, dims = node.args[0], argument(node, 2, "dims", [])
    assert isinstance(x, Node)
    value = table.value(x)
    rolled = {d % len(value.dims) for d in ([dims] if isinstance(dims, int) else dims or range(len(value.dims)))}
    for d in rolled:
        table.pin(value.dims[d], "rolled", node)
    return Value([None if d in rolled else labels for d, labels in enumerate(value.dims)], value.vanishes)


def repeat(node: Node, table: LabelTable) -> Value:
    """`repeat(x, times)`, `tile(x, times)`: a repeated dimension holds its labels several times.

    Copies of an index are as those of `expand`.
    """
    x, times = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(times, (list, tuple))
    value = table.value(x)
    counts = [*[1] * (len(value.dims) - len(times)), *times]
    lead = len(counts) - len(value.dims)
    dims: Dims = [None] * lead
    for labels, count in zip(value.dims, counts[lead:], strict=True):
        if labels is not None and not isinstance(count, int):
            raise NotImplementedError
        dims.append(np.tile(labels, count) if labels is not None else None)
    return _with_copies(node, table, Value(dims, value.vanishes))


def repeat_interleave(node: Node, table: LabelTable) -> Value:
    """`repeat_interleave(x, count, dim)`: every index stands `count` times, one after another."""
    x, count, dim = node.args[0], argument(node, 1, "repeats"), argument(node, 2, "dim")
    assert isinstance(x, Node)
    value = table.value(x)
    if not isinstance(count, int) or not isinstance(dim, int) or argument(node, 3, "output_size") is not None:
        raise NotImplementedError
    dims = list(value.dims)
    labels = dims[dim]
    dims[dim] = np.repeat(labels, count) if labels is not None else None
    return Value(dims, value.vanishes)


def flip(node: Node, table: LabelTable) -> Value:
    """`flip(x, dims)`: labels are reversed."""
    x, flipped = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(flipped, (list, tuple))
    value = table.value(x)
    dims = list(value.dims)
    for d in flipped:
        labels = dims[int(d)]  # type: ignore[arg-type]
        dims[int(d)] = labels[::-1] if labels is not None else None  # type: ignore[arg-type]
    return Value(dims, value.vanishes)


def glu(node: Node, table: LabelTable) -> Value:
    """`glu(x, dim)`: the two halves of a dimension are multiplied, so they go together."""
    x = node.args[0]
    assert isinstance(x, Node)
    value = table.value(x)
    dim = int(argument(node, 1, "dim", -1)) % len(value.dims)
    dims = list(value.dims)
    labels = dims[dim]
    if labels is not None:
        half = len(labels) // 2
        joined = table.join(labels[:half], labels[half:], node)
        dims[dim] = table.at_least_two(joined, node)
    return Value(dims, value.vanishes)


def pad(node: Node, table: LabelTable) -> Value:
    """`pad(x, amounts)`: padded dimensions stay, the others pass through."""
    x = node.args[0]
    assert isinstance(x, Node)
    value = table.value(x)
    amounts = node.args[1]
    assert isinstance(amounts, (list, tuple))
    padded = {len(value.dims) - 1 - k // 2 for k, amount in enumerate(amounts) if amount != 0}
    for d in padded:
        table.pin(value.dims[d], "padded", node)
    dims = [None if d in padded else labels for d, labels in enumerate(value.dims)]
    fill = argument(node, 3 if str(node.target).startswith("aten.pad") else 2, "value", 0)
    return Value(dims, value.vanishes and fill in (None, 0, 0.0))


def numeric(size: int | torch.SymInt) -> int:
    """Return a size with `PRIME` in the place of a symbolic batch."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr.subs(dict.fromkeys(expr.free_symbols, PRIME)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "flatten", "unflatten"], reshape),
    "permute": permute,
    **dict.fromkeys(["transpose", "swapaxes"], transpose),
    "t": matrix_transpose,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "cat": cat,
    "stack": stack,
    "roll": roll,
    "flip": flip,
    **dict.fromkeys(["repeat", "tile"], repeat),
    "repeat_interleave": repeat_interleave,
    "glu": glu,
    **dict.fromkeys(["pad", "constant_pad_nd"], pad),
}
