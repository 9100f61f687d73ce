"""Take the largest of many values before what would be computed on each of them and keeps their order."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from slrc.ir.nodes import argument, node_shape, op_name
from slrc.ir.program import Program
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import call_before, layer_bias, only_user

aten = torch.ops.aten
RISING = ("relu", "relu6", "hardtanh", "clamp")
"""Operators, with numbers for bounds, under which no value overtakes a larger one."""


@dataclass(frozen=True)
class MaximumFirst(Transform):
    """Move a maximum over a dimension before the bias and the activation that its values pass through.

    `max relu(x·W + b) = relu((max x·W) + b)`, to the last bit: a bias and ReLU, ReLU6 or `clamp` never let a value
    overtake a larger one, and rounding does not either. A network on the points of a pillar, PointNet's (Qi et al.,
    arXiv 1612.00593), then adds its bias to one value for each feature of a pillar, not to one for each point.

    1. The maximum is `amax` or the values of `max(dim)`, whose indices nothing reads.
    2. A `linear`'s bias goes with it unless the maximum is over the features.
    3. Nothing else reads what comes between.

        linear(x, W, b) ─▶ relu ─▶ amax          linear(x, W) ─▶ amax ─▶ add b ─▶ relu
    """

    name: ClassVar[str] = "maximum-first"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with its maxima moved."""
        return PassResult(*program.rewrite(_move_all))


def _move_all(module: GraphModule) -> bool:
    module.graph.eliminate_dead_code()  # indices that nothing reads
    return sum(_move(node) for node in list(module.graph.nodes) if _is_maximum(node)) > 0


def _is_maximum(node: Node) -> bool:
    if node.target is aten.max.dim:
        return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return node.target is aten.amax.default and bool(argument(node, 1, "dim", []))


def _move(maximum: Node) -> bool:
    """Move one maximum; returns whether there was anything to move it before."""
    between: list[Node] = []
    value = maximum.args[0]
    while isinstance(value, Node) and only_user(value) is not None and _is_rising(value):
        between.append(value)
        value = value.args[0]
    if not isinstance(value, Node):
        return False
    bias = layer_bias(value) if only_user(value) is not None and _adds_alike(value, maximum) else None
    if not between and bias is None:
        return False
    if bias is not None:
        value = call_before(maximum, value.target, *value.args[:2])  # type: ignore[arg-type]
    result = call_before(maximum, maximum.target, value, *maximum.args[1:])  # type: ignore[arg-type]
    ends = [maximum]
    if maximum.target is aten.max.dim:
        ends = list(maximum.users)
        with maximum.graph.inserting_before(maximum):
            result = maximum.graph.call_function(operator.getitem, (result, 0))
    if bias is not None:
        result = call_before(maximum, aten.add.Tensor, result, bias)
    for step in reversed(between):
        result = call_before(maximum, step.target, result, *step.args[1:])  # type: ignore[arg-type]
    for end in ends:
        end.replace_all_uses_with(result)
    return True


def _is_rising(node: Node) -> bool:
    return op_name(node) in RISING and not any(isinstance(bound, Node) for bound in node.args[1:])


def _adds_alike(layer: Node, maximum: Node) -> bool:
    """Tell whether a layer adds the same bias to all values of which the maximum takes the largest."""
    bias = layer_bias(layer) if op_name(layer) == "linear" else None
    if bias is None or bias.op != "get_attr":
        return False
    dims = argument(maximum, 1, "dim", [])
    rank = len(node_shape(layer))
    return all(dim % rank != rank - 1 for dim in ([dims] if isinstance(dims, int) else dims))  # type: ignore[union-attr]
