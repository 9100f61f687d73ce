"""Choosing the form of every layer: by timing on the target where it runs here, else by a cost model.

A layer is timed with the operators that follow it, in each form that its zeros allow. The choices are then tried on
the whole network, beside all layers packed, all split and all dense: neighbours share layouts, so that a layer that is
fastest alone may be a hindrance in its place. What is fastest as a whole is taken, so that a compiled model is never
slower than the dense one by more than the noise of the clock.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from slrc.backends import Target, get_backend
from slrc.form_cost import cheapest_form, density_of
from slrc.forms import DENSE, Form, FormChoice, FormKind, Forms, LayerChoice, candidate_forms
from slrc.latency_timing import PART_BUDGET_S, WHOLE_BUDGET_S, Clock, Job, cache_folder, whole_job
from slrc.passes.cut_segments import Segment, cut_segments
from slrc.pipeline import form_passes, run_passes
from slrc.plans import Masks, Plan
from slrc.program import Program, layer_weight
from slrc.progress import Quiet, Reporter

LIKED = {
    FormKind.PACKED: (FormKind.PACKED,),
    FormKind.SPLIT: (FormKind.SPLIT,),
    FormKind.GROUPED: (FormKind.GROUPED, FormKind.SPLIT),
}
"""Whole networks that are tried: for each a kind of form, and what takes its place where a layer has none."""


def choose_forms(
    program: Program,
    target: Target,
    *,
    threads: int | None = None,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> FormChoice:
    """Return the form of every layer of a program that went through `STRUCTURE`.

    Args:
        program: its weights hold the zeros.
        target: where it will run.
        threads: of the runtime; all cores by default.
        cache: a folder for measured times; `cache_folder()` by default.
        reporter: where progress goes.
    """
    backend = get_backend(target)
    why_not_packed = backend.why_not_packed(target)
    count = threads or len(os.sched_getaffinity(0))
    candidates: dict[str, list[Form]] = {}
    lost = ""
    for weight, layer in program.layers.items():
        found = candidate_forms(program.tensors[weight], layer.op, layer.groups)
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
    layers = _time_layers(program, candidates, clock, reporter or Quiet())
    whole = _time_whole(program, layers, candidates, clock)
    fastest = min(whole, key=lambda name: whole[name][1])
    forms = whole[fastest][0]
    return FormChoice(
        target=str(target),
        threads=count,
        lost=lost,
        taken=fastest,
        whole_ms={name: ms for name, (_, ms) in whole.items()},
        layers=tuple(x.model_copy(update={"form": str(forms.get(x.weight, DENSE))}) for x in layers),
    )


def apply_forms(program: Program, forms: Forms) -> Program:
    """Return the program with its layers in these forms."""
    return run_passes(form_passes(forms), program, _NOTHING, Masks())


def _by_cost(
    program: Program, target: Target, threads: int, candidates: Mapping[str, Sequence[Form]], lost: str
) -> FormChoice:
    layers = []
    for weight, forms in candidates.items():
        tensor, groups = program.tensors[weight], program.layers[weight].groups
        chosen = cheapest_form(tensor, forms, groups)
        layers.append(LayerChoice(weight=weight, form=str(chosen), density=density_of(tensor, chosen, groups)))
    return FormChoice(target=str(target), threads=threads, lost=lost, taken="cost model", layers=tuple(layers))


def _time_layers(
    program: Program, candidates: Mapping[str, Sequence[Form]], clock: Clock, reporter: Reporter
) -> list[LayerChoice]:
    weight_of = {node: weight for weight, layer in program.layers.items() for node in layer.nodes}
    segments = [(s, weight_of[s.anchor]) for s in cut_segments(program) if weight_of.get(s.anchor) in candidates]
    ms: dict[str, dict[Form, float]] = {}
    with reporter.task(f"timing forms on {clock.target}", len(segments)) as task:
        for segment, weight in segments:
            forms = candidates[weight]
            tensor, groups = program.tensors[weight], program.layers[weight].groups
            times = clock.times([_job(segment, form, tensor, groups) for form in forms], PART_BUDGET_S)
            known = ms.setdefault(weight, dict.fromkeys(forms, 0.0))
            for form, taken in zip(forms, times, strict=True):
                known[form] += taken
            task.advance(weight)
    layers = []
    for weight, times_of in ms.items():
        fastest = min(times_of, key=lambda form: times_of[form])
        density = density_of(program.tensors[weight], fastest, program.layers[weight].groups)
        layers.append(
            LayerChoice(weight=weight, form=str(fastest), density=density, ms={str(f): t for f, t in times_of.items()})
        )
    return layers


def _job(segment: Segment, form: Form, weight: Tensor, groups: int) -> Job:
    """Layers alike in shape and in how many blocks or channels they keep take alike times."""
    name = f"{segment.digest} {form} {density_of(weight, form, groups):.2f}"

    def make() -> Program:
        own = segment.program()
        anchor = next(w for n in own.nodes if (w := layer_weight(n)) is not None)
        return apply_forms(own, {anchor: form})

    return sha256(name.encode()).hexdigest()[:24], make, segment.inputs


def _time_whole(
    program: Program, layers: Sequence[LayerChoice], candidates: Mapping[str, Sequence[Form]], clock: Clock
) -> dict[str, tuple[Forms, float]]:
    """Return the forms and milliseconds of every network that is tried, by a name."""
    tried: dict[str, Forms] = {"each its fastest": {x.weight: x.chosen for x in layers if x.chosen != DENSE}}
    for kind, liked in LIKED.items():
        forms: dict[str, Form] = {}
        for x in layers:
            of_kind = [f for k in liked for f in candidates[x.weight] if f.kind is k]
            if of_kind:
                forms[x.weight] = min(of_kind, key=lambda f: x.ms[str(f)])
        if forms and forms not in tried.values():
            tried[f"all {kind}"] = forms
    if {} not in tried.values():
        tried["all dense"] = {}
    programs = [apply_forms(program, forms) for forms in tried.values()]
    jobs = [whole_job(p) for p in programs]
    times = clock.times(jobs, WHOLE_BUDGET_S)
    return {name: (forms, ms) for (name, forms), ms in zip(tried.items(), times, strict=True)}


_NOTHING = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
