"""Choosing the form of every layer: by timing on the target where it runs here, else by a cost model.

A layer is timed with the operators that follow it, in each form that its zeros allow. The choices are then tried on
the whole network, beside all layers dense, all split, all grouped and all packed: neighbours share layouts, so that a
layer that is fastest alone may be a hindrance in its place. What is fastest as a whole is taken, so that a compiled
model is never slower than the dense one by more than the noise of the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from slrc.backends import Target, get_backend
from slrc.forms.cost import cheapest_form, density_of
from slrc.forms.form import DENSE, LEAST_ZEROS, Form, FormChoice, FormKind, Forms, LayerChoice, candidate_forms
from slrc.ir.nodes import layer_weight
from slrc.ir.program import Program
from slrc.machine.cache import cache_folder
from slrc.machine.cores import usable_cores
from slrc.measuring.latency_timing import PART_BUDGET_S, WHOLE_BUDGET_S, Clock, Job, whole_job
from slrc.passes.analysis.cut_segments import Segment, cut_segments
from slrc.pipeline import apply_forms
from slrc.progress import Quiet, Reporter


def choose_forms(
    program: Program,
    target: Target,
    *,
    threads: int | None = None,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> FormChoice:
    """Return the form of every layer of a program that went through `structure`.

    Args:
        program: its weights hold the zeros.
        target: where it will run.
        threads: of the runtime; all cores by default.
        cache: a folder for measured times; `cache_folder()` by default.
        reporter: where progress goes.
    """
    backend = get_backend(target)
    why_not_packed = backend.why_not_packed(target)
    count = threads or usable_cores()
    candidates: dict[str, list[Form]] = {}
    lost = ""
    for weight, found in _possible_forms(program).items():
        allowed = [f for f in found if f.kind is not FormKind.PACKED or not why_not_packed]
        if len(allowed) > 1:
            candidates[weight] = allowed
        elif len(found) > 1:
            lost = why_not_packed
    if not candidates:
        return FormChoice(target=str(target), threads=count, lost=lost)
    if backend.available(target).why_not_run:
        return _by_cost(program, target, count, candidates, lost)
    clock = Clock(target, count, cache or cache_folder())
    ms = _time_layers(program, candidates, clock, reporter or Quiet())
    whole = _time_whole(program, ms, clock)
    taken = min(whole, key=lambda name: whole[name][1])
    forms = whole[taken][0]
    return FormChoice(
        target=str(target),
        threads=count,
        lost=lost,
        taken=taken,
        whole_ms={name: took for name, (_, took) in whole.items()},
        layers=tuple(_layer(program, weight, forms.get(weight, DENSE), ms[weight]) for weight in candidates),
    )


def _possible_forms(program: Program) -> dict[str, list[Form]]:
    """Return the forms of every layer; what is packed with no zeros is so for other packed layers alone."""
    forms = {w: candidate_forms(program.tensors[w], x.op, x.groups) for w, x in program.layers.items()}
    if any(
        f.kind is FormKind.PACKED and density_of(program.tensors[w], f, program.layers[w].groups) <= 1 - LEAST_ZEROS
        for w, found in forms.items()
        for f in found
    ):
        return forms
    return {w: [f for f in found if f.kind is not FormKind.PACKED] for w, found in forms.items()}


FormTimes = dict[Form, float]
"""Milliseconds of a layer in each of its forms."""


def _layer(program: Program, weight: str, form: Form, ms: Mapping[Form, float]) -> LayerChoice:
    density = density_of(program.tensors[weight], form, program.layers[weight].groups)
    return LayerChoice(weight=weight, form=form, density=density, ms={str(f): took for f, took in ms.items()})


def _by_cost(
    program: Program, target: Target, threads: int, candidates: Mapping[str, Sequence[Form]], lost: str
) -> FormChoice:
    cheapest = {w: cheapest_form(program.tensors[w], c, program.layers[w].groups) for w, c in candidates.items()}
    layers = tuple(_layer(program, weight, form, {}) for weight, form in cheapest.items())
    return FormChoice(target=str(target), threads=threads, lost=lost, taken="cost model", layers=layers)


def _time_layers(
    program: Program, candidates: Mapping[str, Sequence[Form]], clock: Clock, reporter: Reporter
) -> dict[str, FormTimes]:
    """Return what every layer takes in each form; one that is used several times, all of them together."""
    weight_of = {node: weight for weight in candidates for node in program.layers[weight].nodes}
    segments = [(s, weight_of[s.anchor]) for s in cut_segments(program) if s.anchor in weight_of]
    ms = {weight: dict.fromkeys(forms, 0.0) for weight, forms in candidates.items()}
    with reporter.task(f"timing forms on {clock.target}", len(segments)) as task:
        for segment, weight in segments:
            tensor, groups = program.tensors[weight], program.layers[weight].groups
            times = clock.times([_job(segment, form, tensor, groups) for form in ms[weight]], PART_BUDGET_S)
            for form, took in zip(candidates[weight], times, strict=True):
                ms[weight][form] += took
            task.advance(weight)
    return ms


def _job(segment: Segment, form: Form, weight: Tensor, groups: int) -> Job:
    """Layers alike in shape and in how many blocks or channels they keep take alike times."""
    name = f"{segment.digest} {form} {density_of(weight, form, groups):.2f}"

    def make() -> Program:
        own = segment.program()
        anchor = next(w for n in own.nodes if (w := layer_weight(n)) is not None)
        return apply_forms(own, {anchor: form})

    return sha256(name.encode()).hexdigest()[:24], make, segment.inputs


def _time_whole(program: Program, ms: Mapping[str, FormTimes], clock: Clock) -> dict[str, tuple[Forms, float]]:
    """Return the forms and milliseconds of every network that is tried, by a name."""
    tried: dict[str, Forms] = {"each its fastest": _fastest(ms, list(FormKind))}
    for kind in FormKind:
        if (forms := _fastest(ms, [kind])) not in tried.values():
            tried[f"all {kind}"] = forms
    jobs = [whole_job(apply_forms(program, forms)) for forms in tried.values()]
    times = clock.times(jobs, WHOLE_BUDGET_S)
    return {name: (forms, took) for (name, forms), took in zip(tried.items(), times, strict=True)}


def _fastest(ms: Mapping[str, FormTimes], kinds: Sequence[FormKind]) -> Forms:
    """Return the fastest form of these kinds for every layer; one that has none of them stays dense."""
    forms: dict[str, Form] = {}
    for weight, times in ms.items():
        allowed = {form: took for form, took in times.items() if form.kind in kinds}
        if allowed and (form := min(allowed, key=lambda f: allowed[f])) != DENSE:
            forms[weight] = form
    return forms
