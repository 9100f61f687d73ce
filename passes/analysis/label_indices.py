"""Find what must be removed together.

Every index of every dimension of every tensor in the graph gets a label. Each operator's rule joins labels
(`index_rules`): a convolution joins its input's channels with its weight's inputs and gives its output the weight's
output labels, an addition joins both sides index by index, a view moves them. A class of joined labels
is one removable unit: a list of (tensor, dimension, index). Graph inputs and outputs, and whatever an operator
without a rule touches, are pinned.

    conv1.weight (8, 3, 3, 3) ─▶ batch_norm ─▶ relu ─▶ conv2.weight (16, 8, 3, 3)

    group conv1: 8 units; members conv1.weight[dim 0], bn1.weight, bn1.bias; followers conv2.weight[dim 1]

No operator is known by its module's type, so that a model needs no description of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from slrc.ir.nodes import op_name
from slrc.ir.program import Program
from slrc.ir.tracing import source_line
from slrc.passes.analysis.index_rules import RULES, Dims, LabelTable, Value
from slrc.sparsity.choices import Attention, LayerNorm
from slrc.sparsity.slices import Slice


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are interchangeable: each lies in the same dimensions of the same tensors.

    `members` are the producers' slices (rows of weights, biases, scales and shifts), which together own every element
    that a unit is made of; `followers` are the consumers' slices, which vanish with it.
    """

    name: str
    units: int
    members: tuple[Slice, ...]
    followers: tuple[Slice, ...]


@dataclass(frozen=True)
class PinnedChannels:
    """Why the outputs of a layer cannot be removed, and the user's source line that says so."""

    layer: str
    reason: str
    source: str


@dataclass(frozen=True)
class IndexLabels:
    """The result of the analysis.

    `tensors` and `values` hold the labels of parameters, buffers and the graph's values by name; `roots` the class of
    every label.
    """

    groups: tuple[ChannelGroup, ...]
    pinned: tuple[PinnedChannels, ...]
    unruled: Mapping[str, str]
    tensors: Mapping[str, Dims]
    values: Mapping[str, list[Dims]]
    roots: NDArray[np.int64]

    def unit_roots(self, where: Slice, units: int) -> NDArray[np.int64]:
        """Return the class of every unit of a group, given one of its slices."""
        labels = self.tensors[where.tensor][where.dim]
        assert labels is not None
        index = np.arange(len(labels)) if where.index is None else np.asarray(where.index)
        return self.roots[labels[index.reshape(units, -1)[:, 0]]]


def label_indices(
    program: Program, attention: Attention = Attention.HEADS, layer_norm: LayerNorm = LayerNorm.KEEP
) -> IndexLabels:
    """Analyse a program; near-linear in the number of operators and channels."""
    table, unruled = _run_rules(program, LabelTable(attention, layer_norm))
    roots = table.union.roots()
    pin_of = _pins(table, roots)
    slots = _Slots.collect(program, table, roots, free=pin_of < 0)
    groups = tuple(slots.groups())
    return IndexLabels(
        groups=groups,
        pinned=tuple(_pinned_layers(program, table, roots, pin_of)),
        unruled=unruled,
        tensors=table.tensors,
        values={n.name: [v.dims for v in _as_list(value)] for n, value in table.values.items()},
        roots=roots,
    )


