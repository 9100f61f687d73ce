"""Measuring a latency table: the network and its segments at a few widths, on the target itself."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from slrc.backends import Runner, Target, get_backend
from slrc.errors import BackendError, PlanError
from slrc.ir.program import Program
from slrc.kernels.build import sources_digest
from slrc.machine.cache import cache_folder
from slrc.machine.cores import usable_cores
from slrc.measuring.latency_table import LatencyTable, SegmentLatency, WholeLatency
from slrc.measuring.timing import environment, time_in_turns
from slrc.passes.analysis.cut_segments import cut_segments
from slrc.pipeline import baseline, structure
from slrc.progress import Quiet, Reporter
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan

PART_BUDGET_S = 0.6
WHOLE_BUDGET_S = 5.0


class LatencyMeter:
    """Measures a program's parts, and what plans make of the whole, on one target; what is in the cache it knows.

    Args:
        program: the captured model.
        target: where to measure; it must run on this machine.
        threads: of the runtime; all cores by default.
        cache: a folder for measured times; `cache_folder()` by default.
        reporter: where progress goes.

    Raises:
        BackendError: the target does not run here.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        *,
        threads: int | None = None,
        cache: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        if why_not := get_backend(target).available(target).why_not_run:
            raise BackendError(
                f"`--allocate latency` measures on the target, and {target} cannot run here: {why_not}",
                hint="give a target that runs here, or another `--allocate`",
            )
        self._program, self._target, self._reporter = program, target, reporter or Quiet()
        self._threads = threads or usable_cores()
        self._clock = Clock(target, self._threads, cache or cache_folder())
        self._dense = baseline(program)

    def table(self, plans: Sequence[Plan]) -> LatencyTable:
        """Time the segments, and the whole, dense and at the widths of each plan.

        Raises:
            PlanError: the program has nothing that multiplies.
        """
        programs = [self._dense, *(self._slim(plan) for plan in plans)]
        names = [segment.anchor for segment in cut_segments(self._program)]
        if not names:
            raise PlanError(f"{self._program.name} has no layer or matrix product to time")
        segments = []
        with self._reporter.task(f"timing parts on {self._target}", len(names)) as task:
            for name, versions in zip(names, zip(*map(cut_segments, programs), strict=True), strict=True):
                ms = self._clock.times([(v.digest, v.program, v.inputs) for v in versions], PART_BUDGET_S)
                segments.append(SegmentLatency(name=name, macs=tuple(v.macs for v in versions), ms=ms))
                task.advance(name)
        sums = [sum(one) for one in zip(*(s.ms for s in segments), strict=True)]
        whole = self._clock.times([whole_job(p) for p in programs], WHOLE_BUDGET_S)
        return LatencyTable(
            target=str(self._target),
            threads=self._threads,
            machine=self._clock.machine["cpu"],
            segments=tuple(segments),
            whole=tuple(WholeLatency(segments_ms=s, ms=ms) for s, ms in zip(sums, whole, strict=True)),
        )

    def share(self, plan: Plan) -> float:
        """Return the latency with a plan's widths as a share of the dense one, measured in turns."""
        dense, slim = self._clock.times([whole_job(self._dense), whole_job(self._slim(plan))], WHOLE_BUDGET_S)
        return slim / dense

    def _slim(self, plan: Plan) -> Program:
        return structure(self._program, plan, Masks.project(plan, self._program.tensors))


Job = tuple[str, Callable[[], Program], Sequence[Any]]
"""What to time: a name for its content, how to make it, and its inputs."""


def whole_job(program: Program) -> Job:
    """Return the job of a whole network; two that differ in values only are the same."""
    shapes = [tuple(t.shape) for t in program.tensors.values()]
    digest = sha256(f"{program.graph_module.graph}{shapes}".encode()).hexdigest()[:24]
    return digest, lambda: program, program.flat_inputs()


class Clock:
    """Times programs on one target, and remembers in `cache` what each took."""

    def __init__(self, target: Target, threads: int, cache: Path) -> None:
        self.target, self._threads = target, threads
        found = environment()
        runtimes = {n: v for n, v in found["versions"].items() if n.startswith(("onnxruntime", "tensorrt"))}
        hardware = {k: found[k] for k in ("cpu", "instruction_sets", "gpu")}
        self.machine: Mapping[str, Any] = {**hardware, **runtimes, "kernels": sources_digest()}
        key = json.dumps([str(target), threads, self.machine], sort_keys=True)
        self._folder = cache / "latency" / sha256(key.encode()).hexdigest()[:16]

    def times(self, jobs: Sequence[Job], budget_s: float) -> tuple[float, ...]:
        """Return the milliseconds of every job, all measured in turns."""
        path = self._folder / f"{sha256(' '.join(digest for digest, _, _ in jobs).encode()).hexdigest()[:24]}.json"
        if (known := _read(path, len(jobs))) is not None:
            return known
        fresh = {digest: (make, inputs) for digest, make, inputs in jobs}
        measured = time_in_turns([self._prepare(make(), inputs) for make, inputs in fresh.values()], budget_s)
        by_digest = dict(zip(fresh, measured, strict=True))
        ms = tuple(by_digest[digest] for digest, _, _ in jobs)
        self._write(path, ms)
        return ms

    def _prepare(self, program: Program, inputs: Sequence[Any]) -> Callable[[], Any]:
        backend = get_backend(self.target)
        with tempfile.TemporaryDirectory() as folder:
            backend.lower(program, self.target, Path(folder))
            runner: Runner = backend.load(Path(folder), threads=self._threads)
        return runner.prepare(*inputs)

    def _write(self, path: Path, ms: Sequence[float]) -> None:
        with contextlib.suppress(OSError):  # a cache that cannot be written: the next run measures anew
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"ms": ms, "machine": self.machine}))
            aside.replace(path)


def _read(path: Path, count: int) -> tuple[float, ...] | None:
    """Return what was measured before; a damaged file counts as none."""
    try:
        ms = json.loads(path.read_text())["ms"]
        return tuple(float(x) for x in ms) if len(ms) == count else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
