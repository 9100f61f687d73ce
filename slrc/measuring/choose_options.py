"""Choose how every layer is pruned so that the network meets a latency, by what each option takes on the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from slrc.backends import Target, get_backend
from slrc.errors import PlanError, UnreachableError
from slrc.ir.program import Program
from slrc.measuring.choose_widths import Widths
from slrc.measuring.latency_meter import LatencyMeter, Menus, make_menus
from slrc.measuring.latency_table import LatencyTable, nearest_budget, told_layers
from slrc.measuring.meet_budget import MARGIN, Slow, meet_budget
from slrc.measuring.weigh_options import Weigher, weighed
from slrc.sparsity.budget import Budget, Floats, Menu
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import AnyPattern, Block, Columns
from slrc.sparsity.plans import LatencyForecast, Plan

WIDTH_SHARES = (0.75, 0.5, 0.25, 0.1, 0.0)
"""How much of the latency between the budget and all is left to options, where widths are chosen first."""
TRIES = 3
"""How many of those are timed as a whole until one meets the budget."""


class Choice(NamedTuple):
    """What options are chosen from: the constraints, their menus, and what each option costs (see `losses_of`)."""

    plan: Plan
    found: Menus
    losses: Sequence[Floats]


def offered_patterns(target: Target) -> tuple[AnyPattern, ...]:
    """Return what layers of `--pattern auto` may be pruned by on a target: blocks where it has kernels for them."""
    if get_backend(target).why_not_packed(target):
        return (Columns(2), Columns(1), Columns(4))
    if target.is_integer:
        return (Block(8, 4), Block(4, 4), Block(8, 1))
    return (Block(8, 1), Block(4, 1), Block(16, 1))


def plan_options(
    meter: LatencyMeter,
    program: Program,
    start: Plan,
    patterns: Sequence[AnyPattern],
    budget: float,
    weigher: Weigher,
) -> Plan:
    """Return the plan of options that meets a share of the dense latency.

    Args:
        meter: measures.
        program: the captured model.
        start: constrains single weights.
        patterns: what a layer may be pruned by.
        budget: the share.
        weigher: tells what options count.

    Raises:
        UnreachableError: the budget cannot be met; the message says what can be, layer by layer.
    """
    found = make_menus(meter.options(start, patterns), start, program)
    found = weighed(found, weigher.options(start, found.menus))
    choice = Choice(start, found, losses_of(program, start, found))
    table = _with_fastest(meter, program, choice, meter.whole(found.dense_ms), budget)
    return counted(_met(meter, program, choice, table, budget), program)


def plan_mixed(
    meter: LatencyMeter,
    program: Program,
    start: Plan,
    patterns: Sequence[AnyPattern],
    widths: Widths,
    budget: float,
    weigher: Weigher,
) -> Plan:
    """Return the plan of options, and of narrower channels where those lose less, that meets a share of the latency.

    Widths are chosen first, for some share between the budget and all; options then take the narrower layers to the
    budget. Of several such shares the one is taken whose widths and options lose the least; where the whole misses the
    budget with it, the next one.

    Args:
        meter: measures.
        program: the captured model.
        start: constrains single weights.
        patterns: what a layer may be pruned by.
        widths: makes plans of channels.
        budget: the share.
        weigher: tells what options count.

    Raises:
        UnreachableError: the budget cannot be met; the message says what can be, layer by layer.
    """
    times = meter.options(start, patterns)
    wide = make_menus(times, start, program)
    table, weights = meter.whole(wide.dense_ms), weigher.options(start, wide.menus)
    tried: list[tuple[float, Choice]] = []
    reasons: list[PlanError] = []
    for share in (1.0, *(budget + (1 - budget) * part for part in WIDTH_SHARES)):
        lost, mixed, found = 0.0, start, wide
        if share < 1:
            try:
                channels = widths.plan(share)
            except PlanError as error:  # no widths are so fast, or none can be narrowed
                reasons.append(error)
                continue
            lost, mixed = widths.loss(channels), joined(channels, start)
            found = make_menus(times, mixed, program, widths.shares(channels))
        found = weighed(found, weights)
        try:
            choice = Choice(mixed, found, losses_of(program, mixed, found))
            if share == 1:
                table = _with_fastest(meter, program, choice, table, budget)
            lost += allocate_options(program, *choice, table, budget).loss(choice.losses)
        except PlanError as error:
            reasons.append(error)
            continue
        tried.append((lost, choice))
    if not tried:
        # Of widths alone the last one is for the budget itself.
        raise min(reversed(reasons), key=lambda one: one.least if isinstance(one, UnreachableError) else 1.0)
    met: list[tuple[float, Plan]] = []
    for _, choice in sorted(tried, key=lambda one: one[0])[:TRIES]:
        plan = _met(meter, program, choice, table, budget)
        assert plan.latency is not None
        met.append((abs(plan.latency.predicted / budget - 1), plan))
        if met[-1][0] <= MARGIN:
            break
    return counted(min(met, key=lambda one: one[0])[1], program)


def joined(channels: Plan, layers: Plan) -> Plan:
    """Return a plan with the constraints of both, names told apart."""
    coupled = [c.model_copy(update={"name": f"{c.name} (channels)"}) for c in channels if c.keep < c.groups]
    return channels.model_copy(update={"constraints": (*coupled, *layers), "latency": None})


def losses_of(program: Program, plan: Plan, found: Menus) -> list[Floats]:
    """Return what options cost the weights of a program, as `Plan.option_losses`."""
    return plan.model_copy(update={"budget": Budget(ms=0.0, menus=found.menus)}).option_losses(program.tensors)


def without_slow(found: Menus, losses: Sequence[Floats], slow: Slow) -> tuple[Menus, list[Floats]]:
    """Return the menus, and what their options cost, without the pruned options that are no faster than dense."""
    menus, left = [], []
    for menu, own in zip(found.menus, losses, strict=True):
        keep = [k for k, o in enumerate(menu.options) if k == 0 or o.ms < slow.get(menu.name, math.inf)]
        menus.append(menu.model_copy(update={"options": tuple(menu.options[k] for k in keep)}))
        left.append(own[keep])
    return found._replace(menus=tuple(menus)), left


def allocate_options(
    program: Program, plan: Plan, found: Menus, losses: Sequence[Floats], table: LatencyTable, budget: float
) -> Plan:
    """Return the plan with the options that meet a share of the dense latency at the least loss of energy.

    Args:
        program: the captured model.
        plan: its constraints are of single weights.
        found: what the options take.
        losses: of the options, by `losses_of`.
        table: how a sum over segments relates to the whole.
        budget: the share.

    Raises:
        UnreachableError: the budget cannot be met; the message says what can be, layer by layer.
    """
    limit = Budget(ms=table.budget_ms(budget) - found.rest_ms, menus=found.menus)
    if limit.ms < limit.least_ms:
        least = table.share(found.least_ms)
        raise UnreachableError(_unreachable(found, table, budget), _hint(least), least)
    made = plan.model_copy(update={"budget": limit}).reallocated(program.tensors, losses)
    if not any(option.keep < option.groups for option in made.options().values()):
        # The rest is as fast as that beside packed layers alone: some are to be packed, if few.
        least = max(table.budget_ms(budget) - found.dense_rest_ms, limit.least_ms)
        limit = limit.model_copy(update={"ms": least})
        made = plan.model_copy(update={"budget": limit}).reallocated(program.tensors, losses)
    total = found.rest_ms + sum(option.ms for option in made.options().values())
    forecast = LatencyForecast(
        target=table.target,
        threads=table.threads,
        budget=budget,
        predicted=table.share(total),
        segments_ms=total,
    )
    return made.model_copy(update={"latency": forecast, "shortfall": ""})


def counted(plan: Plan, program: Program) -> Plan:
    """Return a plan that says what it prunes of the weights as they are: options and channels share some."""
    reached = Masks.project(plan, program.tensors).sparsity(plan)
    return plan.model_copy(update={"sparsity": reached, "sparsity_asked": reached})


def _with_fastest(
    meter: LatencyMeter, program: Program, choice: Choice, table: LatencyTable, budget: float
) -> LatencyTable:
    """Return a table that knows what the whole takes at its fastest, if by its parts alone it misses a budget.

    Parts alone take time for changes of layout that they are spared beside each other.
    """
    plan, found, losses = choice
    if table.budget_ms(budget) >= found.least_ms:
        return table
    limit = Budget(ms=sum(map(_least, found.menus)), menus=found.menus)
    fastest = plan.model_copy(update={"budget": limit}).reallocated(program.tensors, losses)
    return table.with_whole(found.least_ms, meter.measure(fastest).share)


def _met(meter: LatencyMeter, program: Program, choice: Choice, table: LatencyTable, budget: float) -> Plan:
    plan, found, losses = choice

    def allocated(table: LatencyTable, slow: Slow) -> Plan:
        return allocate_options(program, plan, *without_slow(found, losses, slow), table, budget)

    return meet_budget(table, budget, allocated, meter.measure)


def _unreachable(found: Menus, table: LatencyTable, budget: float) -> str:
    layers = told_layers([(menu.name, menu.options[0].ms, _least(menu)) for menu in found.menus])
    return (
        f"a latency of {budget:.0%} of the dense one cannot be reached on {table.target}: with every layer at its "
        f"fastest {table.share(found.least_ms):.0%} are left; {layers}; "
        f"what is not pruned {found.rest_ms:.3f} ms"
    )


def _hint(reached: float) -> str:
    return f"ask for {nearest_budget(reached)}, or for another pattern"


def _least(menu: Menu) -> float:
    return min(option.ms for option in menu.options)
