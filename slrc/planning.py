"""From what is asked for to a plan: a sparsity is allocated, and for a speed what can be pruned is timed and chosen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from slrc.backends import parse_target
from slrc.config import CompileConfig
from slrc.errors import PlanError, UnreachableError
from slrc.ir.program import Program
from slrc.measuring.choose_options import offered_patterns, plan_mixed, plan_options
from slrc.measuring.choose_widths import Widths, plan_widths
from slrc.measuring.devices import Device, local_device
from slrc.measuring.latency_meter import LatencyMeter
from slrc.measuring.weigh_options import Weigher
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.progress import Quiet, Reporter
from slrc.sparsity.choices import Allocation
from slrc.sparsity.patterns import AnyPattern, Channel
from slrc.sparsity.plans import Plan
from slrc.workload import Workload

MOST_OF_WHAT_CAN_BE = 0.75
"""How much of the latency that can be saved is, where nobody asks for more than is in reach."""


def plan_from(
    program: Program,
    config: CompileConfig,
    workload: Workload | None = None,
    *,
    cache: Path | None = None,
    reporter: Reporter | None = None,
    device: Device | None = None,
) -> Plan:
    """Return the plan that a configuration asks for. See `slrc.plan`.

    A budget is shared out by what pruning costs on the workload's data, where there is any, else by energy alone. One
    that is out of reach by times that another run measured, perhaps on a busy machine, is tried again with new ones.
    Where nothing is asked for and the usual budget is out of reach, most of what can be saved is.

    Raises:
        UnreachableError: the latency that was asked for cannot be met.
    """

    def allocate(pattern: AnyPattern, allocation: Allocation, sparsity: float | None, **others: Any) -> Plan:
        return allocate_sparsity(
            program,
            pattern,
            sparsity,
            allocation=allocation,
            skip=config.skip,
            keep_ends=config.keep_ends,
            round_to=config.width_multiple,
            attention=config.attention,
            layer_norm=config.layer_norm,
            permute=config.permute,
            **others,
        )

    device = device or local_device()
    budget, pattern = config.latency_share, config.chosen_pattern
    target = device.resolve(parse_target(config.target[0]))

    def channels_by_half(why: str) -> Plan:
        made = allocate(Channel(), Allocation.UNIFORM, None)
        return _but(made, f"half of the channels are pruned, for whatever speed that gives: {why}")

    if config.leaves_all_open and (why_not := device.why_not_choose(target)):
        return channels_by_half(f"{target}: {why_not}")
    if budget is None:
        assert not isinstance(pattern, str)
        return allocate(pattern, config.allocate, config.sparsity)

    meter = LatencyMeter(program, target, threads=config.threads, cache=cache, reporter=reporter, device=device)
    weigher = Weigher(program, workload, config.budget_metric, config.seed, reporter)
    coupled = Channel() if isinstance(pattern, str) else pattern
    widths = Widths(meter, program, partial(allocate, coupled, Allocation.UNIFORM), weigher.widths, budget)

    def planned(share: float) -> Plan:
        if not isinstance(pattern, str) and pattern.coupled:
            return plan_widths(meter, widths, share)
        patterns = offered_patterns(target) if isinstance(pattern, str) else (pattern,)
        try:
            start = allocate(patterns[0], Allocation.UNIFORM, 0.0, alternatives=patterns[1:])
        except PlanError as error:
            if not isinstance(pattern, str):
                raise
            return _but(plan_widths(meter, widths, share), f"only channels are pruned: {error.message}")
        if not isinstance(pattern, str):
            return plan_options(meter, program, start, patterns, share, weigher)
        return plan_mixed(meter, program, start, patterns, widths, share, weigher)

    def met(share: float) -> Plan:
        try:
            return planned(share)
        except UnreachableError:
            if not widths.forget():
                raise
            (reporter or Quiet()).note(
                f"{share:.0%} of the dense latency cannot be reached by times that were kept: they are measured again"
            )
            return planned(share)

    try:
        return met(budget)
    except UnreachableError as error:
        if not config.leaves_all_open:
            raise
        nearer = 1 - MOST_OF_WHAT_CAN_BE * (1 - error.least)
        missed = f"{budget:.0%} of the dense latency is out of reach"
        try:
            return _but(met(nearer), f"{missed}: {nearer:.0%} was gone for")
        except UnreachableError:  # little can be saved, and each time another little is measured
            return channels_by_half(missed)


def _but(plan: Plan, note: str) -> Plan:
    return plan.model_copy(update={"shortfall": "; ".join(filter(None, [note, plan.shortfall]))})
