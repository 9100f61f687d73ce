"""The clock: what programs take on a target, measured in turns and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from slrc.backends import Target, get_backend
from slrc.ir.program import Program
from slrc.kernels.build import sources_digest
from slrc.measuring.devices import Candidate, Device, Timing, first_line, local_device
from slrc.measuring.timing import Budget
from slrc.passes.analysis.cut_segments import Segment
from slrc.quantization.choose import rounded_anyhow


@dataclass(frozen=True)
class Job:
    """A program to time: a name for its content, how to make it, and its flattened inputs.

    `emit` is a faster way to write what `make` returns as an artifact into an existing folder, where there is one.
    """

    digest: str
    make: Callable[[], Program]
    inputs: Sequence[Tensor]
    emit: Callable[[Path], None] | None = None

    @staticmethod
    def of_whole(program: Program) -> Job:
        """Return the job of a whole program."""
        inputs = program.flat_inputs()
        return Job(digest(program.graph_module, inputs), lambda: program, inputs)

    @staticmethod
    def of_segment(segment: Segment) -> Job:
        """Return the job of a segment as it is."""
        return Job(digest(segment.module, segment.inputs), segment.program, segment.inputs)


def to_be_timed(program: Program, target: Target) -> Program:
    """Return what is emitted of a program to be timed: for an int8 target one that rounds.

    Its scales are whatever suits the example inputs: times do not depend on them.
    """
    return rounded_anyhow(program, get_backend(target).scheme) if target.is_integer else program


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
                program = to_be_timed(job.make(), self.target)
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
