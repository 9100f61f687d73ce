"""Latencies of a program's parts, and of what plans make of the whole, on one target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache as cached
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from slrc.backends import Artifact, Target, get_backend
from slrc.errors import BackendError, PlanError
from slrc.forms.cost import density_of
from slrc.forms.form import BLOCK_ROWS, DENSE, Form, FormKind, candidate_forms
from slrc.forms.packed_int8 import CHANNELS
from slrc.forms.packed_weight import PackedWeight
from slrc.ir.nodes import is_transposed, layer_weight
from slrc.ir.program import Layer, Program
from slrc.machine.cache import cache_folder
from slrc.measuring.choose_forms import LIMITS, job_in_form, make_ready, mixes_types, time_forms
from slrc.measuring.clock import Clock
from slrc.measuring.devices import Device, local_device
from slrc.measuring.jobs import Formed, Job, digest, form_content, to_be_timed
from slrc.measuring.latency_table import LatencyTable, SegmentLatency, WholeLatency, interpolate
from slrc.measuring.meet_budget import Measured
from slrc.measuring.timing import PART, WHOLE
from slrc.measuring.timing import Budget as TimeBudget
from slrc.passes.allocation.allocate_sparsity import why_not_pruned
from slrc.passes.analysis.cut_segments import Segment, cut_segments
from slrc.passes.quantization.find_places import is_quantizable
from slrc.pipeline import baseline, structure
from slrc.progress import Quiet, Reporter
from slrc.sparsity.budget import Menu, Option
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import AnyPattern, Block
from slrc.sparsity.plans import Plan
from slrc.sparsity.projection import project

TIMED_DENSITIES = (0.5, 0.08)
"""The shares of its groups that a layer is timed with in each pattern, besides dense; in between is interpolated."""
DENSITIES = (0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.2, 0.16, 0.125, 0.1, 0.075, 0.05)
"""The shares that an option may keep."""


class Menus(NamedTuple):
    """The options of every constrained layer, the dense one first, and what the rest of the network takes.

    Beside packed layers the rest may be faster than in the dense network, in forms of its own.
    """

    menus: tuple[Menu, ...]
    rest_ms: float
    dense_rest_ms: float

    @property
    def dense_ms(self) -> float:
        """What all segments take together before anything is pruned."""
        return self.dense_rest_ms + sum(menu.options[0].ms for menu in self.menus)

    @property
    def least_ms(self) -> float:
        """What all segments take together with every layer at its fastest."""
        return self.rest_ms + sum(min(o.ms for o in menu.options) for menu in self.menus)


class SegmentTimes(NamedTuple):
    """What a segment takes dense, and with shares of its layer's groups kept, in each pattern.

    `whole_ms` is what it takes with nothing pruned beside packed layers: no more than dense.
    """

    name: str
    constraint: Constraint | None
    dense_ms: float
    by_pattern: Mapping[AnyPattern, Mapping[float, float]]
    whole_ms: float

    def at(self, pattern: AnyPattern, density: float, work: float, dense_ms: float) -> float:
        """Return the milliseconds with a share of the groups kept, where widths leave a share of the work.

        What no group kept would take is for reading the inputs and writing the outputs. Their numbers of channels are
        taken to have fallen alike, so it goes by the root of the work.
        """
        known = {**self.by_pattern[pattern], 1.0: self.dense_ms}
        packed = interpolate(density, list(known), list(known.values()))
        (few, least), (more, most) = sorted(known.items())[:2]
        empty = min(max(least - few * (most - least) / (more - few), 0.0), packed)
        return min(empty * math.sqrt(work) + (packed - empty) * work, dense_ms)


def make_menus(
    times: Sequence[SegmentTimes], plan: Plan, program: Program, narrow: Sequence[tuple[float, float]] | None = None
) -> Menus:
    """Return the options of the layers that a plan constrains.

    Args:
        times: of all segments.
        plan: its constraints of single weights have menus.
        program: the captured model.
        narrow: for each segment, the share of its work that narrower channels leave, and the share of its dense time.
    """
    ms: dict[str, dict[Option, float]] = {}
    rest, dense_rest = 0.0, 0.0
    for segment, (work, time) in zip(times, narrow or [(1.0, 1.0)] * len(times), strict=True):
        c, dense_ms = segment.constraint, segment.dense_ms * time
        if c is None:
            rest += segment.whole_ms * time
            dense_rest += dense_ms
            continue
        sums = ms.setdefault(c.name, {})
        options = {Option(pattern=c.pattern, groups=c.groups, keep=c.groups, ms=0.0): dense_ms}
        for pattern in segment.by_pattern:
            groups = pattern.group_view(c.in_order(program.tensors[c.members[0].tensor])).shape[1]
            for density in DENSITIES:
                option = Option(pattern=pattern, groups=groups, keep=_kept(groups, density), ms=0.0)
                options.setdefault(option, segment.at(pattern, option.keep / groups, work, dense_ms))
        for option, took in options.items():
            sums[option] = sums.get(option, 0.0) + took
    menus = [
        Menu(name=c.name, options=tuple(o.model_copy(update={"ms": took}) for o, took in ms[c.name].items()))
        for c in plan
        if not c.pattern.coupled
    ]
    return Menus(tuple(menus), rest, dense_rest)


class LatencyMeter:
    """Measures a program's parts, and what plans make of the whole, on one target; what is in the cache it knows.

    Args:
        program: the captured model.
        target: where to measure; it must be one that can be timed on the device.
        threads: of the runtime; all cores by default.
        cache: a folder for measured times; `cache_folder()` by default.
        reporter: where progress goes.
        device: what to measure on; this machine by default.

    Raises:
        BackendError: the target cannot be timed there.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        *,
        threads: int | None = None,
        cache: Path | None = None,
        reporter: Reporter | None = None,
        device: Device | None = None,
    ) -> None:
        device = device or local_device()
        if why_not := device.why_not_choose(target):
            where = f"on `{device.name}`" if device.name else "here"
            raise BackendError(
                f"a latency budget is measured on the target, and {target} cannot be timed {where}: {why_not}",
                hint="give one that can be timed here, a `--device` for it, or `--sparsity` in place of the budget",
            )
        self.target, self.threads = target, threads or device.cores
        self._program, self._reporter = program, reporter or Quiet()
        self._clock = Clock(target, self.threads, cache or cache_folder(), device)
        self._dense = baseline(program)
        self._no_kernels = get_backend(target).why_not_packed(target)

    def table(self, plans: Sequence[Plan] = ()) -> LatencyTable:
        """Time the segments, and the whole, dense and at the widths of each plan.

        Raises:
            PlanError: the program has nothing that multiplies.
            BackendError: a segment or the whole does not run on the target.
        """
        programs = [self._dense, *(self._slim(plan) for plan in plans)]
        names = [self._program.called(segment.anchor) for segment in cut_segments(self._program)]
        if not names:
            raise PlanError(f"{self._program.name} has no layer or matrix product to time")
        segments = []
        with self._reporter.task(f"timing parts on {self.target}", len(names)) as task:
            for name, versions in zip(names, zip(*map(cut_segments, programs), strict=True), strict=True):
                ms = self._times([Job.of_segment(v) for v in versions], PART, f"`{name}`")
                segments.append(SegmentLatency(name=name, macs=tuple(v.macs for v in versions), ms=ms))
                task.advance(name)
        sums = [sum(one) for one in zip(*(s.ms for s in segments), strict=True)]
        whole = self._times([Job.of_whole(p) for p in programs], WHOLE, self._program.name)
        return self._made(segments, [WholeLatency(segments_ms=s, ms=ms) for s, ms in zip(sums, whole, strict=True)])

    def options(self, plan: Plan, patterns: Sequence[AnyPattern]) -> list[SegmentTimes]:
        """Time every segment, those of constrained layers in each pattern that the layer can take.

        Args:
            plan: constrains single weights.
            patterns: what a layer may be pruned by.

        Raises:
            BackendError: a dense segment does not run on the target.
        """
        if any(isinstance(pattern, Block) for pattern in patterns):
            make_ready(self._clock.target, self._reporter)
        constraint_of = {c.members[0].tensor: c for c in plan}
        captured, segments = cut_segments(self._program), cut_segments(self._dense)
        nodes = {node.name: node for node in self._program.nodes}
        found = []
        with self._reporter.task(f"timing options on {self.target}", len(segments)) as task:
            for before, segment in zip(captured, segments, strict=True):
                weight = layer_weight(nodes[before.anchor])
                c = constraint_of.get(weight or "")
                if c is None:
                    found.append(self._time_whole(segment, weight, before))
                else:
                    found.append(self._time_options(c, segment, patterns))
                task.advance(self._program.called(before.anchor))
        return found

    def whole(self, segments_ms: float) -> LatencyTable:
        """Return a table of the dense network alone, whose segments take so long together."""
        ms = self._times([Job.of_whole(self._dense)], WHOLE, self._program.name)[0]
        return self._made([], [WholeLatency(segments_ms=segments_ms, ms=ms)])

    def measure(self, plan: Plan) -> Measured:
        """Return the latency of what a plan makes of the program as a share of the dense one, measured in turns.

        Layers have the forms that are chosen for them, as in a compile.

        Raises:
            BackendError: one of the two does not run on the target.
        """
        slim = self._slim(plan)
        choice = time_forms(slim, self._clock, self._reporter)
        jobs = [Job.of_whole(self._dense), Job.of_whole(slim, choice.forms)]
        dense, compiled = self._times(jobs, WHOLE, self._program.name)
        named = {c.members[0].tensor: c.name for c in plan if not c.pattern.coupled}
        return Measured(compiled / dense, {named[weight] for weight in choice.idle if weight in named})

    def forget(self) -> bool:
        """Forget the times that another run measured, as `Clock.forget`."""
        return self._clock.forget()

    def _time_whole(self, segment: Segment, weight: str | None, before: Segment) -> SegmentTimes:
        """Time a segment that nothing is pruned of, dense and in the forms that its layer has all the same.

        `before` is the segment as it was captured, and `weight` its layer's, if it has one.
        """
        jobs = [Job.of_segment(segment)]
        if weight is not None:
            layer = self._program.layers[weight]
            tensor = layer.outputs_first(self._program.tensors[weight])
            forms = candidate_forms(tensor, layer.op, layer.groups, is_integer=self._is_integer(layer))
            can_be = [form for form in forms if form != DENSE and self._can_be(form, layer)]
            jobs += [job_in_form(segment, form, tensor, layer.groups) for form in can_be]
        dense, *others = self._clock.times(jobs, PART)
        if dense.why_not:
            name = self._program.called(before.anchor)
            raise BackendError(f"`{name}` cannot be timed on {self.target}: {dense.why_not}")
        return SegmentTimes(before.anchor, None, dense.ms, {}, min(t.ms for t in (dense, *others)))

    def _time_options(self, c: Constraint, segment: Segment, patterns: Sequence[AnyPattern]) -> SegmentTimes:
        anchor = next(n for n in segment.module.graph.nodes if layer_weight(n) is not None)
        stored = segment.module.get_parameter(str(anchor.args[1].target)).detach()  # type: ignore[union-attr]
        layer = self._program.layers[c.members[0].tensor]
        weight, variants = layer.outputs_first(stored), _Variants(segment, layer, self.target)
        timed: list[tuple[AnyPattern, float, Job]] = []
        for pattern in patterns:
            if why_not_pruned(layer, pattern):
                continue
            groups = pattern.group_view(weight).shape[1]
            for density in TIMED_DENSITIES:
                keep = _kept(groups, density)
                zeros = cached(partial(_pruned, pattern, weight, keep))
                timed += [
                    (pattern, density, variants.job(zeros, form, work))
                    for form, work in self._forms(pattern, keep / groups, zeros, layer)
                ]
        timings = self._clock.times([Job.of_segment(segment), *(job for *_, job in timed)], PART)
        if timings[0].why_not:
            raise BackendError(f"`{layer.name}` cannot be timed on {self.target}: {timings[0].why_not}")
        dense_ms = timings[0].ms
        found: dict[AnyPattern, dict[float, float]] = {}
        for (pattern, density, _), timing in zip(timed, timings[1:], strict=True):
            known = found.setdefault(pattern, {})
            known[density] = min(known.get(density, dense_ms), timing.ms)
        return SegmentTimes(segment.anchor, c, dense_ms, found, dense_ms)

    def _forms(
        self, pattern: AnyPattern, density: float, zeros: Callable[[], Tensor], layer: Layer
    ) -> list[tuple[Form, float]]:
        """Return the forms that use a pattern's zeros on the target, with the share of the work that each does."""
        is_integer = self._is_integer(layer)
        if isinstance(pattern, Block) and pattern.rows in BLOCK_ROWS and pattern.cols in (1, CHANNELS):
            of_floats, of_integers = (Form(kind, pattern.rows) for kind in (FormKind.PACKED, FormKind.PACKED_INT8))
            found = [(of_floats, density)] if pattern.cols == 1 or not is_integer else []
            if is_integer:
                exact = pattern.cols == CHANNELS
                found.append((of_integers, density if exact else density_of(zeros(), of_integers, layer.groups)))
        else:
            forms = candidate_forms(zeros(), layer.op, layer.groups, is_integer=is_integer)
            found = [(form, density_of(zeros(), form, layer.groups)) for form in forms if form != DENSE]
        return [(form, share) for form, share in found if self._can_be(form, layer)]

    def _nodes_of(self, layer: Layer) -> list[Node]:
        return [node for node in self._program.nodes if node.name in layer.nodes]

    def _is_integer(self, layer: Layer) -> bool:
        return mixes_types(self.target) and all(map(is_quantizable, self._nodes_of(layer)))

    def _can_be(self, form: Form, layer: Layer) -> bool:
        """Whether the target has what a layer needs to run in a form."""
        why_not = LIMITS.get(form.kind)
        return why_not is None or not (
            self._no_kernels or any(why_not(node, form.size) for node in self._nodes_of(layer))
        )

    def _slim(self, plan: Plan) -> Program:
        return structure(self._program, plan, Masks.project(plan, self._program.tensors))

    def _made(self, segments: Sequence[SegmentLatency], whole: Sequence[WholeLatency]) -> LatencyTable:
        return LatencyTable(
            target=str(self.target),
            threads=self.threads,
            machine=self._clock.machine["cpu"],
            segments=tuple(segments),
            whole=tuple(whole),
        )

    def _times(self, jobs: Sequence[Job], budget: TimeBudget, what: str) -> tuple[float, ...]:
        timings = self._clock.times(jobs, budget)
        if reason := next((t.why_not for t in timings if t.why_not), ""):
            raise BackendError(f"{what} cannot be timed on {self.target}: {reason}")
        return tuple(t.ms for t in timings)


