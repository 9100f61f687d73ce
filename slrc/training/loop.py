"""The training loop: the user's model, loss and optimiser; the method's penalty; hard-pruning on a copy.

Every epoch starts from a seed of its own, so that a run resumed from the last checkpoint repeats what the interrupted
one did, bit by bit, as long as the user's batches depend on torch's, numpy's and Python's random state alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, broadcast, send_to_device
from torch import Tensor, nn

from slrc.config import CompileConfig
from slrc.errors import PlanError, TrainingError, WorkloadError
from slrc.methods.base import MaskedMethod, Method, MethodState
from slrc.methods.magnitude import Magnitude
from slrc.methods.registry import make_method
from slrc.methods.settings import MethodName
from slrc.options import Precision
from slrc.progress import Quiet, Reporter
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import own, own_of, whole_in_turn
from slrc.training import sharding
from slrc.training.batches import (
    count_steps,
    samples_in,
    seed_epoch,
    share_of_first,
    share_out,
    sparse_steps,
    update_steps,
)
from slrc.training.checkpoints import CheckpointFolder, EpochRecord, PartOfEpoch, Snapshot, Timer, misfit
from slrc.training.choose_method import choose_method
from slrc.training.distillation import Teacher
from slrc.training.evaluation import Evaluation, check_finite, unwrap
from slrc.training.pace import Pace
from slrc.training.random_state import RandomState
from slrc.training.recipe import AveragedWeights, make_optimizer
from slrc.training.steps import Hooks, Steps, Stopwatch, call_loss
from slrc.training.trained import Trained, read_weights
from slrc.workload import Workload, read

RETRAIN = "retrain"
ON_CPU = not torch.accelerator.is_available()
"""Told so, `accelerate` takes several processes on a CPU for a distributed run; it does not by itself."""
Pruner = Callable[[], Masks]
"""Prunes a workload's model in place; returns the masks that it now obeys."""
MethodMaker = Callable[[MethodName, Mapping[str, nn.Parameter], Plan, int, CompileConfig], Method]
MIXED_PRECISION = {Precision.FP32: "no", Precision.BF16: "bf16", Precision.FP16: "fp16"}


def _nothing() -> object:
    return None


def _no_penalty(time: float) -> float:
    return 0.0


class _Phase(NamedTuple):
    """One stretch of steps with an optimiser of its own, and what is done besides them; `rho` is as in the recipe."""

    name: str
    steps: int
    hooks: Hooks
    rho: Callable[[float], float] = _no_penalty


def train(
    workload: Workload,
    plan: Plan,
    config: CompileConfig,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    make: MethodMaker = make_method,
    prune: Pruner | None = None,
    teacher: nn.Module | None = None,
) -> Trained:
    """Train the workload's model in place so that it obeys the plan, then prune it hard.

    Args:
        workload: the model, its data, loss and optimiser.
        plan: what is constrained.
        config: method, budget, recipe, retraining epochs, precision, seed.
        checkpoints: a folder to save to after every epoch; `None` saves nothing.
        resume: go on from the newest checkpoint there, if there is one.
        reporter: where progress goes.
        make: makes the method, for one that has no name here.
        prune: prunes without training, in place of a method; masked retraining may follow.
        teacher: teaches in place of the model as it was given.

    Raises:
        TrainingError: the loss is not finite, or a checkpoint does not fit.
        WorkloadError: there is no data though the method needs it, or the user's functions fail.
    """
    trainer = _Trainer(workload, plan, config, checkpoints, resume, reporter or Quiet(), make, prune, teacher)
    try:
        return trainer.run()
    finally:
        unwrap(workload.model)


