"""Choose kept widths that meet a latency on a target, losing as little as possible of the weights' energy.

The parts of the network and the whole are timed dense and at a few widths (`LatencyMeter.table`). Widths are chosen by
that table (`LatencyGoal`); what they make of the whole is timed too, and corrects it (`meet_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from slrc.errors import UnreachableError
from slrc.ir.nodes import node_macs, node_shape
from slrc.ir.program import Program
from slrc.measuring.latency_meter import LatencyMeter
from slrc.measuring.latency_table import LatencyTable, nearest_budget, told_layers
from slrc.measuring.meet_budget import meet_budget
from slrc.passes.analysis.cut_segments import anchors
from slrc.passes.analysis.label_indices import IndexLabels, label_indices
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.plans import LatencyForecast, Plan

PROBED_SPARSITIES = (0.5, 0.75)
"""Where the parts of a program are timed, besides dense."""
DEEP, DEEP_SPARSITY = 0.3, 0.9
"""Below this share of the dense latency parts are timed at this sparsity too: no width is taken to be faster than the
fastest one that was timed."""


WidthWeights = Mapping[str, float]
"""By what the loss of energy of each group of channels counts, by the constraint's name; by 1 where it is missing."""


class Widths:
    """Plans of channels for shares of the dense latency.

    Args:
        meter: measures.
        program: the captured model.
        allocate: makes a plan of a sparsity, or of `choose_widths=`.
        weigh: tells what the groups of a plan count.
        budget: the least share that will be asked for.
    """

    def __init__(
        self,
        meter: LatencyMeter,
        program: Program,
        allocate: Callable[..., Plan],
        weigh: Callable[[Plan], WidthWeights],
        budget: float,
    ) -> None:
        self._meter, self._program, self._allocate, self._weigh = meter, program, allocate, weigh
        self._probed = (*PROBED_SPARSITIES, DEEP_SPARSITY) if budget < DEEP else PROBED_SPARSITIES
        self._table: LatencyTable | None = None

    @property
    def table(self) -> LatencyTable:
        """What the parts and the whole take dense and at a few widths; timed when it is needed first."""
        if self._table is None:
            self._table = self._meter.table([self._allocate(sparsity) for sparsity in self._probed])
        return self._table

    def forget(self) -> bool:
        """Forget the times that another run measured, as `Clock.forget`, and the table that was made of them."""
        self._table = None
        return self._meter.forget()

    @cached_property
    def weights(self) -> WidthWeights:
        """What the groups count."""
        return self._weigh(self._allocate(0.0))

    def plan(self, budget: float, table: LatencyTable | None = None) -> Plan:
        """Return the plan that meets a share of the dense latency by the table.

        Raises:
            UnreachableError: the budget cannot be met by any widths.
        """
        return self._allocate(None, choose_widths=LatencyGoal(table or self.table, budget, self.weights))

    def loss(self, plan: Plan) -> float:
        """Return what a plan's widths lose of the energy of the weights, by what each group counts."""
        return sum(self.weights.get(c.name, 1.0) * float(losses_of_widths(c, self._program)[c.keep]) for c in plan)

    def shares(self, plan: Plan) -> list[tuple[float, float]]:
        """Return the share of every segment's work that a plan's widths leave, and the share of its dense time."""
        work = _Work.of(self._program, label_indices(self._program, plan.attention, plan.layer_norm), plan.constraints)
        keep, shares = np.array([c.keep for c in plan], dtype=np.int64), []
        for k, segment in enumerate(self.table.segments):
            macs, ms = work.macs(k, keep), self.table.segment_ms
            shares.append((macs / segment.macs[0], ms(k, macs) / ms(k, segment.macs[0])))
        return shares


def plan_widths(meter: LatencyMeter, widths: Widths, budget: float) -> Plan:
    """Return the plan of widths that meets a share of the dense latency, timed as a whole and corrected.

    Raises:
        UnreachableError: the budget cannot be met by any widths.
    """
    return meet_budget(widths.table, budget, lambda table, _: widths.plan(budget, table), meter.measure)


@dataclass(frozen=True)
class LatencyGoal:
    """A share of the dense latency, and the table that tells what widths take; called, it chooses widths.

    `weights` are by what the loss of energy of each group counts.
    """

    table: LatencyTable
    budget: float
    weights: WidthWeights = field(default_factory=dict)

    def __call__(
        self, program: Program, labels: IndexLabels, constraints: Sequence[Constraint], steps: Sequence[int]
    ) -> tuple[NDArray[np.int64], LatencyForecast]:
        """Return how many units of each group to keep, and the latency to expect.

        The score of a network is the product, over its layers, of the share of energy that each keeps: the scale of a
        layer, which a norm may undo, says nothing, a group that many layers share counts for each, and none is starved.
        With weights, each group counts by its own.
        Starting from full widths, the group whose next `steps` units cost the least of the score's logarithm for the
        time that they save is narrowed, until the budget is met.

        Raises:
            UnreachableError: the budget cannot be met; the message says what can be reached.
        """
        losses = [self.weights.get(c.name, 1.0) * losses_of_widths(c, program) for c in constraints]
        search = _Search(program, labels, constraints, steps, self.table, losses)
        budget_ms = self.table.budget_ms(self.budget)
        while search.total_ms > budget_ms:
            if not search.narrow_one():
                reached = self.table.share(search.total_ms)
                raise UnreachableError(
                    f"a latency of {self.budget:.0%} of the dense one cannot be reached on {self.table.target}: "
                    f"with every group at its least width {reached:.0%} are left; {search.slowest()}",
                    f"ask for {nearest_budget(reached)}",
                    reached,
                )
        forecast = LatencyForecast(
            target=self.table.target,
            threads=self.table.threads,
            budget=self.budget,
            predicted=self.table.share(search.total_ms),
            segments_ms=search.total_ms,
        )
        return search.keep, forecast


