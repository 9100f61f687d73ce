"""The clock: what programs take on a target, measured in turns and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from slrc.backends import Target, get_backend
from slrc.forms.cost import density_of
from slrc.forms.form import Form, Forms
from slrc.ir.program import Program
from slrc.kernels.build import sources_digest
from slrc.measuring.devices import Candidate, Device, Timing, first_line, local_device
from slrc.measuring.timing import Budget
from slrc.passes.analysis.cut_segments import Segment
from slrc.pipeline import apply_forms, pack_layers, split_layers
from slrc.quantization.choose import rounded_anyhow


@dataclass(frozen=True)
class Formed:
    """A structured program and the forms of its layers on a target.

    What `is_part` of a network stands between other layers: on an int8 target its inputs come in integers and its
    outputs go as such, so that a layer in float32 takes what it costs to go there and back.
    """

    program: Program
    forms: Forms = field(default_factory=dict)
    is_part: bool = False


@dataclass(frozen=True)
class Job:
    """A program to time: a name for its content, how to make it, and its flattened inputs.

    `emit` is a faster way to write what `make` returns as an artifact into an existing folder, where there is one.
    """

    digest: str
    make: Callable[[], Formed]
    inputs: Sequence[Tensor]
    emit: Callable[[Path], None] | None = None

    def program(self, target: Target) -> Program:
        """Return the program that is emitted."""
        return to_be_timed(self.make(), target)

    @staticmethod
    def of_whole(program: Program, forms: Forms | None = None) -> Job:
        """Return the job of a whole program, with its layers dense or in their forms."""
        given, inputs = forms or {}, program.flat_inputs()
        contents = []
        for weight, form in given.items():
            layer = program.layers[weight]
            density = density_of(layer.outputs_first(program.tensors[weight]), form, layer.groups)
            contents.append((weight, form_content(form, density)))
        return Job(digest(program.graph_module, inputs, *contents), lambda: Formed(program, given), inputs)

    @staticmethod
    def of_segment(segment: Segment) -> Job:
        """Return the job of a segment as it is."""
        name = digest(segment.module, segment.inputs)
        return Job(name, lambda: Formed(segment.program(), is_part=True), segment.inputs)


def form_content(form: Form, density: float) -> str:
    """Return what a form makes of a weight as far as its time depends on it."""
    return f"{form} {density:.2f}"


def to_be_timed(formed: Formed, target: Target) -> Program:
    """Return what is emitted of a program to be timed: for an int8 target one that rounds.

    Its scales are whatever suits the example inputs: times do not depend on them.
    """
    program, forms = formed.program, formed.forms
    if not target.is_integer:
        return apply_forms(program, forms)
    split = split_layers(program, forms)
    rounded = rounded_anyhow(split, get_backend(target).scheme, forms, round_ends=formed.is_part)
    return pack_layers(rounded, forms)


def digest(module: GraphModule, inputs: Sequence[Tensor], *others: object) -> str:
    """Return a name for what a graph module does on inputs, and for `others`.

    It is the same for two that differ in nothing but the values of their tensors.
    """
    tensors = [*module.parameters(), *module.buffers(), *inputs]
    kinds = [f"{t.dtype}{tuple(t.shape)}" for t in tensors]
    return _short(f"{module.graph}{kinds}{others}")


class Clock:
    """Times programs on a device for one target, and remembers in `cache` what each took.

    `machine` is what a time depends on besides the program: what has changed since is measured anew.
    """

    def __init__(self, target: Target, threads: int, cache: Path, device: Device | None = None) -> None:
        self.target, self.threads = target, threads
        self._device = device or local_device()
        self.machine: Mapping[str, Any] = {**self._device.conditions(), "kernels": sources_digest()}
        key = json.dumps([str(target), threads, self.machine], sort_keys=True)
        self._folder = cache / "latency" / _short(key)

    def times(self, jobs: Sequence[Job], budget: Budget) -> tuple[Timing, ...]:
        """Return what every job takes, all measured in turns; what cannot run is not remembered."""
        path = self._folder / f"{_short(' '.join(job.digest for job in jobs))}.json"
        if (known := _read(path, len(jobs))) is not None:
            return known
        unique = {job.digest: job for job in jobs}
        with tempfile.TemporaryDirectory() as place:
            emitted = {name: self._emit(job, Path(place) / str(i)) for i, (name, job) in enumerate(unique.items())}
            candidates = {name: Candidate(f, unique[name].inputs) for name, f in emitted.items() if isinstance(f, Path)}
            took = self._device.times(self.target, list(candidates.values()), self.threads, budget)
        found = dict(zip(candidates, took, strict=True))
        found |= {name: Timing(float("inf"), f) for name, f in emitted.items() if isinstance(f, str)}
        timings = tuple(found[job.digest] for job in jobs)
        if not any(timing.why_not for timing in timings):
            self._write(path, timings)
        return timings

    def _emit(self, job: Job, folder: Path) -> Path | str:
        """Write a job as an artifact into a new folder, and return that; or why it cannot be."""
        folder.mkdir()
        try:
            if job.emit is not None:
                job.emit(folder)
            else:
                program = job.program(self.target)
                get_backend(self.target).lower(program, self.target, folder, portable=False)
        except Exception as error:  # whatever a pass or the exporter makes of a program
            return first_line(error)
        return folder

    def _write(self, path: Path, timings: Sequence[Timing]) -> None:
        with contextlib.suppress(OSError):  # a cache that cannot be written: the next run measures anew
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"ms": [t.ms for t in timings], "machine": self.machine}))
            aside.replace(path)


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:24]


def _read(path: Path, count: int) -> tuple[Timing, ...] | None:
    """Return what was measured before; a damaged file counts as none."""
    try:
        ms = json.loads(path.read_text())["ms"]
        return tuple(Timing(float(x)) for x in ms) if len(ms) == count else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
