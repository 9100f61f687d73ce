"""Normalisation layers."""

from __future__ import annotations

from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.table import Dims, LabelTable, Rule, Value
from slrc.sparsity.choices import LayerNorm


def batch_norm(node: Node, table: LabelTable) -> Value | list[Value]:
    """`batch_norm(x (n, c, …), scale, shift, mean, var)`: all go with their channel."""
    x = node.args[0]
    assert isinstance(x, Node)
    dims = table.dims(x)
    given = _join_parameters(node, table, dims, first=1)
    affine = len(given) >= 2 and all(table.value(p).vanishes for p in given[:2])
    result = Value(dims, vanishes=affine and all(d is None for d in (dims[0], *dims[2:])))
    outputs = node.meta["val"]
    if not isinstance(outputs, (tuple, list)):
        return result
    return [result, *(Value([None] * t.dim()) for t in outputs[1:])]


def batch_statistics(node: Node, table: LabelTable) -> Value | list[Value]:
    """`batch_norm` by the statistics of its own input: channels pass through, all else is mixed."""
    x = node.args[0]
    assert isinstance(x, Node)
    for labels in (table.dims(x)[0], *table.dims(x)[2:]):
        table.pin(labels, "normalised over by batch_norm", node)
    return batch_norm(node, table)


def _join_parameters(node: Node, table: LabelTable, dims: Dims, first: int) -> list[Node]:
    """Join scale, shift and statistics, the operands from `first` on, with their channel; return them."""
    given = [a for a in node.args[first:5] if isinstance(a, Node)]
    for parameter in given:
        table.join(dims[1], table.dims(parameter)[0], node)
    return given


def layer_norm(node: Node, table: LabelTable) -> Value:
    """`layer_norm(x, shape, scale, shift)`, `rms_norm(x, shape, scale)`: statistics see every index, so those stay.

    Unless `LayerNorm.NARROW` is chosen: zeros at removed indices of the last dimension are known to the statistics by
    their number alone.
    """
    x, shape = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(shape, (list, tuple))
    value = table.value(x)
    dims = value.dims
    scale = argument(node, 2, "weight")
    shift = argument(node, 3, "bias") if op_name(node) == "layer_norm" else None
    for parameter in [a for a in (scale, shift) if a is not None]:
        for d, labels in enumerate(reversed(table.dims(parameter)), start=1):
            table.join(dims[-d], labels, node)
    if table.layer_norm is LayerNorm.NARROW and len(shape) == 1 and value.vanishes:
        return Value(dims, _stays_zero(node, table, scale, shift))
    where = " where removed indices are not zero" if table.layer_norm is LayerNorm.NARROW and len(shape) == 1 else ""
    for labels in dims[len(dims) - len(shape) :]:
        table.pin(labels, f"normalised over by {op_name(node)}{where}", node)
    return Value(dims, vanishes=False)


def _stays_zero(node: Node, table: LabelTable, scale: Node | None, shift: Node | None) -> bool:
    """Whether zeros that are normalised stay zero.

    A layer norm subtracts the mean from them, which only a zero in the scale undoes; it adds the shift, which is zero
    at removed places of the last dimension, not at those of the others.
    """
    x = node.args[0]
    assert isinstance(x, Node)
    if shift is not None and (any(d is not None for d in table.dims(x)[:-1]) or not table.value(shift).vanishes):
        return False
    return op_name(node) == "rms_norm" or (scale is not None and table.value(scale).vanishes)


def group_norm(node: Node, table: LabelTable) -> Value:
    """`group_norm(x (n, c, …), groups, scale, shift)`: a group is normalised by itself, so whole groups go."""
    x, groups = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(groups, int)
    dims = table.dims(x)
    if dims[1] is not None:
        table.join_rows(dims[1].reshape(groups, -1))
    given = _join_parameters(node, table, dims, first=2)
    for spatial in dims[2:]:
        table.pin(spatial, "normalised over by group_norm", node)
    zero = len(given) == 2 and all(table.value(p).vanishes for p in given) and dims[0] is None
    return Value([dims[0], dims[1], *[None] * (len(dims) - 2)], zero)


def instance_norm(node: Node, table: LabelTable) -> Value:
    """`instance_norm(x (n, c, …), scale, shift, …)`: every channel is normalised by itself."""
    x = node.args[0]
    assert isinstance(x, Node)
    dims = table.dims(x)
    given = _join_parameters(node, table, dims, first=1)
    for spatial in dims[2:]:
        table.pin(spatial, "normalised over by instance_norm", node)
    zero = all(table.value(p).vanishes for p in given) and table.value(x).vanishes and dims[0] is None
    return Value([dims[0], dims[1], *[None] * (len(dims) - 2)], zero)


RULES: dict[str, Rule] = {
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "_native_batch_norm_legit": batch_statistics,
    **dict.fromkeys(["layer_norm", "rms_norm"], layer_norm),
}
