"""The clock: what programs take on a target, measured in turns and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slrc.backends import Target, get_backend
from slrc.kernels.build import sources_digest
from slrc.measuring.devices import Candidate, Device, Timing, local_device
from slrc.measuring.jobs import Job, short
from slrc.measuring.timing import Budget
from slrc.user_code import reason_of


class Clock:
    """Times programs on a device for one target, and remembers in `cache` what each took.

    `machine` is what a time depends on besides the program: what has changed since is measured anew.
    """

    def __init__(self, target: Target, threads: int, cache: Path, device: Device | None = None) -> None:
        self.target, self.threads = target, threads
        self._device = device or local_device()
        self.machine: Mapping[str, Any] = {**self._device.conditions(), "kernels": sources_digest()}
        key = json.dumps([str(target), threads, self.machine], sort_keys=True)
        self._folder = cache / "latency" / short(key)

    def times(self, jobs: Sequence[Job], budget: Budget) -> tuple[Timing, ...]:
        """Return what every job takes, all measured in turns; what cannot run is not remembered."""
        path = self._folder / f"{short(' '.join(job.digest for job in jobs))}.json"
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
            return reason_of(error)
        return folder

    def _write(self, path: Path, timings: Sequence[Timing]) -> None:
        with contextlib.suppress(OSError):  # a cache that cannot be written: the next run measures anew
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"ms": [t.ms for t in timings], "machine": self.machine}))
            aside.replace(path)


def _read(path: Path, count: int) -> tuple[Timing, ...] | None:
    """Return what was measured before; a damaged file counts as none."""
    try:
        ms = json.loads(path.read_text())["ms"]
        return tuple(Timing(float(x)) for x in ms) if len(ms) == count else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