def _run_rules(program: Program, table: LabelTable) -> tuple[LabelTable, dict[str, str]]:
    unruled: dict[str, str] = {}
    labels_of: dict[int, Dims] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "get_attr":
            name, tensor = str(node.target), program.tensors.get(str(node.target))
            if tensor is None or not node.users:
                table.values[node] = _unlabelled(node)
                continue
            # Tied parameters are one tensor under two names: they share their labels.
            if id(tensor) not in labels_of:
                labels_of[id(tensor)] = [table.union.new(n) if n > 1 else None for n in tensor.shape]
            table.tensors[name] = labels_of[id(tensor)]
            # Masks do not reach buffers: they keep what they hold at removed indices.
            table.values[node] = Value(table.tensors[name], vanishes=name in program.parameter_names)
        elif node.op == "placeholder":
            table.values[node] = _unlabelled(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                table.pin_all(table.values[source], "an output of the model", node)
        elif op_name(node) == "getitem":
            table.values[node] = _item(table, node)
        elif isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            value = _apply_rule(table, node)
            if value is None and _has_labels(table, node):
                unruled.setdefault(op_name(node), source_line(node))
                for source in node.all_input_nodes:
                    if source in table.values:
                        table.pin_all(table.values[source], f"no rule for {op_name(node)}", node)
            table.values[node] = _unlabelled(node) if value is None else value
    return table, unruled


def _apply_rule(table: LabelTable, node: Node) -> Value | list[Value] | None:
    """Return what an operator's rule says of its result; `None` if it has none, or none for this use."""
    rule = RULES.get(op_name(node))
    if rule is None:
        return None
    try:
        return rule(node, table)
    except NotImplementedError:
        return None


def _has_labels(table: LabelTable, node: Node) -> bool:
    """Whether an operator sees anything that could be removed; masks and index tables are made of constants."""
    operands = [table.values[source] for source in node.all_input_nodes if source in table.values]
    return any(labels is not None for value in operands for one in _as_list(value) for labels in one.dims)


def _item(table: LabelTable, node: Node) -> Value | list[Value]:
    source, position = node.args
    assert isinstance(source, Node)
    assert isinstance(position, int)
    value = table.values.get(source)
    return value[position] if isinstance(value, list) else _unlabelled(node)


def _unlabelled(node: Node) -> Value | list[Value]:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return [Value([None] * (t.dim() if isinstance(t, Tensor) else 0), vanishes=False) for t in value]
    return Value([None] * (value.dim() if isinstance(value, Tensor) else 0), vanishes=False)


def _as_list(value: Value | list[Value]) -> list[Value]:
    return value if isinstance(value, list) else [value]


def _pins(table: LabelTable, roots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for every class the number of the first pin on it, or -1 where there is none."""
    pin_of = np.full(len(roots), -1, dtype=np.int64)
    for i, pin in reversed(list(enumerate(table.pins))):
        pin_of[roots[pin.labels]] = i
    return pin_of


@dataclass
class _Slots:
    """One slot is one labelled dimension of one tensor; arrays run over slots."""

    names: list[tuple[str, int]]
    classes: list[NDArray[np.int64]]
    owners: list[bool]
    is_parameter: list[bool]
    parts: list[NDArray[np.int64]]
    free: NDArray[np.bool_]

    @staticmethod
    def collect(program: Program, table: LabelTable, roots: NDArray[np.int64], free: NDArray[np.bool_]) -> _Slots:
        slots = _Slots([], [], [], [], [roots[labels] for labels in table.parts], free)
        seen: set[int] = set()
        for name, dims in table.tensors.items():
            if id(dims) in seen:
                continue
            seen.add(id(dims))
            aliases = [n for n, d in table.tensors.items() if d is dims] if len(dims) > 1 else [name]
            produced = [
                d
                for d, labels in enumerate(dims)
                if labels is not None and not any((a, d) in table.consumer_dims for a in aliases)
            ]
            for d, labels in enumerate(dims):
                if labels is not None:
                    slots.names.append((name, d))
                    slots.classes.append(roots[labels])
                    # An element belongs to one group only: that of its first produced dimension.
                    slots.owners.append(produced[:1] == [d])
                    slots.is_parameter.append(name in program.parameter_names)
        return slots

    def groups(self) -> list[ChannelGroup]:
        signature = self._signatures()
        by_slot = [signature[c] for c in self.classes]
        order: dict[int, int] = {}
        for slot, signatures in enumerate(by_slot):
            if self.owners[slot] and self.is_parameter[slot]:
                for s in _unique_in_order(signatures[self.free[self.classes[slot]]]):
                    order.setdefault(int(s), slot)
        where: dict[int, list[int]] = {s: [] for s in order}
        for slot, signatures in enumerate(by_slot):
            for s in np.unique(signatures).tolist():
                if s in where:
                    where[s].append(slot)
        taken: dict[str, int] = {}
        return [self._group(s, first, where[s], by_slot, taken) for s, first in order.items()]

    def _signatures(self) -> NDArray[np.uint64]:
        """Classes with equal sums lie in the same slots and parts, the same number of times in each."""
        places = [*self.classes, *self.parts]
        keys = np.random.default_rng(0).integers(1, 2**63, size=len(places), dtype=np.uint64)
        signature = np.zeros(len(self.free), dtype=np.uint64)
        for key, classes in zip(keys, places, strict=True):
            np.add.at(signature, classes, key)
        signature[~self.free] = 0
        return signature

    def _group(
        self,
        signature: int,
        first: int,
        slots: list[int],
        by_slot: list[NDArray[np.uint64]],
        taken: dict[str, int],
    ) -> ChannelGroup:
        classes = self.classes[first][by_slot[first] == signature]
        units = _unique_in_order(classes)
        rank = np.full(len(self.free), -1, dtype=np.int64)
        rank[units] = np.arange(len(units))
        members: list[Slice] = []
        followers: list[Slice] = []
        for slot in slots:
            if not self.is_parameter[slot]:
                continue
            positions = np.flatnonzero(by_slot[slot] == signature)
            positions = positions[np.argsort(rank[self.classes[slot][positions]], kind="stable")]
            size = len(self.classes[slot])
            identity = len(positions) == size and (positions == np.arange(size)).all()
            tensor, dim = self.names[slot]
            where = Slice(tensor=tensor, dim=dim, index=None if identity else tuple(positions.tolist()))
            (members if self.owners[slot] else followers).append(where)
        name = self.names[first][0].removesuffix(".weight")
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        return ChannelGroup(name, len(units), tuple(members), tuple(followers))


def _unique_in_order(values: NDArray) -> NDArray:
    unique, first = np.unique(values, return_index=True)
    return unique[np.argsort(first, kind="stable")]


def _pinned_layers(
    program: Program, table: LabelTable, roots: NDArray[np.int64], pin_of: NDArray[np.int64]
) -> list[PinnedChannels]:
    """Say for every layer whose outputs are pinned what pins them."""
    pinned = []
    for weight, layer in program.layers.items():
        dim = 1 if layer.op.startswith("conv_transpose") and not layer.is_depthwise else 0
        labels = table.tensors[weight][dim]
        if labels is None:
            pinned.append(PinnedChannels(layer.name, "it has one output only", ""))
            continue
        pins = pin_of[roots[labels]]
        if len(found := np.flatnonzero(pins >= 0)):
            pin = table.pins[pins[found[0]]]
            pinned.append(PinnedChannels(layer.name, pin.reason, source_line(pin.node)))
    return pinned
