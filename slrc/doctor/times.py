"""Where a network's time goes on a target, and how fast it becomes when it is pruned: timed, as far as time allows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slrc.backends import Runner, Target, get_backend
from slrc.config import CompileConfig
from slrc.doctor.diagnosis import Deadline, PartTime, SpeedupPoint
from slrc.doctor.reach import plan_uniformly
from slrc.errors import BackendError, SlrcError
from slrc.forms.cost import cheapest_form
from slrc.forms.form import DENSE, Form, FormKind, Forms
from slrc.ir.program import Program
from slrc.measuring.choose_forms import form_candidates
from slrc.measuring.clock import Clock
from slrc.measuring.jobs import Formed, Job, to_be_timed
from slrc.measuring.timing import BLOCKS, Budget, measure
from slrc.passes.analysis.cut_segments import cut_segments
from slrc.pipeline import baseline, structure
from slrc.progress import Reporter
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import NM, AnyPattern, Block, Channel, Columns

SPARSITIES = (0.75, 0.5, 0.9)
"""In the order in which they are timed."""
PART = Budget(0.2, 3)
WHOLE = Budget(1.5, BLOCKS)
NO_TIME = "no time was left, `--seconds` gives more"
RUNS = 2 * BLOCKS + 6
"""How often each of two networks runs at least, where they are timed in turns."""


def patterns_for(target: Target) -> tuple[AnyPattern, ...]:
    """Return the patterns that may make a network faster on a target."""
    block = Block(8, 4 if target.is_integer else 1)
    blocks: tuple[AnyPattern, ...] = () if get_backend(target).why_not_packed(target) else (block,)
    pairs: tuple[AnyPattern, ...] = (NM(2, 4),) if target.backend.startswith("tensorrt") else ()
    return (Channel(), Columns(2), *blocks, *pairs)


def time_parts(program: Program, clock: Clock, deadline: Deadline, reporter: Reporter) -> list[PartTime]:
    """Return what each part of the dense network takes, in its order; the largest are timed first."""
    segments = cut_segments(baseline(program))
    took: dict[str, float | None] = {s.anchor: None for s in segments}
    with reporter.task(f"timing parts on {clock.target}", len(segments)) as task:
        for segment in sorted(segments, key=lambda s: -s.macs):
            if deadline.left <= 0:
                break
            timing = clock.times([Job.of_segment(segment)], PART)[0]
            if timing.why_not:
                raise BackendError(f"`{segment.anchor}` cannot be timed on {clock.target}: {timing.why_not}")
            took[segment.anchor] = timing.ms
            task.advance(segment.anchor)
    return [PartTime(name=s.anchor, macs=s.macs, ms=took[s.anchor]) for s in segments]


def time_speedups(
    program: Program,
    patterns: Sequence[AnyPattern],
    config: CompileConfig,
    target: Target,
    threads: int,
    deadline: Deadline,
    reporter: Reporter,
) -> list[SpeedupPoint]:
    """Time the whole network, pruned by each pattern at each sparsity, in turns with the dense one.

    What cannot be made or run is a point with the reason, and so is what there was no time for.

    Raises:
        SlrcError: the dense network cannot be emitted or run.
    """
    wanted = [(p, s) for s in SPARSITIES for p in patterns if p.fixed_sparsity in (None, s)]
    found: dict[tuple[str, float], SpeedupPoint] = {}
    with tempfile.TemporaryDirectory() as folder, reporter.task("timing pruned networks", len(wanted)) as task:
        inputs = program.flat_inputs()
        dense = _emitted(Formed(baseline(program)), target, threads, Path(folder) / "dense")
        run_seconds = _seconds(dense.prepare(*inputs), deadline.now)
        longest = 0.0
        for i, (pattern, sparsity) in enumerate(wanted):
            point = SpeedupPoint(pattern=str(pattern), sparsity=sparsity)
            needed = max(longest, WHOLE.seconds, 2 * RUNS * run_seconds)
            if deadline.left < needed:
                found[str(pattern), sparsity] = point.model_copy(update={"why_not": NO_TIME})
                continue
            began = deadline.now()
            try:
                formed, reached = _pruned(program, pattern, sparsity, config, target)
                compiled = _emitted(formed, target, threads, Path(folder) / str(i))
                latency = measure(str(target), dense, compiled, inputs, threads, budget=WHOLE)
                update = {"reached": reached, "speedup": latency.speedup, "spread": latency.speedup_spread}
            except SlrcError as error:
                update = {"why_not": error.message}
            found[str(pattern), sparsity] = point.model_copy(update=update)
            longest = max(longest, deadline.now() - began)
            task.advance(f"{pattern} at {sparsity:.0%}")
    return [found[str(p), s] for p in patterns for s in sorted(SPARSITIES) if (str(p), s) in found]


def _pruned(
    program: Program, pattern: AnyPattern, sparsity: float, config: CompileConfig, target: Target
) -> tuple[Formed, float]:
    """Return the network as a compile would make it of this plan, with forms by the cost model; and what is pruned."""
    plan = plan_uniformly(program, pattern, sparsity, config)
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    return Formed(slim, _forms(slim, target)), plan.sparsity


def _forms(program: Program, target: Target) -> Forms:
    """Return the form of every layer: packed where it can be, as kernels gain the most, else by the cost model.

    Of blocks that cost the same the larger are taken.
    """
    candidates, _ = form_candidates(program, target)
    kind = FormKind.PACKED_INT8 if target.is_integer else FormKind.PACKED
    forms: dict[str, Form] = {}
    for weight, offered in candidates.items():
        packed = sorted((f for f in offered if f.kind is kind), key=lambda form: -form.size)
        form = cheapest_form(program.tensors[weight], packed or offered, program.layers[weight].groups)
        if form != DENSE:
            forms[weight] = form
    return forms


def _emitted(formed: Formed, target: Target, threads: int, folder: Path) -> Runner:
    backend = get_backend(target)
    program = to_be_timed(formed, target)
    if reasons := backend.check(program):
        raise BackendError(f"{target} cannot take {program.name}: {reasons[0]}")
    folder.mkdir()
    backend.lower(program, target, folder, portable=False)
    return backend.load(folder, threads=threads)


def _seconds(call: Callable[[], Any], now: Callable[[], float]) -> float:
    call()
    started = now()
    call()
    return now() - started