class _Trainer:
    """One run: its accelerator, method, curve and masks."""

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        config: CompileConfig,
        checkpoints: Path | None,
        resume: bool,
        reporter: Reporter,
        make: MethodMaker,
        prune: Pruner | None,
        teacher: nn.Module | None,
    ) -> None:
        self.make, self.prune, self.given_teacher = make, prune, teacher
        self.workload, self.plan, self.config, self.reporter = workload, plan, config, reporter
        self.method_name = choose_method(config, workload, plan)
        AcceleratorState._reset_state()  # else the first run's precision holds for the whole process
        with sharding.left_to_us():
            self.accelerator = Accelerator(
                cpu=ON_CPU,
                mixed_precision=MIXED_PRECISION[config.precision],
                dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
            )
        self.sharded = sharding.is_asked_for() and self.accelerator.num_processes > 1
        self.model = workload.model.to(self.accelerator.device)
        self.start = read_weights(config.start_from, self.model) if config.start_from else None
        self.evaluation = Evaluation(workload, config, self.accelerator)
        self.folder = CheckpointFolder(checkpoints) if checkpoints else None
        found = self.folder.newest() if self.folder and resume else None
        self.resume_from = found
        self.snapshot = self.folder.read(found) if self.folder and found else None
        self.curve = list(self.snapshot.curve) if self.snapshot else []
        self.masks = Masks(self.snapshot.masks) if self.snapshot else Masks()
        self.method: Method = Magnitude(_parameters(self.model), plan)
        self.probe: list[Any] = []
        self.teacher: Teacher | None = None
        self.stopwatch = Stopwatch(self.accelerator.device)

    def run(self) -> Trained:
        """Sparse epochs, projection, retraining; what the newest checkpoint has done already is not done again."""
        self._check_storable()
        if self.snapshot:
            within = f", step {self.snapshot.part.steps} of the next" if self.snapshot.part.steps else ""
            self.reporter.note(f"going on after {self.snapshot.phase} epoch {self.snapshot.epochs_done}{within}")
        if self._has_steps and self.config.distill:
            given = self.given_teacher
            taught_by = self.evaluation.twin(self.model) if given is None else given.to(self.accelerator.device)
            if self.sharded and given is None:
                taught_by = sharding.shard(taught_by, self.accelerator)
            self.teacher = Teacher(taught_by, self.workload, self.config.recipe)
        in_retraining = self.snapshot is not None and self.snapshot.phase == RETRAIN
        if self.snapshot:
            assert self.resume_from is not None
            try:
                self.plan = self.plan.with_options(self.snapshot.options)
            except PlanError as error:
                raise misfit(self.resume_from, error) from error
        if in_retraining:
            assert self.snapshot is not None
            self.method.history = list(self.snapshot.method.history)
            self._share_model_out()
        elif self.prune is not None:
            self._prune_without_training(self.prune)
            self._share_model_out()
        else:
            self._share_model_out()
            self._run_sparse_phase()
            self.plan, self.masks = self.method.plan, self.method.masks()
        parameters = _parameters(self.model)
        self.masks.check(self.plan, parameters)
        if self._masked_steps:
            self.masks.apply_(parameters)
            self._run_phase(self._retrain_phase())
        self.masks.apply_(parameters)
        if not self._masked_steps and self.prune is None:
            unwrap(self.model)  # as the copies that were measured
            self.evaluation.recalibrate(self.model)
        tensors = {n: t.detach().cpu().clone() for n, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        if self.model is not self.workload.model:
            self.workload.model.load_state_dict(tensors, strict=False)
        return Trained(
            tensors=tensors,
            plan=self.plan,
            masks=self.masks,
            method=str(self.method_name),
            dense=self.curve[0].metric,
            hard_pruned=[r.hard_pruned for r in self.curve if r.phase != RETRAIN][-1],
            curve=tuple(self.curve),
            history=tuple(self.method.history),
            cost=self.stopwatch.cost(self.teacher.num_bytes if self.teacher else 0, self._method_bytes()),
            undistilled=(self.teacher and self.teacher.unfit) or "",
        )

    def _share_model_out(self) -> None:
        """Train a copy whose parameters lie in all processes, where that is asked for."""
        if self.sharded and self._has_steps:
            twin = self.evaluation.twin(self.workload.model.cpu())
            self.model = sharding.shard(twin, self.accelerator)

    @property
    def _has_steps(self) -> bool:
        return self._sparse_steps > 0 or self._masked_steps > 0

    def _method_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.method.state().tensors.values())

    def _check_storable(self) -> None:
        objects = [n for n, value in self.model.state_dict().items() if not isinstance(value, Tensor)]
        if self.folder and self._has_steps and objects:
            raise WorkloadError(
                f"the model's state holds `{objects[0]}`, which is no tensor: checkpoints take tensors only",
                hint="return a tensor from `get_extra_state`, or leave it out while compiling",
            )

    def _run_sparse_phase(self) -> None:
        total = self._sparse_steps
        self.method = self._make_method(total)
        if total:
            self._read_probe()
        if self.snapshot:
            self._load_method(self.snapshot)
        else:
            self.curve.append(self._measure(str(self.method_name), 0, None, 0.0))
            check_finite(self.curve[0].metric, " for the model as it was given")
            if self.start is not None:
                self.model.load_state_dict(self.start, strict=False)
                self.method = self._make_method(total)
            if total:
                self.method.start(self.probe_loss)
        if total:
            hooks = Hooks(
                after_backward=self.method.add_penalty_gradient,
                after_step=self.method.after_step,
                on_update=lambda: self.method.update(self.probe_loss),
            )
            self._run_phase(_Phase(str(self.method_name), total, hooks, self.method.rho_at))

    def _make_method(self, steps: int) -> Method:
        updates = self._updates_in(steps)
        return self.make(self.method_name, _parameters(self.model), self.plan, updates, self.config)

    def _prune_without_training(self, prune: Pruner) -> None:
        phase, dense = str(self.method_name), self.evaluation.metric(self.model)
        check_finite(dense, " for the model as it was given")
        self.curve.append(EpochRecord(phase=phase, epoch=0, loss=None, metric=dense, hard_pruned=None, seconds=0.0))
        started = time.perf_counter()
        self.masks = Masks({n: broadcast(mask) for n, mask in prune().tensors.items()})  # processors may round apart
        pruned, seconds = self.evaluation.metric(self.model), time.perf_counter() - started
        check_finite(pruned, " for the pruned model")
        self.curve.append(
            EpochRecord(phase=phase, epoch=1, loss=None, metric=pruned, hard_pruned=pruned, seconds=seconds)
        )
        if self._masked_steps:
            self.evaluation.adopt_statistics(self.model)

    @property
    def _sparse_steps(self) -> int:
        """The steps in which a method prunes."""
        return self._asked_steps if self.prune is None else 0

    @property
    def _masked_steps(self) -> int:
        """The steps under masks that stay: all of a network that is pruned without a method, and retraining."""
        retraining = self.config.retrain_epochs * self.steps if self.config.retrain_epochs else 0
        return retraining + (0 if self.prune is None else self._asked_steps)

    @property
    def _asked_steps(self) -> int:
        if self.workload.train_batches is None or not self.config.trains:
            return 0
        return sparse_steps(self.config, self.steps)

    def _updates_in(self, total: int) -> int:
        """Return how many updates there are in so many steps."""
        if not total:
            return 0
        due = update_steps(self.steps, self.config.updates_per_epoch)
        epochs, rest = divmod(total, self.steps)
        return epochs * len(due) + sum(step <= rest for step in due)

    def _load_method(self, snapshot: Snapshot) -> None:
        assert self.resume_from is not None
        try:
            self.method.load_state(snapshot.method)
        except (KeyError, RuntimeError) as error:
            raise misfit(self.resume_from, error) from error

    def _retrain_phase(self) -> _Phase:
        # Zeroing after each step undoes what momentum, weight decay and the gradient did to pruned weights.
        parameters = _parameters(self.model)
        masks = [(parameters[n], own_of(m, parameters[n])) for n, m in self.masks.tensors.items()]

        def keep_pruned() -> None:
            with torch.no_grad():
                for parameter, mask in masks:
                    own(parameter).mul_(mask)

        return _Phase(RETRAIN, self._masked_steps, Hooks(_nothing, keep_pruned, _nothing))

    @cached_property
    def steps(self) -> int:
        """Steps of an epoch in each process."""
        assert self.workload.train_batches is not None
        return count_steps(self.workload.train_batches, self.accelerator.num_processes, self.config.seed)

    def probe_loss(self) -> float:
        """Return f on the fixed probe batches, in evaluation mode and without a gradient."""
        training = self.model.training
        self._follow_first()
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            losses = [call_loss(self.workload, self.model, batch) for batch in self.probe]
        self.model.train(training)
        mean = torch.stack([loss.float() for loss in losses]).mean()
        value = float(self.accelerator.reduce(mean, reduction="mean"))
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} on the probe batches, in evaluation mode, after {len(self.curve) - 1} epochs",
                hint="lower the learning rate or the penalty (`rho`), or check the model's running statistics",
            )
        return value

    def _follow_first(self) -> None:
        if self.sharded:  # several whole copies follow the first one's buffers at every step
            sharding.follow_first(self.model)

    def _mean_of_processes(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, reduction="mean"))

    def _run_phase(self, phase: _Phase) -> None:
        batches, steps, recipe = self.workload.train_batches, self.steps, self.config.recipe
        assert batches is not None
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        # accelerate steps a schedule once for each process
        total = phase.steps * self.accelerator.num_processes
        optimizer, scheduler = make_optimizer(self.workload, trainable, total, recipe, phase.rho)
        self.accelerator.free_memory()
        if self.sharded:
            sharding.gathers_state(optimizer)
            unwrap(self.model)
            model = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # else one more copy in each
            optimizer, scheduler = self.accelerator.prepare(optimizer, scheduler)
        else:
            model, optimizer, scheduler = self.accelerator.prepare(self.model, optimizer, scheduler)
        loader = share_out(batches, self.accelerator)
        optimizer.zero_grad()  # the user's own training may have left gradients, and a resumed run has others
        average = AveragedWeights(_parameters(self.model), recipe.average, phase.steps) if recipe.average else None
        taker = Steps(
            workload=self.workload,
            accelerator=self.accelerator,
            precision=self.config.precision,
            inner=self.model,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            hooks=phase.hooks,
            clip=recipe.clip if self.workload.optimizer is None else 0.0,
            average=average,
            stopwatch=self.stopwatch,
        )
        first, part, random_state = 0, PartOfEpoch(), None
        if self.snapshot and self.folder and self.resume_from and self.snapshot.phase == phase.name:
            self.folder.restore(self.accelerator, self.resume_from)
            first, part, random_state = self.snapshot.epochs_done, self.snapshot.part, RandomState.of_now()
            if average is not None:
                average.load(self.snapshot.average)
        due, epochs = update_steps(steps, self.config.updates_per_epoch), math.ceil(phase.steps / steps)
        timer = Timer(self.config.checkpoint_minutes)
        for epoch in range(first, epochs):
            seed_epoch(batches, self.config.seed, phase.name, epoch)
            started, done, before = time.perf_counter() - part.seconds, epoch * steps, part.steps
            model.train()
            left = min(steps, phase.steps - done)
            pace = Pace(phase.steps - done - before, self.accelerator.num_processes)
            source, count = islice(read(loader), left), before
            if random_state is not None and before:
                self._read_again(source, before, random_state)
            with self.reporter.task(f"{phase.name} epoch {epoch + 1}/{epochs}", left - before) as task:
                for count, batch in enumerate(source, start=before + 1):
                    where = f"{phase.name}, epoch {epoch + 1}, step {count}"
                    loss = taker.take(batch, self.teacher, where, done + count)
                    if count in due:
                        taker.update()
                    pace.step(samples_in(batch))
                    part = PartOfEpoch(steps=count, summed=part.summed + loss, seconds=time.perf_counter() - started)
                    if count < left and self._saves_within_epochs and timer.is_due:
                        self._save(phase, epoch, part, average)
                        timer.restart()
                    task.advance(f"loss {loss:.4f}, {pace}")
            if count == 0:
                raise WorkloadError(
                    f"`train_batches` yielded nothing in epoch {epoch + 1}",
                    hint="give an iterable that starts anew each epoch and is not empty, such as a DataLoader",
                )
            if average is not None and epoch + 1 == epochs:
                average.store()
            self._follow_first()
            mean_loss = self._mean_of_processes(part.summed / count)
            record = self._measure(phase.name, epoch + 1, mean_loss, time.perf_counter() - started)
            self.curve.append(record)
            self.reporter.note(_describe(record))
            part = PartOfEpoch()
            if self.folder:
                self._save(phase, epoch + 1, part, average)
                timer.restart()
            self.accelerator.wait_for_everyone()

    @property
    def _saves_within_epochs(self) -> bool:
        """One process alone does: several would have to save at the same step, with the random numbers of each."""
        return self.folder is not None and self.accelerator.num_processes == 1

    def _read_again(self, source: Iterator[Any], steps: int, random_state: RandomState) -> None:
        """Pass over what an interrupted epoch has trained on; then random numbers go on where they were."""
        with self.reporter.task("reading what was trained on", steps) as task:
            for _ in islice(source, steps):
                task.advance()
        random_state.restore()

    def _save(self, phase: _Phase, epochs_done: int, part: PartOfEpoch, average: AveragedWeights | None) -> None:
        assert self.folder is not None
        kept = {n: t.cpu() for n, t in whole_in_turn(average.average)} if average is not None else {}
        self.folder.save(self.accelerator, self._snapshot(phase, epochs_done, part, kept))

    def _measure(self, phase: str, epoch: int, loss: float | None, seconds: float) -> EpochRecord:
        """Evaluate the live model and, while it is not pruned yet, a hard-pruned copy, in float32.

        Masks may have come in force in the step before: then the live model's statistics are taken anew too.
        """
        metric = hard = None
        if self.workload.is_evaluated:
            live = self.evaluation.twin(self.model)
            if phase != RETRAIN and isinstance(self.method, MaskedMethod) and self.method.kept:
                self.evaluation.recalibrate(live)
            metric = hard = self.evaluation.metric(live)
            if phase != RETRAIN:
                pruned = self.evaluation.twin(self.model)
                self.method.masks().apply_(_parameters(pruned))
                self.evaluation.recalibrate(pruned)
                hard = self.evaluation.metric(pruned)
        return EpochRecord(phase=phase, epoch=epoch, loss=loss, metric=metric, hard_pruned=hard, seconds=seconds)

    def _snapshot(self, phase: _Phase, epochs_done: int, part: PartOfEpoch, average: Mapping[str, Tensor]) -> Snapshot:
        retraining = phase.name == RETRAIN
        state = MethodState({}, {}, tuple(self.method.history)) if retraining else self.method.state()
        masks = self.masks.tensors if retraining else {}
        options = (self.plan if retraining else self.method.plan).options()
        return Snapshot(phase.name, epochs_done, part, tuple(self.curve), state, masks, average, options)

    def _read_probe(self) -> None:
        """Take the first batches once, from a seed of their own, so that a resumed run takes the same."""
        batches = self.workload.train_batches
        assert batches is not None
        seed_epoch(batches, self.config.seed, "probe", 0)
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = share_of_first(batches, self.config.probe_batches, index, processes)
        self.probe = [send_to_device(batch, self.accelerator.device) for batch in first]
        if not self.probe:
            raise WorkloadError(
                "`train_batches` yielded nothing", hint="check the data folder and the loader's batch size"
            )


def _describe(record: EpochRecord) -> str:
    metric = "" if record.metric is None else f", metric {record.metric:.4f}"
    hard = "" if record.hard_pruned is None else f", hard-pruned {record.hard_pruned:.4f}"
    return f"  {record.phase} epoch {record.epoch}: loss {record.loss:.4f}{metric}{hard}, {record.seconds:.1f} s"


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name they have: a plan may name a tied one by any."""
    return dict(model.named_parameters(remove_duplicate=False))
