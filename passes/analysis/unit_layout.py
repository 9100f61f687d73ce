"""`UnitLayout`: where the units of channel groups lie, and which groups can be put in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from slrc.errors import PlanError
from slrc.ir.nodes import argument, op_name
from slrc.ir.program import Program
from slrc.passes.analysis.label_indices import IndexLabels, label_indices
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.plans import Plan

Orders = Mapping[int, tuple[int, ...]]
"""For groups by their number: place `i` takes unit `order[i]`."""


@dataclass(frozen=True)
class UnitLayout:
    """Which groups can be reordered, and where their units lie.

    A group can be reordered if in every dimension of every value of the graph its units stand in their own order: each
    in a run of places, and all of that repeated (heads in a projection, both halves of a concatenation of a value with
    itself, pixels after a flatten). An operator joins places with places, so that these then move alike all through the
    graph. Flips, slices across runs and running sums would tell the difference: their groups stay.

    `group_of` and `unit_of` give, for each label, the number of its group (-1: none) and its unit in it.
    """

    program: Program
    labels: IndexLabels
    group_of: NDArray[np.int64]
    unit_of: NDArray[np.int64]

    @staticmethod
    def of(program: Program, labels: IndexLabels) -> UnitLayout:
        """Read the layout off the labels of a program."""
        group_of, unit_of = np.full((2, len(labels.roots)), -1, dtype=np.int64)
        for number, group in enumerate(labels.groups):
            roots = labels.unit_roots(group.members[0], group.units)
            group_of[roots], unit_of[roots] = number, np.arange(group.units)
        return UnitLayout(program, labels, group_of[labels.roots], unit_of[labels.roots])

    @staticmethod
    def of_plan(program: Program, plan: Plan) -> UnitLayout:
        """Label a program as its plan says."""
        return UnitLayout.of(program, label_indices(program, plan.attention, plan.layer_norm))

    @cached_property
    def fixed(self) -> frozenset[int]:
        """The numbers of the groups that cannot be reordered."""
        fixed: set[int] = set()
        for labels in self._all_labels():
            fixed |= {number for number in self._groups_in(labels) if self._places(labels, number) is None}
        for node in self.program.nodes:
            if op_name(node) == "cumsum" and (summed := self._summed(node)) is not None:
                fixed |= self._groups_in(summed)
        return frozenset(fixed)

    @cached_property
    def permutable(self) -> Mapping[str, int]:
        """For every weight whose output `i` is unit `i` of a group that can be reordered, the number of that group."""
        found: dict[str, int] = {}
        for weight, layer in self.program.layers.items():
            rows = self.labels.tensors[weight][layer.output_dim]
            if rows is None or layer.groups > 1:
                continue
            number = int(self.group_of[rows[0]])
            whole = number >= 0 and self.labels.groups[number].units == len(rows)
            if whole and number not in self.fixed and (self.group_of[rows] == number).all():
                found[weight] = number
        return found

    def orders(self, plan: Plan) -> Orders:
        """Return the orders that a plan asks for, by the number of the group.

        Raises:
            PlanError: outputs cannot be reordered, or layers that share their outputs have orders of their own.
        """
        asked: dict[int, Constraint] = {}
        for c in plan:
            number = None if c.pattern.coupled else self.permutable.get(c.members[0].tensor)
            if number is None:
                if c.order is not None:
                    raise PlanError(
                        f"constraint `{c.name}`: its outputs cannot be reordered in {self.program.name}",
                        hint="take `order` out of it, or write the plan anew with `slrc inspect --plan-out plan.json`",
                    )
                continue
            other = asked.setdefault(number, c)
            if other.order != c.order:
                raise PlanError(
                    f"constraints `{other.name}` and `{c.name}` share their outputs, but not the `order` of them",
                    hint="give both the same `order`, or take it out of both",
                )
        return {number: c.order for number, c in asked.items() if c.order is not None}

    def permute(self, name: str, tensor: Tensor, orders: Orders) -> Tensor:
        """Return a parameter, a buffer or its mask with the units of all its dimensions in their new order."""
        for dim, labels in enumerate(self.labels.tensors.get(name, ())):
            if labels is None:
                continue
            index = np.arange(len(labels))
            for number in orders.keys() & self._groups_in(labels):
                places = self._places(labels, number)
                assert places is not None
                index[places] = places[:, list(orders[number])]
            tensor = tensor.index_select(dim, torch.from_numpy(index))
        return tensor

    def _all_labels(self) -> Iterator[NDArray[np.int64]]:
        """Go through the labels of every dimension of every value; many share one array."""
        values = [dims for results in self.labels.values.values() for dims in results]
        found = [labels for dims in [*self.labels.tensors.values(), *values] for labels in dims]
        yield from {id(labels): labels for labels in found if labels is not None}.values()

    def _groups_in(self, labels: NDArray[np.int64]) -> set[int]:
        return set(np.unique(self.group_of[labels]).tolist()) - {-1}

    def _places(self, labels: NDArray[np.int64], number: int) -> NDArray[np.int64] | None:
        """Return where a group's units lie in a dimension, `(repeats, units, run)`; `None` if it is not as regular."""
        units = self.labels.groups[number].units
        places = np.flatnonzero(self.group_of[labels] == number)
        found = self.unit_of[labels[places]]
        run = int(np.argmax(found != found[0])) or len(found)
        # Of two units, a slice could take a half of each run.
        if units < 3 or len(found) % (units * run):
            return None
        regular = np.broadcast_to(np.arange(units)[:, None], (len(found) // (units * run), units, run))
        return places.reshape(regular.shape) if (found == regular.ravel()).all() else None

    def _summed(self, node: Node) -> NDArray[np.int64] | None:
        """Return the labels of the dimension that a running sum goes along."""
        source = node.args[0]
        assert isinstance(source, Node)
        return self.labels.values[source.name][0][argument(node, 1, "dim")]
