"""What each pattern could prune of a program, and what pins the rest."""

from __future__ import annotations

from collections.abc import Sequence

from slrc.config import CompileConfig
from slrc.doctor.diagnosis import Pin, Reach
from slrc.errors import PlanError
from slrc.ir.program import Program
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.sparsity.patterns import AnyPattern
from slrc.sparsity.plans import Plan


def plan_uniformly(program: Program, pattern: AnyPattern, sparsity: float | None, config: CompileConfig) -> Plan:
    """Return the plan that prunes every layer alike, with the configuration's other choices.

    Raises:
        PlanError: the pattern fits nothing.
    """
    return allocate_sparsity(
        program,
        pattern,
        sparsity,
        skip=config.skip,
        keep_ends=config.keep_ends,
        round_to=config.width_multiple,
        attention=config.attention,
        layer_norm=config.layer_norm,
    )


def reach_of(program: Program, patterns: Sequence[AnyPattern], config: CompileConfig) -> list[Reach]:
    """Return what each pattern touches; a pattern that fits nothing touches nothing, with the reason."""
    return [_reach(program, pattern, config) for pattern in patterns]


def _reach(program: Program, pattern: AnyPattern, config: CompileConfig) -> Reach:
    try:
        plan = plan_uniformly(program, pattern, None, config)
    except PlanError as error:
        everything = tuple(layer.name for layer in program.layers.values())
        return Reach(pattern=str(pattern), params=0.0, macs=0.0, pins=(Pin(reason=error.message, layers=everything),))
    touched = {s.tensor for c in plan for s in c.members + c.followers}
    params = sum(program.tensors[t].numel() for t in touched)
    macs = sum(layer.macs for weight, layer in program.layers.items() if weight in touched)
    by_reason: dict[str, list[str]] = {}
    for x in plan.left_out:
        by_reason.setdefault(x.reason, []).append(x.name)
    by_size = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return Reach(
        pattern=str(pattern),
        params=params / program.num_parameters,
        macs=macs / program.macs if program.macs else 0.0,
        pins=tuple(Pin(reason=reason, layers=tuple(layers)) for reason, layers in by_size),
    )