class _Search:
    """The state of the search: what is kept, and every segment's latency with it."""

    def __init__(
        self,
        program: Program,
        labels: IndexLabels,
        constraints: Sequence[Constraint],
        steps: Sequence[int],
        table: LatencyTable,
        losses: Sequence[NDArray[np.float64]],
    ) -> None:
        self.keep = np.array([c.groups for c in constraints], dtype=np.int64)
        self._steps, self._table = steps, table
        self._work = _Work.of(program, labels, constraints)
        self._losses = losses
        self._ms = [self._segment_ms(k, self.keep) for k in range(len(self._work.nodes))]

    @property
    def total_ms(self) -> float:
        return sum(self._ms)

    def narrow_one(self) -> bool:
        """Take one step; return whether there was one to take."""
        best, best_price = None, np.inf
        for group, step in enumerate(self._steps):
            kept = self.keep[group]
            fewer = (kept - 1) // step * step
            if fewer < 1:
                continue
            after = self.keep.copy()
            after[group] = fewer
            times = {k: self._segment_ms(k, after) for k in self._work.touched_by[group]}
            saved = sum(self._ms[k] - ms for k, ms in times.items())
            price = (self._losses[group][fewer] - self._losses[group][kept]) / max(saved, 1e-12)
            if price < best_price:
                best, best_price = (after, times), price
        if best is None:
            return False
        self.keep = best[0]
        for k, ms in best[1].items():
            self._ms[k] = ms
        return True

    def slowest(self) -> str:
        """Tell what the slowest layers take dense, and what is left of that."""
        rows = zip(self._table.segments, self._ms, strict=True)
        return told_layers([(segment.name, segment.ms[0], ms) for segment, ms in rows])

    def _segment_ms(self, k: int, keep: NDArray[np.int64]) -> float:
        return self._table.segment_ms(k, self._work.macs(k, keep))


def losses_of_widths(constraint: Constraint, program: Program) -> NDArray[np.float64]:
    """Return −log of the share of energy that a group keeps with `n` units, for every `n`, over all its layers."""
    energies = constraint.energies(program.tensors)[0].double().cpu().numpy()
    kept = np.concatenate([[0.0], np.cumsum(np.sort(energies)[::-1])])
    smallest = np.finfo(float).tiny
    layers = sum(s.tensor in program.layers for s in constraint.members + constraint.followers)
    return -max(layers, 1) * np.log(np.maximum(kept / max(kept[-1], smallest), smallest))


Size = tuple[int, dict[int, float]]
"""A dimension's size: what always stays, and the indices that each unit of a group adds."""


@dataclass(frozen=True)
class _Work:
    """Multiply-accumulates of every anchor as a function of the units kept of every group."""

    nodes: list[Node]
    sizes: dict[Node, list[Size]]
    touched_by: list[list[int]]
    batch: int

    @staticmethod
    def of(program: Program, labels: IndexLabels, constraints: Sequence[Constraint]) -> _Work:
        group_of = np.full(len(labels.roots), -1, dtype=np.int64)
        for i, c in enumerate(constraints):
            group_of[labels.unit_roots(c.members[0], c.groups)] = i
        units = np.array([c.groups for c in constraints])
        nodes = anchors(program)
        sizes: dict[Node, list[Size]] = {}
        touched_by: list[list[int]] = [[] for _ in constraints]
        for k, anchor in enumerate(nodes):
            involved = [anchor, *(a for a in anchor.all_input_nodes if hasattr(a.meta.get("val"), "shape"))]
            for node in involved:
                sizes[node] = _sizes(node, labels, group_of, units)
            for group in sorted({g for node in involved for _, units_of in sizes[node] for g in units_of}):
                touched_by[group].append(k)
        return _Work(nodes, sizes, touched_by, program.batch)

    def macs(self, k: int, keep: NDArray[np.int64]) -> int:
        def shape_of(node: Node) -> list[int]:
            return [fixed + round(sum(n * keep[g] for g, n in units.items())) for fixed, units in self.sizes[node]]

        return node_macs(self.nodes[k], shape_of) // self.batch


def _sizes(node: Node, labels: IndexLabels, group_of: NDArray[np.int64], units: NDArray[np.int64]) -> list[Size]:
    dims = labels.values[node.name][0] if node.name in labels.values else []
    sizes: list[Size] = []
    for d, size in enumerate(node_shape(node)):
        own = dims[d] if d < len(dims) else None
        if own is None:
            sizes.append((size, {}))
            continue
        groups = group_of[labels.roots[own]]
        counts = np.bincount(groups[groups >= 0], minlength=len(units))
        present = np.flatnonzero(counts)
        sizes.append((size - int(counts.sum()), {int(g): float(counts[g] / units[g]) for g in present}))
    return sizes
