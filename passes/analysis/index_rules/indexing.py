"""Operators that read or write at indices that a tensor holds: indexed dimensions stay, the others pass through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from slrc.ir.nodes import argument
from slrc.passes.analysis.index_rules.table import Dims, LabelTable, Rule, Value, is_one, shape_of, tensor_args


def index(node: Node, table: LabelTable) -> Value:
    """`x[:, i, …, j]` with index tensors: indexed dimensions stay, the others pass through.

    What the index tensors broadcast to stands where the first of them did, or in front if they are not side by side.
    """
    x, indices = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(indices, (list, tuple))
    value = table.value(x)
    return Value(_indexed(node, table, value, indices)[0], value.vanishes)


def _indexed(node: Node, table: LabelTable, value: Value, indices: Sequence[object]) -> tuple[Dims, slice]:
    """Pin the dimensions that index tensors index; return the labels of what they choose, and where theirs stand."""
    given = [i for i in indices if isinstance(i, Node)]
    at = [d for d, i in enumerate(indices) if isinstance(i, Node)]
    if not at or any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in given):
        raise NotImplementedError  # a mask, which may stand for several dimensions
    for i in given:
        table.pin_all(table.value(i), "used as an index", node)
    for d in at:
        table.pin(value.dims[d], "indexed", node)
    rest = [labels for d, labels in enumerate(value.dims) if d not in at]
    side_by_side = at == list(range(at[0], at[-1] + 1))
    before = at[0] if side_by_side else 0
    count = max(len(shape_of(i)) for i in given)
    return [*rest[:before], *[None] * count, *rest[before:]], slice(before, before + count)


def index_put(node: Node, table: LabelTable) -> Value:
    """`index_put(x, [i, …, j], values)`: `x` with `values`, broadcast to `x[i, …, j]`, put there or added."""
    x, indices, values = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(indices, (list, tuple))
    assert isinstance(values, Node)
    value, given = table.value(x), table.value(values)
    chosen, block = _indexed(node, table, value, indices)
    lead = len(chosen) - len(given.dims)
    written: Dims = [*[None] * lead, *given.dims]
    repeated = [*[True] * lead, *(is_one(size) for size in shape_of(values))]
    joined = [
        own if again else table.join_if_labelled(own, new, node)
        for own, new, again in zip(chosen, written, repeated, strict=True)
    ]
    # What is put everywhere along a removable dimension is not zero where that dimension has lost an index.
    everywhere = any(again and own is not None for own, again in zip(chosen, repeated, strict=True))
    del joined[block]
    passed = iter(joined)
    dims = [None if d < len(indices) and indices[d] is not None else next(passed) for d in range(len(value.dims))]
    return Value(dims, value.vanishes and given.vanishes and not everywhere)


def gather(node: Node, table: LabelTable) -> Value:
    """`gather(x, dim, i)`: `out[…, p, …] = x[…, i[…, p, …], …]`; other dimensions are those of `x` and `i` alike."""
    x, dim, indices = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    assert isinstance(indices, Node)
    return Value(_aligned(node, table, [x, indices], dim), table.value(x).vanishes)


def scatter(node: Node, table: LabelTable) -> Value:
    """`scatter(x, dim, i, source)`, `scatter_add` and `scatter_reduce`: `x` with the source written where `i` says."""
    x, dim, indices = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    assert isinstance(indices, Node)
    source = argument(node, 3, "value" if "value" in str(node.target) else "src")
    tensors = [x, indices, *([source] if isinstance(source, Node) else [])]
    zero = table.value(source).vanishes if isinstance(source, Node) else source == 0
    return Value(_aligned(node, table, tensors, dim), table.value(x).vanishes and zero)


def _aligned(node: Node, table: LabelTable, tensors: Sequence[Node], dim: int) -> Dims:
    """Pin a dimension along which is indexed, and join the others of tensors of one rank, index by index."""
    dims: Dims = []
    rank = len(table.dims(tensors[0]))
    for d, met in enumerate(zip(*(table.dims(t) for t in tensors), strict=True)):
        if d == dim % rank:
            for labels in met:
                table.pin(labels, "indexed", node)
            dims.append(None)
            continue
        merged = met[0]
        for labels in met[1:]:
            merged = table.join_if_labelled(merged, labels, node)
        dims.append(merged)
    return dims


def index_select(node: Node, table: LabelTable) -> Value:
    """`index_select(x, dim, i)`: the indexed dimension stays."""
    x, dim, indices = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    assert isinstance(indices, Node)
    value = table.value(x)
    dim %= len(value.dims)
    table.pin_all(table.value(indices), "used as an index", node)
    table.pin(value.dims[dim], "indexed", node)
    return Value([*value.dims[:dim], None, *value.dims[dim + 1 :]], value.vanishes)


def embedding(node: Node, table: LabelTable) -> Value:
    """`embedding(w (v, d), i (…)) -> (…, d)`: a row for each index, so that the rows stay."""
    weight, indices = tensor_args(node)[:2]
    table.pin_all(table.value(indices), "used as an index", node)
    rows, width = table.dims(weight)
    table.pin(rows, "indexed", node)
    return Value([*[None] * len(shape_of(indices)), width], table.value(weight).vanishes)


RULES: dict[str, Rule] = {
    "index": index,
    "index_put": index_put,
    "index_select": index_select,
    "gather": gather,
    **dict.fromkeys(["scatter", "scatter_add", "scatter_reduce"], scatter),
    "embedding": embedding,
}