def _kept(groups: int, density: float) -> int:
    return min(groups, max(1, round(groups * density)))


def _pruned(pattern: AnyPattern, weight: Tensor, keep: int) -> Tensor:
    return weight * project(pattern, weight, keep)


class _Variants:
    """Jobs of one segment with other zeros in its layer. It is emitted packed once, and repacked for each."""

    def __init__(self, segment: Segment, layer: Layer, target: Target) -> None:
        self._segment, self._layer, self._target = segment, layer, target
        self._is_unrolled = any(is_transposed(n) for n in segment.module.graph.nodes if layer_weight(n) is not None)
        self._packed: tuple[Artifact, TemporaryDirectory[str]] | None = None

    def job(self, zeros: Callable[[], Tensor], form: Form, density: float) -> Job:
        """Return the job of the segment with other weights in a form, which does a share of the dense work.

        The weights, outputs first, are made when they are needed: where the time is known, they are not.
        """
        segment, layer, backend = self._segment, self._layer, get_backend(self._target)

        def make() -> Formed:
            own = segment.program()
            anchor = next(w for n in own.nodes if (w := layer_weight(n)) is not None)
            return Formed(own.with_tensors({anchor: layer.as_stored(zeros())}), {anchor: form}, is_part=True)

        def emit(folder: Path) -> None:
            if self._packed is None:
                place = TemporaryDirectory()
                program = to_be_timed(make(), self._target)
                self._packed = backend.lower(program, self._target, Path(place.name), portable=False), place
            artifact, first = self._packed
            backend.repack(artifact, Path(first.name), PackedWeight.of(zeros(), form.size, layer.groups), folder)

        name = digest(segment.module, segment.inputs, form_content(form, density))
        # What is packed of a transposed convolution is no longer its weight, but one of the phases of its stride.
        is_repacked = form.kind is FormKind.PACKED and not self._is_unrolled
        return Job(name, make, segment.inputs, emit if is_repacked else None)
