"""The table that rules write to: labels of values, joins, pins and roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from slrc.passes.analysis.index_rules.union_find import UnionFind
from slrc.sparsity.choices import Attention, LayerNorm

Labels = NDArray[np.int64] | None
"""The labels of one dimension, one for each index; `None` where nothing can be removed."""
Dims = list[Labels]
"""The labels of every dimension of a tensor."""


@dataclass
class Value:
    """What is known of one tensor in the graph.

    `vanishes`: at removed indices of every labelled dimension the masked program holds zeros, so that a product with
    them adds nothing.
    """

    dims: Dims
    vanishes: bool = True


Rule = Callable[[Node, "LabelTable"], "Value | list[Value]"]


@dataclass
class Pin:
    """Labels that must stay, with the reason and the node that asks for it."""

    labels: NDArray[np.int64]
    reason: str
    node: Node


@dataclass
class LabelTable:
    """Labels of all values of a graph while rules run over it."""

    attention: Attention = Attention.HEADS
    layer_norm: LayerNorm = LayerNorm.KEEP
    union: UnionFind = field(default_factory=UnionFind)
    values: dict[Node, Value | list[Value]] = field(default_factory=dict)
    tensors: dict[str, Dims] = field(default_factory=dict)
    consumer_dims: set[tuple[str, int]] = field(default_factory=set)
    pins: list[Pin] = field(default_factory=list)
    parts: list[NDArray[np.int64]] = field(default_factory=list)
    """Labels of what was split off: units of different parts are not interchangeable, or a part could lose them all."""

    def value(self, node: Node) -> Value:
        """Return the labels of a single-tensor value; unlabelled for scalars."""
        value = self.values.get(node)
        return value if isinstance(value, Value) else Value([])

    def dims(self, node: Node) -> Dims:
        """Return the labels of a value's dimensions."""
        return self.value(node).dims

    def pin(self, labels: Labels, reason: str, node: Node) -> None:
        """Let nothing be removed at these labels."""
        if labels is not None and labels.size:
            self.pins.append(Pin(labels.reshape(-1), reason, node))

    def at_least_two(self, labels: Labels, node: Node) -> Labels:
        """Return the labels of a dimension; one of a single index would vanish with it, so that it stays."""
        if labels is None or len(labels) > 1:
            return labels
        self.pin(labels, "a part with one index only", node)
        return None

    def pin_all(self, value: Value | list[Value], reason: str, node: Node) -> None:
        """Pin every dimension of a value."""
        for one in value if isinstance(value, list) else [value]:
            for labels in one.dims:
                self.pin(labels, reason, node)

    def join(self, a: Labels, b: Labels, node: Node) -> Labels:
        """Make two dimensions one, index by index. Where one has no labels, the other is pinned."""
        if a is None or b is None or a.size != b.size:
            self.pin(a, f"meets a fixed size in {_operator(node)}", node)
            self.pin(b, f"meets a fixed size in {_operator(node)}", node)
            return None
        self.union.join(a, b)
        return a

    def join_if_labelled(self, a: Labels, b: Labels, node: Node) -> Labels:
        """Like `join`, for dimensions of which neither may have labels."""
        return None if a is None and b is None else self.join(a, b, node)

    def contract(self, labels: Labels, operands: Sequence[Value], node: Node) -> None:
        """Let a dimension be summed over in a product: a removed index must add nothing, so one side must be zero."""
        if not any(operand.vanishes for operand in operands):
            self.pin(labels, "summed over where removed indices are not zero", node)

    def join_rows(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """Join all labels of each row of a 2-d array; return the first column."""
        for column in table.T[1:]:
            self.union.join(table[:, 0], column)
        return table[:, 0].copy()

    def consume(self, weight: Node, dim: int) -> None:
        """Say that a dimension of a weight is summed over: its slices follow their unit and are not scored."""
        self.consumer_dims.add((str(weight.target), dim))

    def broadcast(self, node: Node, operands: Sequence[Node]) -> Dims:
        """Join operands index by index under broadcasting; return the labels of the result."""
        out = shape_of(node)
        result: Dims = []
        for d in range(len(out)):
            met: list[Labels] = []
            for operand in operands:
                shape = shape_of(operand)
                k = d - (len(out) - len(shape))
                if k >= 0 and not (is_one(shape[k]) and not is_one(out[d])):
                    met.append(self.dims(operand)[k])
            merged = met[0] if met else None
            for labels in met[1:]:
                merged = self.join_if_labelled(merged, labels, node)
            result.append(merged)
        return result


def covers(operand: Value, result: Dims) -> bool:
    """Return whether an operand has labels of its own wherever the broadcast result has: it is not repeated there."""
    dims: Dims = [*[None] * (len(result) - len(operand.dims)), *operand.dims]
    return all(own is not None for own, labels in zip(dims, result, strict=True) if labels is not None)


def shape_of(node: Node) -> list[int]:
    """Return a value's sizes; symbolic ones stay symbolic."""
    return list(node.meta["val"].shape)


def is_one(size: object) -> bool:
    """Return whether a size is the constant 1."""
    return isinstance(size, int) and size == 1


def tensor_args(node: Node) -> list[Node]:
    """Return the positional arguments that are tensors."""
    return [a for a in node.args if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]


def _operator(node: Node) -> str:
    return str(node.target).removeprefix("aten.")
