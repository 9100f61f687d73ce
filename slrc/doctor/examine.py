"""The examination: one check after another, of which each fails on its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache as kept
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from slrc.backends import Target, get_backend, parse_target
from slrc.config import CompileConfig
from slrc.doctor.deadline import Deadline, Overtime
from slrc.doctor.diagnosis import Diagnosis, Finding, PartTime, Reach, SpeedupPoint, Status, Training
from slrc.doctor.practice import estimate_hours, practise_evaluation, practise_training
from slrc.doctor.reach import reach_of
from slrc.doctor.times import patterns_for, time_parts, time_speedups
from slrc.errors import BackendError, SlrcError
from slrc.ir.program import Program, capture
from slrc.load_workload import load_workload
from slrc.machine.cache import cache_folder
from slrc.machine.cores import usable_cores
from slrc.measuring.clock import Clock
from slrc.measuring.devices import local_device
from slrc.measuring.timing import environment
from slrc.passes.analysis.label_indices import label_indices
from slrc.pipeline import baseline
from slrc.progress import Quiet, Reporter
from slrc.user_code import first_line
from slrc.workload import Workload

SECONDS = 50.0
"""With what Python takes to start, less than a minute."""
FOR_TRAINING, FOR_EVALUATION, FOR_PARTS = 0.15, 0.1, 0.25
"""The most of the time that each of them takes; timing pruned networks has the rest."""
BUSY = 0.25
"""Of the cores, by other processes: timings are then not to be relied on."""
MOST_SHOWN = 3
MORE_TIME = "`--seconds` gives more time"
T = TypeVar("T")


def examine(
    model: str | Workload,
    config: CompileConfig,
    *,
    seconds: float = SECONDS,
    cache: Path | None = None,
    reporter: Reporter | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Diagnosis:
    """Find out, without training, what `slrc compile` would meet and how far it could get.

    Args:
        model: a workload, or what the command line takes for MODEL.
        config: the targets, threads and choices of a compile.
        seconds: how long it may take. What has begun by then is interrupted, but for one call of a library; off the
            main thread, and on Windows, it is ended.
        cache: a folder for measured times; `cache_folder()` by default.
        reporter: where progress goes.
        now: the clock that tells when time is over.
    """
    return _Examination(config, Deadline(seconds, now), cache, reporter or Quiet()).run(model)


class _Examination:
    def __init__(self, config: CompileConfig, deadline: Deadline, cache: Path | None, reporter: Reporter) -> None:
        self.config, self.deadline, self.reporter = config, deadline, reporter
        self.cache = (cache or cache_folder()) / "doctor"
        self.seconds = deadline.left
        self.threads = config.threads or usable_cores()
        self.findings: list[Finding] = []

    def run(self, model: str | Workload) -> Diagnosis:
        targets = [t for text in self.config.target if (t := self._check_target(text))]
        self._check_machine()
        workload = self._attempt("workload", self._in_time(lambda: _loaded(model)))
        program, training = None, None
        if workload:
            program = self._attempt("capture", self._in_time(lambda: _captured(workload)))
            training = self._practise(workload)
        reach: list[Reach] = []
        parts: list[PartTime] = []
        speedups: list[SpeedupPoint] = []
        if program:
            for target in targets:
                self._attempt(f"operators, {target}", self._in_time(partial(_taken, program, target)))
            reach = self._attempt("what can be pruned", self._in_time(lambda: self._reach(program, targets))) or []
            if targets and not local_device().why_not_choose(targets[0]):
                dense = self._in_time(kept(partial(baseline, program)))
                parts = self._attempt("where the time goes", lambda: self._parts(dense(), targets[0])) or []
                speedups = self._attempt("speed-ups", lambda: self._speedups(dense(), targets[0])) or []
        return Diagnosis(
            model=workload.name if workload else str(model),
            target=self.config.target[0],
            threads=self.threads,
            findings=tuple(self.findings),
            reach=tuple(reach),
            parts=tuple(parts),
            speedups=tuple(speedups),
            training=training,
            seconds=self.deadline.spent,
            environment=environment(),
        )

    def _attempt(self, check: str, work: Callable[[], tuple[T, str]]) -> T | None:
        """Return what a check found; what it raises becomes its finding."""
        began = self.deadline.now()
        try:
            value, said = work()
        except Overtime:
            took = self.deadline.now() - began
            self._find(check, Status.NOTE, f"not done: it was stopped after {took:.1f} s", MORE_TIME)
            return None
        except SlrcError as error:
            self._find(check, Status.FAILS, error.message, error.hint)
            return None
        except Exception as error:  # whatever the user's code, torch or a runtime raise: the other checks go on
            self._find(check, Status.FAILS, first_line(error), "`slrc compile --debug` shows the whole trace")
            return None
        self._find(check, Status.OK, said)
        return value

    def _in_time(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return the same, which is interrupted when all of the time is over."""

        def limited() -> T:
            with self.deadline.enforced():
                return work()

        return limited

    def _find(self, check: str, status: Status, said: str, hint: str | None = None) -> None:
        self.findings.append(Finding(check=check, status=status, said=said, hint=hint))

    def _check_target(self, text: str) -> Target | None:
        try:
            target = parse_target(text)
        except SlrcError as error:
            self._find(f"target {text}", Status.FAILS, error.message, error.hint)
            return None
        backend = get_backend(target)
        emits = backend.available(target).why_not_emit
        if emits:
            self._find(f"target {target}", Status.FAILS, f"cannot be built here: {emits}", "see `slrc targets`")
            return None
        kernels, not_timed = backend.why_not_packed(target), local_device().why_not_choose(target)
        if not not_timed:
            kernels = kernels or self._make_ready(target)
        notes = [f"nothing is timed: {not_timed}"] if not_timed else []
        notes += [f"no fast blocks: {kernels}"] if kernels else []
        self._find(f"target {target}", Status.NOTE if notes else Status.OK, "; ".join(notes) or "builds and runs here")
        return target

    def _make_ready(self, target: Target) -> str:
        """Make what is made once on a machine, which does not count; return why it cannot be."""
        try:
            with self.deadline.paused():
                get_backend(target).make_ready(target, self.reporter.note)
        except BackendError as error:
            return error.message
        return ""

    def _check_machine(self) -> None:
        here, cores = environment(), usable_cores()
        trains_on = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "the processor"
        said = f"{here['cpu']}, {cores} cores; trains on {here['gpu'] or trains_on}"
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > BUSY * cores:
            hint = "wait until it is idle, for timings that hold"
            self._find("machine", Status.NOTE, f"{said}; it is busy: a load of {load:.1f}", hint)
        else:
            self._find("machine", Status.OK, said)

    def _practise(self, workload: Workload) -> Training | None:
        training = None
        if workload.train_batches is None:
            method = "refitted on `calibration`" if workload.calibration is not None else "pruned in one shot"
            self._find("training data, loss and optimiser", Status.NOTE, f"no training data: it will be {method}")
        else:
            time_for_it = self.deadline.within(FOR_TRAINING * self.seconds)
            training = self._attempt("training data, loss and optimiser", lambda: self._train(workload, time_for_it))
        if not workload.is_evaluated:
            self._find(
                "evaluation",
                Status.NOTE,
                "the workload has neither `eval_batches` nor `evaluate`: no accuracy will be measured",
            )
            return training and estimate_hours(training, self.config)
        took = self._attempt("evaluation", lambda: self._evaluate(workload))
        if training and took:
            found = {"evaluation_seconds": took[1], "evaluation_is_whole": took[0]}
            training = training.model_copy(update=found)
        return training and estimate_hours(training, self.config)

    def _train(self, workload: Workload, deadline: Deadline) -> tuple[Training, str]:
        training = practise_training(workload, self.config, deadline)
        return training, f"a step of {training.samples} samples takes {training.step_seconds:.3g} s"

    def _evaluate(self, workload: Workload) -> tuple[tuple[bool, float], str]:
        metric, seconds = practise_evaluation(workload, self.deadline.within(FOR_EVALUATION * self.seconds))
        if metric is None:
            return (False, seconds), f"it works, and was stopped after {seconds:.1f} s"
        return (True, seconds), f"{metric[0]} {metric[1]:.4f} in {seconds:.1f} s"

    def _reach(self, program: Program, targets: Sequence[Target]) -> tuple[list[Reach], str]:
        patterns = dict.fromkeys(p for t in targets for p in patterns_for(t))
        found = reach_of(program, list(patterns), self.config)
        unruled = label_indices(program, self.config.attention, self.config.layer_norm).unruled
        for operator, source in list(unruled.items())[:MOST_SHOWN]:
            self._find("channels", Status.NOTE, f"`{operator}` has no rule: the channels it meets stay, {source}")
        return found, ", ".join(f"{x.pattern} {x.params:.0%} of the parameters" for x in found)

    def _parts(self, dense: Program, target: Target) -> tuple[list[PartTime], str]:
        clock = Clock(target, self.threads, self.cache)
        deadline = self.deadline.within(FOR_PARTS * self.seconds)
        parts = time_parts(dense, clock, deadline, self.reporter)
        slowest = sorted((p for p in parts if p.ms is not None), key=lambda p: -(p.ms or 0.0))
        most = ", ".join(f"{p.name} {p.ms:.3f} ms" for p in slowest[:MOST_SHOWN])
        return parts, f"{len(slowest)} of {len(parts)} parts timed" + (f"; most: {most}" if most else "")

    def _speedups(self, dense: Program, target: Target) -> tuple[list[SpeedupPoint], str]:
        found = time_speedups(
            dense, patterns_for(target), self.config, target, self.threads, self.deadline, self.reporter
        )
        timed = [p for p in found if p.speedup is not None]
        best = max(timed, key=lambda p: p.speedup or 0.0, default=None)
        said = f"{len(timed)} of {len(found)} pruned networks timed"
        return found, said if best is None else f"{said}; {best.pattern} at {best.sparsity:.0%}: {best.speedup:.2f}x"


def _loaded(model: str | Workload) -> tuple[Workload, str]:
    workload = load_workload(model) if isinstance(model, str) else model
    count = sum(p.numel() for p in workload.model.parameters())
    return workload, "; ".join([f"{workload.name}, {count:,} parameters", *workload.warnings])


def _captured(workload: Workload) -> tuple[Program, str]:
    program = capture(workload.model, workload.example_inputs, workload.name, workload.where)
    batch = "any batch" if program.batch_is_dynamic else f"a batch of {program.batch} only"
    return program, f"{len(program.layers)} layers, {program.macs:,} multiply-accumulates, {batch}"


def _taken(program: Program, target: Target) -> tuple[bool, str]:
    if reasons := get_backend(target).check(program):
        raise BackendError(reasons[0])
    return True, "it takes all of them"
