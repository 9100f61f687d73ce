"""Operators that take parts of a dimension, or put parts into one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.elementwise import add
from slrc.passes.analysis.index_rules.table import Dims, Labels, LabelTable, Rule, Value, is_one, shape_of, tensor_args


def split(node: Node, table: LabelTable) -> list[Value]:
    """`split(x, sizes, dim)` and `chunk`: each part takes its labels."""
    x, outputs = node.args[0], node.meta["val"]
    assert isinstance(x, Node)
    value = table.value(x)
    dim = int(argument(node, 2, "dim", 0)) % len(value.dims)
    parts, start = [], 0
    for part in outputs:
        labels = value.dims[dim]
        stop = start + part.shape[dim] if labels is not None else start
        dims = list(value.dims)
        dims[dim] = _part(labels[start:stop], node, table) if labels is not None else None
        parts.append(Value(dims, value.vanishes))
        start = stop
    return parts


def slice_(node: Node, table: LabelTable) -> Value:
    """`slice(x, dim, start, end, step)`."""
    x = node.args[0]
    assert isinstance(x, Node)
    value = table.value(x)
    dim = int(argument(node, 1, "dim", 0)) % len(value.dims)
    dims = list(value.dims)
    labels = dims[dim]
    if labels is not None:
        dims[dim] = _part(labels[_bounds(node, 2)], node, table)
    return Value(dims, value.vanishes)


def slice_scatter(node: Node, table: LabelTable) -> Value:
    """`slice_scatter(x, part, dim, start, end, step)`: `x` with a part of it replaced."""
    x, part = tensor_args(node)[:2]
    value, inserted = table.value(x), table.value(part)
    dim = int(argument(node, 2, "dim", 0)) % len(value.dims)
    dims: Dims = []
    for d, (own, given) in enumerate(zip(value.dims, inserted.dims, strict=True)):
        if d != dim:
            dims.append(table.join_if_labelled(own, given, node))
            continue
        if own is None and not is_one(shape_of(x)[d]):
            own = _fixed(shape_of(x)[d], given, node, table)
        if own is not None:
            replaced = _part(own[_bounds(node, 3)], node, table)
            table.join_if_labelled(replaced, given, node)
        dims.append(own)
    return Value(dims, value.vanishes and inserted.vanishes)


def select_scatter(node: Node, table: LabelTable) -> Value:
    """`select_scatter(x, part, dim, index)`: names an index, so that the dimension stays."""
    x, part = tensor_args(node)[:2]
    value, inserted = table.value(x), table.value(part)
    dim = int(argument(node, 2, "dim", 0)) % len(value.dims)
    table.pin(value.dims[dim], "one index is selected", node)
    rest = [labels for d, labels in enumerate(value.dims) if d != dim]
    joined = [table.join_if_labelled(own, given, node) for own, given in zip(rest, inserted.dims, strict=True)]
    return Value([*joined[:dim], None, *joined[dim:]], value.vanishes and inserted.vanishes)


def _fixed(size: int, beside: Labels, node: Node, table: LabelTable) -> Labels:
    """Return pinned labels for a dimension of a fixed size of which a part is to join others."""
    if beside is None or not isinstance(size, int):
        table.pin(beside, "a part of a fixed size", node)
        return None
    labels = table.union.new(size)
    table.pin(labels, "a part of a fixed size", node)
    return labels


def _bounds(node: Node, position: int) -> slice:
    """Return the `start, end, step` that stand from `position` on, for a dimension with labels."""
    start, stop = (argument(node, position + k, name) for k, name in enumerate(("start", "end")))
    if argument(node, position + 2, "step", 1) != 1 or isinstance(start, Node) or isinstance(stop, Node):
        raise NotImplementedError
    return slice(start, stop)


def _part(labels: NDArray[np.int64], node: Node, table: LabelTable) -> Labels:
    """Return the labels of a part of a dimension."""
    if len(labels) > 1:
        table.parts.append(labels)
    return table.at_least_two(labels, node)


def select(node: Node, table: LabelTable) -> Value:
    """`select(x, dim, index)`: names an index, so that the dimension stays."""
    x = node.args[0]
    assert isinstance(x, Node)
    value = table.value(x)
    dim = int(argument(node, 1, "dim", 0)) % len(value.dims)
    table.pin(value.dims[dim], "one index is selected", node)
    return Value([labels for d, labels in enumerate(value.dims) if d != dim], value.vanishes)


def unbind(node: Node, table: LabelTable) -> list[Value]:
    """`unbind(x, dim)`: names every index, so that the dimension stays."""
    x, outputs = node.args[0], node.meta["val"]
    assert isinstance(x, Node)
    value = table.value(x)
    dim = int(argument(node, 1, "dim", 0)) % len(value.dims)
    table.pin(value.dims[dim], "unbound", node)
    rest = [labels for d, labels in enumerate(value.dims) if d != dim]
    return [Value(rest, value.vanishes) for _ in outputs]


def ordering(node: Node, table: LabelTable) -> Value | list[Value]:
    """`topk`, `sort`, `argmax` and the like along a dimension, which stays; the others pass through.

    All elements are compared where no dimension is given.
    """
    x = tensor_args(node)[0]
    value, outputs = table.value(x), node.meta["val"]
    rank, (position, default) = len(value.dims), _ORDERING[op_name(node)]
    asked = argument(node, position, "dim", default)
    asked = range(rank) if asked is None else [asked] if isinstance(asked, int) else asked
    compared = {int(d) % rank for d in asked}
    for d in compared:
        table.pin(value.dims[d], f"compared by {op_name(node)}", node)
    several = isinstance(outputs, (list, tuple))
    keeps_rank = (outputs[0] if several else outputs).dim() == rank
    dims = [None if d in compared else labels for d, labels in enumerate(value.dims) if keeps_rank or d not in compared]
    result = Value(dims, vanishes=False)
    return [result for _ in outputs] if several else result


def extremum(node: Node, table: LabelTable) -> Value | list[Value]:
    """`max` and `min`: of two tensors, along a dimension, or of all elements."""
    return add(node, table) if len(tensor_args(node)) > 1 else ordering(node, table)


_ORDERING: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(["topk", "kthvalue"], (2, -1)),
    **dict.fromkeys(["sort", "argsort", "mode"], (1, -1)),
    **dict.fromkeys(["max", "min", "median", "argmax", "argmin", "any", "all", "cummax", "cummin"], (1, None)),
}
"""Where each operator takes its dimension, and which it is if not given."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes"], split),
    "slice": slice_,
    "slice_scatter": slice_scatter,
    "select": select,
    "select_scatter": select_scatter,
    "unbind": unbind,
    **dict.fromkeys(_ORDERING, ordering),
    **dict.fromkeys(["max", "min"], extremum),
}
