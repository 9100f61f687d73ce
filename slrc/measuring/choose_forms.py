"""Choosing the form of every layer: by timing on the target where that can be, else by a cost model.

A layer is timed with the operators that follow it, in each form that its zeros allow. The choices are then tried on
the whole network, beside all layers dense, all split, all grouped and all packed: neighbours share layouts, so that a
layer that is fastest alone may be a hindrance in its place. What is fastest as a whole is taken, so that a compiled
model is never slower than the dense one by more than the noise of the clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from slrc.backends import Target, get_backend
from slrc.errors import BackendError
from slrc.forms.cost import cheapest_form, density_of
from slrc.forms.form import (
    DENSE,
    IN_FLOAT,
    LEAST_ZEROS,
    Form,
    FormChoice,
    FormKind,
    Forms,
    LayerChoice,
    candidate_forms,
)
from slrc.ir.nodes import layer_weight
from slrc.ir.program import Program
from slrc.machine.cache import cache_folder
from slrc.measuring.clock import Clock
from slrc.measuring.devices import Device, Timing, local_device
from slrc.measuring.jobs import Formed, Job, digest, form_content
from slrc.measuring.timing import PART_RACE, WHOLE_RACE
from slrc.passes.analysis.cut_segments import Segment, cut_segments
from slrc.passes.forms.pack_blocks import why_not_packed, why_not_packed_int8
from slrc.passes.quantization.find_places import is_quantizable
from slrc.progress import Quiet, Reporter

LIMITS = {FormKind.PACKED: why_not_packed, FormKind.PACKED_INT8: why_not_packed_int8}
"""What says why a layer cannot have a form that is for the kernels."""
NETWORK = "the network"
UNPACKED = (FormKind.DENSE, FormKind.FLOAT32)
"""What a layer is that keeps its zeros."""
Candidates = Mapping[str, Sequence[Form]]
FormTimes = dict[Form, Timing]
"""What a layer takes in each of its forms."""
Lost = Iterable[tuple[str, str, str]]
"""What is not had: a layer or network, the form, and the reason."""


def choose_forms(
    program: Program,
    target: Target,
    *,
    threads: int | None = None,
    cache: Path | None = None,
    reporter: Reporter | None = None,
    device: Device | None = None,
    in_float: Collection[str] = (),
) -> FormChoice:
    """Return the form of every layer of a program that went through `structure`.

    What fails with a form, on its way to the target or there, costs that form only: it is dropped, with a note.

    Args:
        program: its weights hold the zeros.
        target: where it will run.
        threads: of the runtime; all cores by default.
        cache: a folder for measured times; `cache_folder()` by default.
        reporter: where progress goes.
        device: what it is timed on; this machine by default.
        in_float: weights of layers that are not to be in int8.
    """
    device = device or local_device()
    count = threads or device.cores
    if device.why_not_choose(target):
        return _by_cost(program, target, count, *form_candidates(program, target, in_float))
    return time_forms(program, Clock(target, count, cache or cache_folder(), device), reporter, in_float)


def time_forms(
    program: Program, clock: Clock, reporter: Reporter | None = None, in_float: Collection[str] = ()
) -> FormChoice:
    """Return the form of every layer, by what a clock says. See `choose_forms`."""
    target, reporter = clock.target, reporter or Quiet()
    candidates, lost = form_candidates(program, target, in_float)
    if not candidates:
        return FormChoice(target=str(target), threads=clock.threads, dropped=_notes(lost, target))
    if any(form.kind in LIMITS for forms in candidates.values() for form in forms):
        make_ready(target, reporter)
    ms = _time_layers(program, candidates, clock, reporter)
    whole = _time_whole(program, ms, clock, reporter)
    lost += [(weight, str(form), t.why_not) for weight, times in ms.items() for form, t in times.items() if t.why_not]
    lost += [(NETWORK, name, t.why_not) for name, (_, t) in whole.items() if t.why_not]
    run = {name: found for name, found in whole.items() if not found[1].why_not}
    taken = min(run, key=lambda name: run[name][1].ms, default="all dense")
    forms = run[taken][0] if run else {}
    failed = {what for what, *_ in lost}
    unpacked = [w for w in candidates if forms.get(w, DENSE).kind in UNPACKED and not failed & {w, NETWORK}]
    return FormChoice(
        target=str(target),
        threads=clock.threads,
        dropped=_notes(lost, target),
        idle=tuple(w for w in unpacked if _loses_blocks(program, w, candidates[w])),
        taken=taken,
        whole_ms={name: timing.ms for name, (_, timing) in run.items()},
        layers=tuple(_layer(program, weight, forms.get(weight, DENSE), ms[weight]) for weight in candidates),
    )


def form_candidates(
    program: Program, target: Target, in_float: Collection[str] = ()
) -> tuple[dict[str, list[Form]], list[tuple[str, str, str]]]:
    """Return the forms of every layer that has more than one, and the packed ones that are not to be had.

    What is packed with no zeros is so for other packed layers alone. Layers in `in_float` have no forms in int8.
    """
    nodes, no_kernels = {node.name: node for node in program.nodes}, get_backend(target).why_not_packed(target)
    mixes = mixes_types(target)
    possible: dict[str, list[Form]] = {weight: [] for weight in program.layers}
    lost: list[tuple[str, str, str]] = []
    packs = False
    for weight, layer in program.layers.items():
        tensor = layer.outputs_first(program.tensors[weight])
        is_integer = mixes and all(is_quantizable(nodes[name]) for name in layer.nodes)
        for form in candidate_forms(tensor, layer.op, layer.groups, is_integer=is_integer):
            if is_integer and weight in in_float and form.kind not in IN_FLOAT:
                continue
            if form.kind in LIMITS:
                limits = (LIMITS[form.kind](nodes[name], form.size) for name in layer.nodes)
                has_zeros = _has_zeros(tensor, form, layer.groups)
                if reason := no_kernels or next(filter(None, limits), ""):
                    lost += [(weight, str(form), reason)] if has_zeros else []
                    continue
                packs |= has_zeros
            possible[weight].append(form)
    offered = {w: [f for f in forms if packs or f.kind not in LIMITS] for w, forms in possible.items()}
    return {w: forms for w, forms in offered.items() if len(forms) > 1}, lost


def make_ready(target: Target, reporter: Reporter) -> None:
    """Compile a target's kernels before anything is timed, and say so; where they cannot be had, their forms say so."""
    with suppress(BackendError):
        get_backend(target).make_ready(target, reporter.note)


