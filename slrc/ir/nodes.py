"""What is asked of an operator of the graph: its name, its weight, its shape and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
WEIGHTED = CONVOLUTIONS | TRANSPOSED | {"linear"}
PACKED = {"block_sparse_conv": (1,), "block_sparse_gemm": (1,), "block_sparse_mlp": (1, 5)}
"""Operators of slrc, see `slrc.forms.packed_ops`, and which of their inputs are values of packed weights."""
MATMULS = frozenset({"matmul", "bmm", "mm"})


def op_name(node: Node) -> str:
    """Return an operator's bare name: `conv2d` for `aten.conv2d.default`; empty for inputs, tensors and the output."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def layer_weight(node: Node) -> str | None:
    """Return the name of the weight if `node` is a convolution or linear layer with a parameter as its weight."""
    if op_name(node) not in WEIGHTED or len(node.args) < 2:
        return None
    weight = node.args[1]
    if isinstance(weight, Node) and weight.op == "get_attr":
        return str(weight.target)
    return None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an operator's argument, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def conv_groups(node: Node) -> int:
    """Return a convolution's number of groups; 1 for other operators."""
    name = op_name(node)
    position = 8 if name == "convolution" else 6
    return int(argument(node, position, "groups", 1)) if name in CONVOLUTIONS | TRANSPOSED else 1


def pair(value: object) -> list[int]:
    """Return both of a window's sizes, which may be given as one."""
    sizes = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return [int(size) for size in (sizes * 2)[:2]]


def conv_window(node: Node) -> list[list[int]]:
    """Return the strides, the padding and the dilations of a `conv2d` whose padding is numbers."""
    window = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    return [pair(argument(node, position, name, default)) for position, name, default in window]


def is_transposed(node: Node) -> bool:
    """Return whether a convolution is transposed, so that its weight is `(in, out/groups, *kernel)`."""
    return op_name(node) in TRANSPOSED or (op_name(node) == "convolution" and bool(node.args[6]))


def output_dim(layer: Node) -> int:
    """Return which dimension of a layer's weight numbers its outputs; of transposed convolutions in groups, the first.

    The other of the first two numbers the inputs.
    """
    return 1 if is_transposed(layer) and conv_groups(layer) == 1 else 0


def concrete(size: int | torch.SymInt) -> int:
    """Return a size with every symbolic dimension (the batch) counted as 1, and parts of it as 1 at least."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    try:
        return max(1, int(expr.subs(dict.fromkeys(expr.free_symbols, 1))))
    except (ZeroDivisionError, TypeError):  # frames folded into the batch: `s // (s // 8)`
        return int(size.node.hint or 1)


def is_free(size: int | torch.SymInt) -> bool:
    """Whether a size may vary: a model that fixes its batch leaves a symbol that equals a constant."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def node_shape(node: Node) -> list[int]:
    """Return the sizes of a single-tensor value, a symbolic batch counted as 1."""
    return [concrete(s) for s in node.meta["val"].shape]


def node_macs(node: Node, shape_of: Callable[[Node], list[int]] = node_shape) -> int:
    """Return the multiply-accumulates of one operator; `shape_of` says how large its value and operands are."""
    name = op_name(node)
    if not isinstance(node.meta.get("val"), Tensor):
        return 0
    out = math.prod(shape_of(node))
    operands = [a for a in node.args[:2] if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]
    shape = [shape_of(a) for a in operands]
    if name in TRANSPOSED or (name == "convolution" and node.args[6]):
        return math.prod(shape[0]) * math.prod(shape[1][1:])
    if name in CONVOLUTIONS or name == "linear":
        return out * math.prod(shape[1][1:])
    if name in MATMULS:
        return out * shape[0][-1]
    if name in PACKED:
        packed = [node.args[k] for k in PACKED[name]]
        values = sum(int(a.meta["val"].numel()) for a in packed if isinstance(a, Node))
        return out // shape_of(node)[1 if name == "block_sparse_conv" else -1] * values
    if name == "addmm":
        return out * shape[1][-1]
    if name == "scaled_dot_product_attention":
        return (math.prod(shape[0]) + out) * shape[1][-2]
    return 0
