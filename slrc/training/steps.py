"""A step of training: the workload's loss, the teacher's, the method's penalty, the optimiser; and what each costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slrc.errors import SlrcError, TrainingError, WorkloadError
from slrc.machine.memory import peak_bytes
from slrc.options import Precision
from slrc.training.distillation import Teacher
from slrc.training.recipe import AveragedWeights
from slrc.workload import Workload, user_error

SAMPLED = 16
"""On an accelerator, which has to be waited for, one of so many steps is timed."""


class StepCost(BaseModel):
    """What training took.

    `step_ms` is the median step. `distillation` is what the teacher adds to the time of a step of the loss and the
    optimiser alone, as a share of that, and `method` what the method adds, its updates included. `peak_mb` is the most
    memory that the process had (on an accelerator: that was allocated there; `None` where the system does not tell), of
    which `teacher_mb` are the dense network's weights and `method_mb` what the method keeps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    step_ms: float
    distillation: float
    method: float
    peak_mb: float | None
    teacher_mb: float
    method_mb: float


class Hooks(NamedTuple):
    """What a phase does besides the loss's own step."""

    after_backward: Callable[[], object]
    after_step: Callable[[], object]
    on_update: Callable[[], object]


class Stopwatch:
    """Adds up the time of the parts of steps."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type != "cpu"
        self.steps: list[float] = []
        self.totals = {"teacher": 0.0, "method": 0.0, "update": 0.0}
        self.count, self.timed = 0, True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a whole step."""
        self.timed = not self.waits or self.count % SAMPLED == 0
        self.count += 1
        started = self._now()
        yield
        if self.timed:
            self.steps.append(self._now() - started)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of a step, or an update between two."""
        self.timed |= name == "update"
        started = self._now()
        yield
        if self.timed:
            self.totals[name] += self._now() - started

    def _now(self) -> float:
        if self.waits and self.timed:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def cost(self, teacher_bytes: int, method_bytes: int) -> StepCost | None:
        """Return what was measured; nothing if no step was taken."""
        if not self.steps:
            return None
        timed, peak = len(self.steps), _peak_bytes(self.waits)
        teacher, method = self.totals["teacher"] / timed, self.totals["method"] / timed
        plain = statistics.fmean(self.steps) - teacher - method
        return StepCost(
            steps=self.count,
            step_ms=1e3 * statistics.median(self.steps),
            distillation=teacher / plain,
            method=(method + self.totals["update"] / self.count) / plain,
            peak_mb=None if peak is None else peak / 2**20,
            teacher_mb=teacher_bytes / 2**20,
            method_mb=method_bytes / 2**20,
        )


@dataclass
class Steps:
    """Takes the steps of one phase.

    Args:
        workload: whose loss.
        accelerator: which scales losses, and gathers gradients from other processes.
        precision: of the steps.
        inner: the user's model, whose calls the teacher answers.
        model: the same as the accelerator prepared it, as are `optimizer` and `scheduler`.
        hooks: of the phase.
        clip: the most that the norm of the loss's gradient may be; 0 for no limit.
        average: takes in the weights after each step, if there is one.
        stopwatch: adds up the times.
    """

    workload: Workload
    accelerator: Accelerator
    precision: Precision
    inner: nn.Module
    model: nn.Module
    optimizer: Any
    scheduler: Any
    hooks: Hooks
    clip: float
    average: AveragedWeights | None
    stopwatch: Stopwatch

    def take(self, batch: Any, teacher: Teacher | None, where: str, number: int) -> float:
        """Take a step, the `number`-th of the phase from 1; return the workload's loss.

        Raises:
            WorkloadError: the user's loss, distance or optimiser failed.
            TrainingError: the loss is not finite; `where` says when.
        """
        with self.stopwatch.step():
            return self._take(batch, teacher, where, number)

    def update(self) -> None:
        """Let the method do an outer iteration."""
        with self.stopwatch.part("update"):
            self.hooks.on_update()

    def _take(self, batch: Any, teacher: Teacher | None, where: str, number: int) -> float:
        batch = send_to_device(batch, self.accelerator.device)
        if teacher is None:
            loss = whole = call_loss(self.workload, self.model, batch)
        else:
            with teacher.watch(self.inner) as calls:
                loss = call_loss(self.workload, self.model, batch)
            with self.stopwatch.part("teacher"), self.accelerator.autocast():
                whole = teacher.blend(loss, calls)
        if not loss.requires_grad:
            raise WorkloadError(
                "`loss(model, batch)` returned a tensor without a gradient",
                hint="compute it from the model's output, without `detach`, `item` or `torch.no_grad`",
            )
        if not math.isfinite(blended := float(whole.detach())):
            raise TrainingError(
                f"the loss is {blended} in {where}",
                hint="lower the learning rate (recipe's `peak-lr`) or the penalty (`rho`), or use `--precision fp32`",
            )
        self.accelerator.backward(whole)
        if self.accelerator.sync_gradients:
            if self.precision is Precision.FP16:
                self.accelerator.unscale_gradients(self.optimizer)
            if self.clip:
                nn.utils.clip_grad_norm_(self.inner.parameters(), self.clip)
            with self.stopwatch.part("method"):
                self.hooks.after_backward()
        try:
            self.optimizer.step()
        except Exception as error:
            raise user_error("`step` of `Workload.optimizer`", error) from error
        self.scheduler.step()
        self.optimizer.zero_grad()
        with self.stopwatch.part("method"):
            self.hooks.after_step()
        if self.average is not None:
            self.average.after_step(number)
        return float(loss.detach())


def call_loss(workload: Workload, model: nn.Module, batch: Any) -> Tensor:
    """Return the workload's loss.

    Raises:
        WorkloadError: it failed, or is not a scalar.
    """
    try:
        loss = workload.loss(model, batch)
    except SlrcError:
        raise
    except Exception as error:
        raise user_error("`loss(model, batch)`", error) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise WorkloadError(
            "`loss(model, batch)` must return a scalar tensor, got "
            + (f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__)
        )
    return loss


def _peak_bytes(on_accelerator: bool) -> int | None:
    if on_accelerator and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()
