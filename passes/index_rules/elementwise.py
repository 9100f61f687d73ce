"""Operators that act on each element: labels pass through, operands join index by index."""

from __future__ import annotations

from torch.fx import Node

from slrc.passes.index_rules.table import LabelTable, Rule, Value, tensor_args

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
    """`hardtanh` and `clamp` keep zero if it lies within the bounds."""
    x = table.value(tensor_args(node)[0])
    bounds = [b for b in node.args[1:3] if isinstance(b, (int, float))]
    low = bounds[0] if bounds else 0
    high = bounds[1] if len(bounds) > 1 else 0
    return Value(x.dims, x.vanishes and low <= 0 <= max(high, 0))


def prelu(node: Node, table: LabelTable) -> Value:
    """`prelu(x, weight)`: one slope a channel, or one for all."""
    x, weight = (table.value(a) for a in tensor_args(node)[:2])
    if weight.dims and weight.dims[0] is not None:
        table.join(x.dims[1], weight.dims[0], node)
    return x


def add(node: Node, table: LabelTable) -> Value:
    """`a + b`, `a - b`, `max(a, b)`: zero where both are."""
    operands = tensor_args(node)
    vanishes = all(table.value(a).vanishes for a in operands) and len(operands) > 1
    return Value(table.broadcast(node, operands), vanishes)


def multiply(node: Node, table: LabelTable) -> Value:
    """`a · b`: zero where either is, if that one has the dimension."""
    operands = tensor_args(node)
    dims = table.broadcast(node, operands)
    labelled = [a for a in operands if any(d is not None for d in table.dims(a))]
    return Value(dims, any(table.value(a).vanishes for a in labelled) or len(operands) == 1)


def divide(node: Node, table: LabelTable) -> Value:
    """`a / b`: zero where `a` is, provided that `b` is not."""
    operands = tensor_args(node)
    dims = table.broadcast(node, operands)
    divisor_is_plain = len(operands) == 1 or all(d is None for d in table.dims(operands[1]))
    return Value(dims, divisor_is_plain and table.value(operands[0]).vanishes)


def other_binary(node: Node, table: LabelTable) -> Value:
    """Comparisons, powers, selections: labels join, zeros are not relied on."""
    return Value(table.broadcast(node, tensor_args(node)), vanishes=False)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ZERO_TO_ZERO, zero_to_zero),
    **dict.fromkeys(ZERO_TO_OTHER, zero_to_other),
    **dict.fromkeys(["hardtanh", "clamp"], clamp),
    "prelu": prelu,
    **dict.fromkeys(["add", "sub", "maximum", "minimum"], add),
    "mul": multiply,
    "div": divide,
    **dict.fromkeys(["pow", "eq", "ne", "gt", "lt", "ge", "le", "where", "rsub", "masked_fill"], other_binary),
}
