"""One phase of training: epochs of steps with an optimiser of their own, and what is kept between and within them.

Every epoch starts from a seed of its own, so that a run resumed from the last checkpoint repeats what the interrupted
one did, bit by bit, as long as the user's batches depend on torch's, numpy's and Python's random state alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from slrc.errors import WorkloadError
from slrc.sparsity.shards import whole_in_turn
from slrc.training.batches import samples_in, seed_epoch, share_out, update_steps
from slrc.training.checkpoints import PartOfEpoch, Snapshot, Timer
from slrc.training.distillation import Teacher
from slrc.training.pace import Pace
from slrc.training.random_state import RandomState
from slrc.training.recipe import AveragedWeights, make_optimizer
from slrc.training.run import Run
from slrc.training.steps import Hooks, Steps
from slrc.workload import read


def _no_penalty(time: float) -> float:
    return 0.0


class Phase(NamedTuple):
    """One stretch of steps, and what is done besides them; `rho` is as in the recipe."""

    name: str
    steps: int
    hooks: Hooks
    rho: Callable[[float], float] = _no_penalty


class Resumed(NamedTuple):
    """Where an interrupted phase stood; `restore` puts model, optimiser and schedule back."""

    snapshot: Snapshot
    restore: Callable[[], None]


class Listener(NamedTuple):
    """Who is told what a phase has done."""

    epoch_ended: Callable[[int, float, float], None]
    """Takes the epoch, counted from 1, its mean loss and its seconds."""
    save: Callable[[int, PartOfEpoch, Mapping[str, Tensor]], None] | None
    """Takes the epochs done, the part of the next one, and the averaged weights; nothing where nothing is saved."""


class PhaseLoop:
    """Takes the steps of a phase.

    Args:
        run: the workload and its processes.
        phase: what is done.
        model: the one that trains, as its placement has it.
        teacher: to distil from, if there is one.
        listener: told after each epoch, and when it is time to save.
    """

    def __init__(self, run: Run, phase: Phase, model: nn.Module, teacher: Teacher | None, listener: Listener) -> None:
        self.run, self.phase, self.model, self.teacher, self.listener = run, phase, model, teacher, listener
        workload, recipe, accelerator = run.workload, run.config.recipe, run.accelerator
        assert workload.train_batches is not None
        self.batches = workload.train_batches
        trainable = [p for p in model.parameters() if p.requires_grad]
        # accelerate steps a schedule once for each process
        total = phase.steps * accelerator.num_processes
        optimizer, scheduler = make_optimizer(workload, trainable, total, recipe, phase.rho)
        accelerator.free_memory()
        self.prepared, optimizer, scheduler = run.placement.prepare(model, optimizer, scheduler)
        self.loader = share_out(self.batches, accelerator)
        optimizer.zero_grad()  # the user's own training may have left gradients, and a resumed run has others
        named = dict(model.named_parameters(remove_duplicate=False))
        self.average = AveragedWeights(named, recipe.average, phase.steps) if recipe.average else None
        self.steps = Steps(
            workload=workload,
            accelerator=accelerator,
            precision=run.config.precision,
            inner=model,
            model=self.prepared,
            optimizer=optimizer,
            scheduler=scheduler,
            hooks=phase.hooks,
            clip=recipe.clip if workload.optimizer is None else 0.0,
            average=self.average,
            stopwatch=run.stopwatch,
        )
        self.due = update_steps(run.epoch_steps, run.config.updates_per_epoch)
        self.timer = Timer(run.config.checkpoint_minutes)

    def go(self, resumed: Resumed | None) -> None:
        """Take all steps, or those that are left of a resumed phase."""
        first, part, random_state = 0, PartOfEpoch(), None
        if resumed is not None:
            resumed.restore()
            first, part, random_state = resumed.snapshot.epochs_done, resumed.snapshot.part, RandomState.of_now()
            if self.average is not None:
                self.average.load(resumed.snapshot.average)
        epochs = math.ceil(self.phase.steps / self.run.epoch_steps)
        self.timer.restart()
        for epoch in range(first, epochs):
            part = self._epoch(epoch, epochs, part, random_state)
            if self.average is not None and epoch + 1 == epochs:
                self.average.store()
            self.run.placement.follow_first(self.model)
            self.listener.epoch_ended(epoch + 1, self.run.mean_of_processes(part.summed / part.steps), part.seconds)
            part = PartOfEpoch()
            self._save(epoch + 1, part)
            self.run.accelerator.wait_for_everyone()

    def _epoch(self, epoch: int, epochs: int, part: PartOfEpoch, random_state: RandomState | None) -> PartOfEpoch:
        """Take the steps of an epoch of which a part was done before; return what was done of it in all."""
        phase, run, steps, before = self.phase, self.run, self.run.epoch_steps, part.steps
        seed_epoch(self.batches, run.config.seed, phase.name, epoch)
        started, done = time.perf_counter() - part.seconds, epoch * steps
        self.prepared.train()
        left = min(steps, phase.steps - done)
        pace = Pace(phase.steps - done - before, run.accelerator.num_processes)
        source = islice(read(self.loader), left)
        if random_state is not None and before:
            self._read_again(source, before, random_state)
        with run.reporter.task(f"{phase.name} epoch {epoch + 1}/{epochs}", left - before) as task:
            for count, batch in enumerate(source, start=before + 1):
                where = f"{phase.name}, epoch {epoch + 1}, step {count}"
                loss = self.steps.take(batch, self.teacher, where, done + count)
                if count in self.due:
                    self.steps.update()
                pace.step(samples_in(batch))
                part = PartOfEpoch(steps=count, summed=part.summed + loss, seconds=time.perf_counter() - started)
                if count < left and self._saves_within_epochs and self.timer.is_due:
                    self._save(epoch, part)
                task.advance(f"loss {loss:.4f}, {pace}")
        if part.steps == 0:
            raise WorkloadError(
                f"`train_batches` yielded nothing in epoch {epoch + 1}",
                hint="give an iterable that starts anew each epoch and is not empty, such as a DataLoader",
            )
        return part

    @property
    def _saves_within_epochs(self) -> bool:
        """One process alone does: several would have to save at the same step, with the random numbers of each."""
        return self.run.accelerator.num_processes == 1

    def _read_again(self, source: Iterator[Any], steps: int, random_state: RandomState) -> None:
        """Pass over what an interrupted epoch has trained on; then random numbers go on where they were."""
        with self.run.reporter.task("reading what was trained on", steps) as task:
            for _ in islice(source, steps):
                task.advance()
        random_state.restore()

    def _save(self, epochs_done: int, part: PartOfEpoch) -> None:
        if self.listener.save is None:
            return
        average = {} if self.average is None else {n: t.cpu() for n, t in whole_in_turn(self.average.average)}
        self.listener.save(epochs_done, part, average)
        self.timer.restart()
