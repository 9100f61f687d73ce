"""Plans that meet a budget: whatever chooses by a table of parts is corrected by the whole.

The plan that it makes is timed as one network, and what that took joins the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

from slrc.errors import UnreachableError
from slrc.measuring.latency_table import LatencyTable
from slrc.sparsity.plans import Plan

CORRECTIONS = 3
"""How often a plan is made again where layers are pruned for nothing, or the whole program misses the budget by more
than this:"""
MARGIN = 0.03
Slow = Mapping[str, float]
"""By the names of layers' constraints: options that take so many milliseconds or more are no faster than dense."""


class Measured(NamedTuple):
    """What a plan makes of the whole: its share of the dense latency, and the layers that are faster dense in it."""

    share: float
    idle: Set[str] = frozenset()


def meet_budget(
    table: LatencyTable,
    budget: float,
    allocate: Callable[[LatencyTable, Slow], Plan],
    measure: Callable[[Plan], Measured],
) -> Plan:
    """Return the plan whose latency, measured on the whole program, is nearest to a share of the dense one.

    A layer that is faster dense is not pruned for nothing: of its options those are left that are faster still.

    Args:
        table: what the parts take.
        budget: the share.
        allocate: makes a plan by a table, with a forecast, of options that are not too slow.
        measure: times what a plan makes of the whole.

    Raises:
        PlanError: the budget cannot be met.
    """
    measured: list[tuple[bool, int, float, Plan]] = []
    slow: dict[str, float] = {}
    for _ in range(1 + CORRECTIONS):
        try:
            plan = allocate(table, slow)
        except UnreachableError:
            if not measured:
                raise
            break  # by what was corrected: what is nearest so far is all there is
        assert plan.latency is not None
        reached, idle = measure(plan)
        pruned = {name: option.ms for name, option in plan.options().items() if option.keep < option.groups}
        for_nothing = {name: ms for name, ms in pruned.items() if name in idle}
        slow |= for_nothing
        table = table.with_whole(plan.latency.segments_ms, reached)
        plan = plan.model_copy(update={"latency": plan.latency.model_copy(update={"predicted": reached})})
        apart = abs(reached / budget - 1)
        misses = apart > MARGIN
        measured.append((misses, 0 if misses else len(for_nothing), apart, plan))
        if not misses and not for_nothing:
            return plan
    misses, _, _, nearest = min(measured, key=lambda found: found[:3])
    if not misses or nearest.latency is None:
        return nearest
    missed = f"a latency of {budget:.1%} of the dense one was asked for, and {nearest.latency.predicted:.1%} reached"
    return nearest.model_copy(update={"shortfall": "; ".join(filter(None, [nearest.shortfall, missed]))})