def mixes_types(target: Target) -> bool:
    """Whether a target runs each layer in int8 or in float32 as that layer's form says."""
    return target.is_integer and get_backend(target).scheme.everywhere


def _outputs_first(program: Program, weight: str) -> Tensor:
    return program.layers[weight].outputs_first(program.tensors[weight])


def _notes(lost: Lost, target: Target) -> tuple[str, ...]:
    """Return a note for each reason, with what it holds for."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for what, form, reason in lost:
        by_reason.setdefault(reason, {}).setdefault(what, []).append(form)
    return tuple(f"on {target} {_listed(whats)}: {reason}" for reason, whats in by_reason.items())


def _loses_blocks(program: Program, weight: str, forms: Iterable[Form]) -> bool:
    packed = (form for form in forms if form.kind in LIMITS)
    seen, groups = _outputs_first(program, weight), program.layers[weight].groups
    return any(_has_zeros(seen, form, groups) for form in packed)


def _has_zeros(weight: Tensor, form: Form, groups: int) -> bool:
    return density_of(weight, form, groups) <= 1 - LEAST_ZEROS


def _listed(whats: Mapping[str, Sequence[str]]) -> str:
    (first, forms), others = next(iter(whats.items())), len(whats) - 1
    return f"{first}" + (f" and {others} more are" if others else " is") + f" not {' or '.join(forms)}"


def _layer(program: Program, weight: str, form: Form, times: Mapping[Form, Timing]) -> LayerChoice:
    density = density_of(_outputs_first(program, weight), form, program.layers[weight].groups)
    ms = {str(f): t.ms for f, t in times.items() if not t.why_not}
    return LayerChoice(weight=weight, form=form, density=density, ms=ms)


def _by_cost(program: Program, target: Target, threads: int, candidates: Candidates, lost: Lost) -> FormChoice:
    if not candidates:
        return FormChoice(target=str(target), threads=threads, dropped=_notes(lost, target))
    cheapest = {
        w: cheapest_form(_outputs_first(program, w), c, program.layers[w].groups) for w, c in candidates.items()
    }
    layers = tuple(_layer(program, weight, form, {}) for weight, form in cheapest.items())
    return FormChoice(
        target=str(target), threads=threads, dropped=_notes(lost, target), taken="cost model", layers=layers
    )


def _time_layers(program: Program, candidates: Candidates, clock: Clock, reporter: Reporter) -> dict[str, FormTimes]:
    """Return what every layer takes in each form; one that is used several times, all of them together."""
    weight_of = {node: weight for weight in candidates for node in program.layers[weight].nodes}
    segments = [(s, weight_of[s.anchor]) for s in cut_segments(program) if s.anchor in weight_of]
    sums: dict[str, FormTimes] = {weight: dict.fromkeys(forms, Timing(0.0)) for weight, forms in candidates.items()}
    with reporter.task(f"timing forms on {clock.target}", len(segments)) as task:
        for segment, weight in segments:
            tensor, groups = _outputs_first(program, weight), program.layers[weight].groups
            timings = clock.times(
                [job_in_form(segment, form, tensor, groups) for form in candidates[weight]], PART_RACE
            )
            for form, timing in zip(candidates[weight], timings, strict=True):
                before = sums[weight][form]
                sums[weight][form] = Timing(before.ms + timing.ms, before.why_not or timing.why_not)
            task.advance(program.layers[weight].name)
    return sums


def job_in_form(segment: Segment, form: Form, weight: Tensor, groups: int) -> Job:
    """Return the job of a segment with its layer, whose weight is given outputs first, in a form.

    Layers alike in shape and in how many blocks or channels they keep take alike times.
    """

    def make() -> Formed:
        own = segment.program()
        anchor = next(w for n in own.nodes if (w := layer_weight(n)) is not None)
        return Formed(own, {anchor: form}, is_part=True)

    name = digest(segment.module, segment.inputs, form_content(form, density_of(weight, form, groups)))
    return Job(name, make, segment.inputs)


def _time_whole(
    program: Program, ms: Mapping[str, FormTimes], clock: Clock, reporter: Reporter
) -> dict[str, tuple[Forms, Timing]]:
    """Return the forms and times of every network that is tried, by a name."""
    groups: dict[str, Sequence[FormKind]] = {f"all {kind}": [kind] for kind in FormKind}
    if mixes_types(clock.target):
        groups["each its fastest in float32"] = IN_FLOAT
        groups["each its fastest in int8"] = [kind for kind in FormKind if kind not in IN_FLOAT]
    tried: dict[str, Forms] = {"each its fastest": _fastest(ms, list(FormKind))}
    for name, kinds in groups.items():
        if (forms := _fastest(ms, kinds)) not in tried.values():
            tried[name] = forms
    reporter.note(f"timing {program.name} on {clock.target}: {', '.join(tried)}")
    timings = clock.times([Job.of_whole(program, forms) for forms in tried.values()], WHOLE_RACE)
    return {name: (forms, timing) for (name, forms), timing in zip(tried.items(), timings, strict=True)}


def _fastest(ms: Mapping[str, FormTimes], kinds: Sequence[FormKind]) -> Forms:
    """Return the fastest form of these kinds for every layer; one that has none of them stays dense."""
    forms: dict[str, Form] = {}
    for weight, times in ms.items():
        allowed = {form: t.ms for form, t in times.items() if form.kind in kinds and not t.why_not}
        if allowed and (form := min(allowed, key=lambda f: allowed[f])) != DENSE:
            forms[weight] = form
    return forms
