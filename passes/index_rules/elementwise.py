"""Operators that act on each element: labels pass through, operands join index by index."""

from __future__ import annotations

from torch.fx import Node

from slrc.passes.index_rules.table import LabelTable, Rule, Value, covers, tensor_args
from slrc.program import argument

ZERO_TO_ZERO = [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "tanh",
    "tan",
    "sin",
    "sinh",
    "asin",
    "atan",
    "erf",
    "neg",
    "abs",
    "sqrt",
    "square",
    "sign",
    "round",
    "floor",
    "ceil",
    "trunc",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "clone",
    "alias",
    "contiguous",
    "detach",
    "_to_copy",
    "type_as",
    "to",
    "lift_fresh_copy",
    "softsign",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "expm1",
    "log1p",
    "real",
]
ZERO_TO_OTHER = [
    "sigmoid",
    "hardsigmoid",
    "log_sigmoid",
    "exp",
    "exp2",
    "cos",
    "cosh",
    "log",
    "log2",
    "rsqrt",
    "reciprocal",
    "softplus",
    "bitwise_not",
    "logical_not",
]


def zero_to_zero(node: Node, table: LabelTable) -> Value:
    """`y = f(x)` with `f(0) = 0`."""
    return table.value(tensor_args(node)[0])


def zero_to_other(node: Node, table: LabelTable) -> Value:
    """`y = f(x)` with `f(0) ≠ 0`: what was zero is so no longer."""
    return Value(table.dims(tensor_args(node)[0]), vanishes=False)


def clamp(node: Node, table: LabelTable) -> Value:
    """`hardtanh` and `clamp` keep zero if it lies within the bounds; bounds that are tensors join."""
    low, high = (argument(node, k, name) for k, name in ((1, "min"), (2, "max")))
    operands = [a for a in (node.args[0], low, high) if isinstance(a, Node)]
    if len(operands) > 1:
        return Value(table.broadcast(node, operands), vanishes=False)
    x = table.value(operands[0])
    return Value(x.dims, x.vanishes and (low is None or low <= 0) and (high is None or high >= 0))


def prelu(node: Node, table: LabelTable) -> Value:
    """`prelu(x, weight)`: one slope a channel, or one for all."""
    x, weight = (table.value(a) for a in tensor_args(node)[:2])
    if weight.dims and weight.dims[0] is not None:
        table.join(x.dims[1], weight.dims[0], node)
    return x


def add(node: Node, table: LabelTable) -> Value:
    """`a + b`, `a - b`, `max(a, b)`: zero where both are."""
    operands = tensor_args(node)
    dims = table.broadcast(node, operands)
    zero = [table.value(a).vanishes and covers(table.value(a), dims) for a in operands]
    return Value(dims, all(zero) and len(operands) > 1)


def multiply(node: Node, table: LabelTable) -> Value:
    """`a · b`: zero where either is, if that one has all the labelled dimensions."""
    operands = [table.value(a) for a in tensor_args(node)]
    dims = table.broadcast(node, tensor_args(node))
    return Value(dims, any(a.vanishes and covers(a, dims) for a in operands))


def divide(node: Node, table: LabelTable) -> Value:
    """`a / b`: zero where `a` is, provided that `b` is not."""
    operands = tensor_args(node)
    dims, dividend = table.broadcast(node, operands), table.value(operands[0])
    divisor_is_plain = len(operands) == 1 or all(d is None for d in table.dims(operands[1]))
    return Value(dims, divisor_is_plain and dividend.vanishes and covers(dividend, dims))


def other_binary(node: Node, table: LabelTable) -> Value:
    """Comparisons, powers, selections: labels join, zeros are not relied on."""
    return Value(table.broadcast(node, tensor_args(node)), vanishes=False)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ZERO_TO_ZERO, zero_to_zero),
    **dict.fromkeys(ZERO_TO_OTHER, zero_to_other),
    **dict.fromkeys(["hardtanh", "clamp", "clamp_min"], clamp),
    "prelu": prelu,
    **dict.fromkeys(["add", "sub", "maximum", "minimum"], add),
    "mul": multiply,
    "div": divide,
    **dict.fromkeys(["pow", "eq", "ne", "gt", "lt", "ge", "le", "where", "rsub", "masked_fill"], other_binary),
}
