"""Operators that make tensors of one value: where such a dimension meets a removable one, it shrinks with it."""

from __future__ import annotations

from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.table import LabelTable, Rule, Value, shape_of, tensor_args

SIZE_POSITION = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}
"""Where each operator takes the sizes of its result."""
FILLS = {"zeros": 0, "ones": 1, "new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1, "zero": 0}
FILL_POSITION = {"full": 1, "new_full": 2, "full_like": 1, "fill": 1}


def of_a_size(node: Node, table: LabelTable) -> Value:
    """`zeros(sizes)`, `new_full(x, sizes, value)`: every index is like the others, so that each may go."""
    dims = [table.union.new(n) if isinstance(n, int) and n > 1 else None for n in shape_of(node)]
    return Value(dims, _is_zero(node))


def like_another(node: Node, table: LabelTable) -> Value:
    """`zeros_like(x)`, `fill(x, value)`: the labels of the tensor that it is like."""
    return Value(table.dims(tensor_args(node)[0]), _is_zero(node))


def _is_zero(node: Node) -> bool:
    name = op_name(node)
    fill = FILLS[name] if name in FILLS else argument(node, FILL_POSITION.get(name, 1), "fill_value")
    return isinstance(fill, (int, float)) and fill == 0


RULES: dict[str, Rule] = {
    **dict.fromkeys(SIZE_POSITION, of_a_size),
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like", "zero", "fill"], like_another),
}
