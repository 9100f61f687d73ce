"""A few steps of training and as much of an evaluation as time allows: whether they work, and what all would take."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from slrc.config import CompileConfig
from slrc.doctor.deadline import Deadline, Overtime
from slrc.doctor.diagnosis import Training
from slrc.methods.settings import MethodName
from slrc.sparsity.plans import Plan
from slrc.training.batches import samples_in, sparse_steps
from slrc.training.evaluation import check_finite
from slrc.training.loop import train
from slrc.workload import Workload, accuracy

STEPS = 6
"""The first one is not counted where there are others: it fills caches."""


@dataclass
class _FirstBatches:
    """The first batches of an iterable, as many as there is time for; notes when each was asked for."""

    batches: Iterable[Any]
    deadline: Deadline
    asked_at: list[float] = field(default_factory=list)
    samples: int = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Any]:
        self.asked_at = []
        source = iter(self.batches)
        for _ in range(STEPS):
            self.asked_at.append(self.deadline.now())
            if self.deadline.left <= 0:
                raise Overtime  # where it ended here, another epoch would begin
            try:
                batch = next(source)
            except StopIteration:
                return
            self.samples = max(self.samples, samples_in(batch))
            yield batch


def practise_training(workload: Workload, config: CompileConfig, deadline: Deadline) -> Training:
    """Train a copy of the workload's model for a few steps, and say what all of them would take.

    Nothing is pruned, so that it needs no captured program; the methods themselves take next to no time. A step under
    way when time is over is not counted.

    Raises:
        Overtime: not one step was done in time.
        WorkloadError: the data cannot be read, or the loss or the optimiser fails.
        TrainingError: the loss is not finite.
    """
    assert workload.train_batches is not None
    few = _FirstBatches(workload.train_batches, deadline)
    unmeasured = replace(workload, evaluate=None, eval_batches=None, evaluate_batch=accuracy)
    trial = replace(unmeasured, model=copy.deepcopy(workload.model), train_batches=few)
    settings = {
        "method": MethodName.MAGNITUDE,
        "steps": STEPS,
        "epochs": None,
        "retrain_epochs": 0,
        "probe_batches": 1,
        "recalibration_batches": 0,
    }
    with suppress(Overtime), deadline.enforced():
        train(trial, Plan(sparsity_asked=0.0, sparsity=0.0, constraints=()), config.model_copy(update=settings))
    times = [after - before for before, after in zip(few.asked_at, few.asked_at[1:], strict=False)]
    if not times:
        raise Overtime
    step_seconds = statistics.median(times[1:] or times)
    try:
        steps: int | None = len(workload.train_batches)  # type: ignore[arg-type]
    except TypeError:
        steps = None
    return Training(
        samples=few.samples,
        step_seconds=step_seconds,
        steps=steps,
        epoch_seconds=None if steps is None else steps * step_seconds,
        evaluation_seconds=None,
        evaluation_is_whole=False,
        hours=None,
    )


def practise_evaluation(workload: Workload, deadline: Deadline) -> tuple[tuple[str, float] | None, float]:
    """Run `evaluate` on a copy of the model, and stop it when time is over; return the metric and the seconds.

    The metric is `None` where it was stopped.

    Raises:
        WorkloadError: it fails, or returns no metric, or one that is not finite.
    """
    try:
        with deadline.enforced():
            metric = workload.measure(copy.deepcopy(workload.model))
    except Overtime:
        return None, deadline.spent
    assert metric is not None
    check_finite(metric[1], " for the model as it was given")
    return metric, deadline.spent


def estimate_hours(training: Training, config: CompileConfig) -> Training:
    """Return the same with the hours of the whole training: its steps, and the evaluations after each epoch."""
    if training.steps is None:
        return training
    steps = (sparse_steps(config, training.steps) if config.trains else 0) + config.retrain_epochs * training.steps
    evaluations = 2 * (1 + -(-steps // training.steps))  # of the live model and of a hard-pruned copy
    seconds = steps * training.step_seconds + evaluations * (training.evaluation_seconds or 0.0)
    return training.model_copy(update={"hours": seconds / 3600})
