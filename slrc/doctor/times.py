"""Where a network's time goes on a target, and how fast it becomes when it is pruned: timed, as far as time allows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from slrc.backends import Runner, Target, get_backend
from slrc.config import CompileConfig
from slrc.doctor.deadline import Deadline, Overtime
from slrc.doctor.diagnosis import PartTime, SpeedupPoint
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
from slrc.pipeline import structure
from slrc.progress import Reporter
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import NM, AnyPattern, Block, Channel, Columns

SPARSITIES = (0.5, 0.75, 0.9)
QUARTER, QUARTER_OF_COUPLED = 0.75, 0.5
"""The sparsities that leave about a quarter of the weights; of channels a layer loses inputs and outputs."""
PART = Budget(0.2, 3)
WHOLE = Budget(1.5, BLOCKS)
NO_TIME = "no time was left, `--seconds` gives more"
RUNS = 2 * BLOCKS + 6
"""How often each of two networks runs at least, where they are timed in turns."""


def patterns_for(target: Target) -> tuple[AnyPattern, ...]:
    """Return the patterns that may make a network faster on a target, those that most do first."""
    block = Block(8, 4 if target.is_integer else 1)
    blocks: tuple[AnyPattern, ...] = () if get_backend(target).why_not_packed(target) else (block,)
    pairs: tuple[AnyPattern, ...] = (NM(2, 4),) if target.backend.startswith("tensorrt") else ()
    return (Channel(), *blocks, *pairs, Columns(2))


def time_parts(dense: Program, clock: Clock, deadline: Deadline, reporter: Reporter) -> list[PartTime]:
    """Return what each part of the dense network takes, in its order; the largest are timed first.

    `dense` has gone through `baseline`. What there was no time for has no milliseconds.
    """
    segments = cut_segments(dense)
    named, took = {s.anchor: dense.called(s.anchor) for s in segments}, dict[str, float | None]()
    task_of_all = reporter.task(f"timing parts on {clock.target}", len(segments))
    with task_of_all as task, suppress(Overtime), deadline.enforced():
        for segment in sorted(segments, key=lambda s: -s.macs):
            if deadline.left <= 0:
                break
            timing = clock.times([Job.of_segment(segment)], PART)[0]
            if timing.why_not:
                raise BackendError(f"`{named[segment.anchor]}` cannot be timed on {clock.target}: {timing.why_not}")
            took[segment.anchor] = timing.ms
            task.advance(named[segment.anchor])
    return [PartTime(name=named[s.anchor], macs=s.macs, ms=took.get(s.anchor)) for s in segments]


def time_speedups(
    dense: Program,
    patterns: Sequence[AnyPattern],
    config: CompileConfig,
    target: Target,
    threads: int,
    deadline: Deadline,
    reporter: Reporter,
) -> list[SpeedupPoint]:
    """Time the whole network, pruned by each pattern at each sparsity, in turns with the dense one.

    `dense` has gone through `baseline`, and is what is pruned too: of a network whose batch norms are folded already
    the same numbers are left, in half the time. What cannot be made or run is a point with the reason, and so is what
    there was no time for.

    Raises:
        SlrcError: the dense network cannot be emitted or run.
    """
    wanted = _wanted(patterns)
    found = {(str(p), s): SpeedupPoint(pattern=str(p), sparsity=s, why_not=NO_TIME) for p, s in wanted}
    with (
        tempfile.TemporaryDirectory() as folder,
        reporter.task("timing pruned networks", len(wanted)) as task,
        suppress(Overtime),
        deadline.enforced(),
    ):
        inputs, began = dense.flat_inputs(), deadline.now()
        runner = _emitted(Formed(dense), target, threads, Path(folder) / "dense")
        run_seconds = _seconds(runner.prepare(*inputs), deadline.now)
        longest = max(deadline.now() - began, WHOLE.seconds, 2 * RUNS * run_seconds)
        for i, (pattern, sparsity) in enumerate(wanted):
            if deadline.left < longest:
                break
            began = deadline.now()
            try:
                formed, reached = _pruned(dense, pattern, sparsity, config, target)
                compiled = _emitted(formed, target, threads, Path(folder) / str(i))
                latency = measure(str(target), runner, compiled, inputs, threads, budget=WHOLE)
                update = {"reached": reached, "speedup": latency.speedup, "spread": latency.speedup_spread}
            except SlrcError as error:
                update = {"why_not": error.message}
            point = SpeedupPoint(pattern=str(pattern), sparsity=sparsity)
            found[str(pattern), sparsity] = point.model_copy(update=update)
            longest = max(longest, deadline.now() - began)
            task.advance(f"{pattern} at {sparsity:.0%}")
    return [found[str(p), s] for p in patterns for s in SPARSITIES if (str(p), s) in found]


def _wanted(patterns: Sequence[AnyPattern]) -> list[tuple[AnyPattern, float]]:
    """Return what is timed, in that order: first of each pattern the sparsity that leaves about a quarter."""

    def in_order(pattern: AnyPattern) -> list[float]:
        usual = QUARTER_OF_COUPLED if pattern.coupled else QUARTER
        return sorted(SPARSITIES, key=lambda s: abs(s - (pattern.fixed_sparsity or usual)))

    turns = zip(*map(in_order, patterns), strict=True)
    return [(p, s) for turn in turns for p, s in zip(patterns, turn, strict=True) if p.fixed_sparsity in (None, s)]


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
        layer = program.layers[weight]
        form = cheapest_form(layer.outputs_first(program.tensors[weight]), packed or offered, layer.groups)
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
