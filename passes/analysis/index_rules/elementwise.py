"""Operators that act on each element: labels pass through, operands join index by index."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.table import LabelTable, Rule, Value, covers, tensor_args

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
    "asinh",
    "atanh",
    "erfinv",
    "deg2rad",
    "rad2deg",
    "sgn",
    "positive",
    "fix",
    "frac",
    "nan_to_num",
    "isnan",
    "isinf",
    "rrelu",
]
ZERO_TO_OTHER = [
    "sigmoid",
    "hardsigmoid",
    "log_sigmoid",
    "exp",
    "exp2",
    "cos",
    "cosh",
    "softplus",
    "bitwise_not",
    "logical_not",
    "acos",
    "acosh",
    "sinc",
    "erfc",
    "isfinite",
]
NO_VALUE_AT_ZERO = ["log", "log2", "log10", "logit", "rsqrt", "reciprocal", "lgamma", "digamma"]
BINARY = [
    "eq",
    "ne",
    "gt",
    "lt",
    "ge",
    "le",
    "rsub",
    "masked_fill",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "__and__",
    "__or__",
    "__xor__",
    "atan2",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "copysign",
    "xlogy",
    "fmax",
    "fmin",
]
"""Operators of two tensors, or of a tensor and a number."""


def zero_to_zero(node: Node, table: LabelTable) -> Value:
    """`y = f(x)` with `f(0) = 0`."""
    return table.value(tensor_args(node)[0])


def zero_to_other(node: Node, table: LabelTable) -> Value:
    """`y = f(x)` with `f(0) ≠ 0`: what was zero is so no longer."""
    return Value(table.dims(tensor_args(node)[0]), vanishes=False)


def no_value_at_zero(node: Node, table: LabelTable) -> Value:
    """`y = f(x)` with no finite `f(0)`: the masked model would compute infinity at removed indices, so they stay."""
    x = table.value(tensor_args(node)[0])
    _keep_from_zero(x, node, table)
    return Value(x.dims, vanishes=False)


def _keep_from_zero(x: Value, node: Node, table: LabelTable) -> None:
    if x.vanishes:
        table.pin_all(x, f"{op_name(node)} where removed indices are zero", node)


def clamp(node: Node, table: LabelTable) -> Value:
    """`hardtanh` and `clamp` keep zero if it lies within the bounds; bounds that are tensors join."""
    low, high = (argument(node, k, name) for k, name in ((1, "min"), (2, "max")))
    return _clamped(node, table, low, high)


def clamp_max(node: Node, table: LabelTable) -> Value:
    """`clamp_max(x, high)`."""
    return _clamped(node, table, None, argument(node, 1, "max"))


def _clamped(node: Node, table: LabelTable, low: Any, high: Any) -> Value:
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
    """`a / b`, or its remainder: zero where `a` is, provided that `b` is not."""
    operands = tensor_args(node)
    dims, dividend = table.broadcast(node, operands), table.value(operands[0])
    for divisor in operands[1:]:
        _keep_from_zero(table.value(divisor), node, table)
    divisor_is_plain = len(operands) == 1 or all(d is None for d in table.dims(operands[1]))
    return Value(dims, divisor_is_plain and dividend.vanishes and covers(dividend, dims))


def where(node: Node, table: LabelTable) -> Value:
    """`where(condition, a, b)`: zero where both are."""
    operands = tensor_args(node)
    dims = table.broadcast(node, operands)
    choices = [a for a in node.args[1:3] if isinstance(a, Node)]
    zero = [table.value(a).vanishes and covers(table.value(a), dims) for a in choices]
    return Value(dims, all(zero) and len(choices) == 2)


def power(node: Node, table: LabelTable) -> Value:
    """`x ** p`: zero where `x` is, for a positive number `p`."""
    if isinstance(node.args[0], Node) and isinstance(exponent := node.args[1], (int, float)):
        x = table.value(node.args[0])
        if exponent < 0:
            _keep_from_zero(x, node, table)
        return Value(x.dims, x.vanishes and bool(exponent > 0))
    return other_binary(node, table)


def threshold(node: Node, table: LabelTable) -> Value:
    """`threshold(x, bound, value)`: zero stays if it lies above the bound, or if zero is what takes its place."""
    x, bound, value = table.value(tensor_args(node)[0]), argument(node, 1, "threshold"), argument(node, 2, "value")
    return Value(x.dims, x.vanishes and (value == 0 or bound < 0))


def add_product(node: Node, table: LabelTable) -> Value:
    """`addcmul(x, a, b)`: `x + a · b`, zero where `x` is and `a` or `b`."""
    dims = table.broadcast(node, tensor_args(node))
    x, a, b = (table.value(t) for t in tensor_args(node)[:3])
    zero = [t.vanishes and covers(t, dims) for t in (x, a, b)]
    return Value(dims, zero[0] and (zero[1] or zero[2]))


def interpolate(node: Node, table: LabelTable) -> Value:
    """`lerp(a, b, weight)`: between `a` and `b`, zero where both are."""
    dims = table.broadcast(node, tensor_args(node))
    return Value(dims, all(table.value(t).vanishes and covers(table.value(t), dims) for t in tensor_args(node)[:2]))


def overwrite(node: Node, table: LabelTable) -> Value:
    """`copy(x, source)`: the source in the shape of `x`."""
    dims, source = table.broadcast(node, tensor_args(node)), table.value(tensor_args(node)[1])
    return Value(dims, source.vanishes and covers(source, dims))


def other_binary(node: Node, table: LabelTable) -> Value:
    """Comparisons, remainders and the like: labels join, zeros are not relied on."""
    return Value(table.broadcast(node, tensor_args(node)), vanishes=False)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ZERO_TO_ZERO, zero_to_zero),
    **dict.fromkeys(ZERO_TO_OTHER, zero_to_other),
    **dict.fromkeys(NO_VALUE_AT_ZERO, no_value_at_zero),
    **dict.fromkeys(BINARY, other_binary),
    **dict.fromkeys(["hardtanh", "clamp", "clip", "clamp_min"], clamp),
    "clamp_max": clamp_max,
    "prelu": prelu,
    **dict.fromkeys(["add", "sub", "maximum", "minimum"], add),
    "mul": multiply,
    **dict.fromkeys(["div", "floor_divide", "remainder", "fmod"], divide),
    "pow": power,
    "where": where,
    "threshold": threshold,
    "addcmul": add_product,
    "addcdiv": other_binary,
    "lerp": interpolate,
    "copy": overwrite,
}
