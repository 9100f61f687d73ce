"""Training under a plan: its phases in order, the method in them, hard-pruning on a copy after each epoch.

`slrc/training/phase.py` takes the steps of a phase.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from slrc.config import CompileConfig
from slrc.errors import PlanError, WorkloadError
from slrc.methods.base import MaskedMethod, Method, MethodState
from slrc.methods.magnitude import Magnitude
from slrc.methods.registry import make_method
from slrc.methods.settings import MethodName
from slrc.progress import Quiet, Reporter
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import own, own_of
from slrc.training.batches import sparse_steps, update_steps
from slrc.training.checkpoints import CheckpointFolder, EpochRecord, PartOfEpoch, Snapshot, misfit
from slrc.training.choose_method import choose_method
from slrc.training.distillation import Teacher
from slrc.training.evaluation import check_finite, unwrap
from slrc.training.phase import Listener, Phase, PhaseLoop, Resumed
from slrc.training.probe import Probe
from slrc.training.run import Run
from slrc.training.steps import Hooks
from slrc.training.trained import Trained, read_weights
from slrc.workload import Workload

RETRAIN = "retrain"
Pruner = Callable[[], Masks]
"""Prunes a workload's model in place; returns the masks that it now obeys."""
MethodMaker = Callable[[MethodName, Mapping[str, nn.Parameter], Plan, int, CompileConfig], Method]


def _nothing() -> object:
    return None


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
        return trainer.train()
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
        self.run = Run.of(workload, config, reporter)
        self.accelerator, self.evaluation = self.run.accelerator, self.run.evaluation
        self.model = workload.model.to(self.accelerator.device)
        self.start = read_weights(config.start_from, self.model) if config.start_from else None
        self.folder = CheckpointFolder(checkpoints) if checkpoints else None
        found = self.folder.newest() if self.folder and resume else None
        self.resume_from = found
        self.snapshot = self.folder.read(found) if self.folder and found else None
        self.curve = list(self.snapshot.curve) if self.snapshot else []
        self.masks = Masks(self.snapshot.masks) if self.snapshot else Masks()
        self.method: Method = Magnitude(_parameters(self.model), plan)
        self.probe: Probe | None = None
        self.teacher: Teacher | None = None

    def train(self) -> Trained:
        """Sparse epochs, projection, retraining; what the newest checkpoint has done already is not done again."""
        self._check_storable()
        if self.snapshot:
            within = f", step {self.snapshot.part.steps} of the next" if self.snapshot.part.steps else ""
            self.reporter.note(f"going on after {self.snapshot.phase} epoch {self.snapshot.epochs_done}{within}")
        if self._has_steps and self.config.distill:
            given = self.given_teacher
            if given is None:
                taught_by = self.run.placement.teacher(self.evaluation.twin(self.model))
            else:
                taught_by = given.to(self.accelerator.device)
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
            self._place_model()
        elif self.prune is not None:
            self._prune_without_training(self.prune)
            self._place_model()
        else:
            self._place_model()
            self._run_sparse_phase()
            self.plan, self.masks = self.method.plan, self.method.masks()
        parameters = _parameters(self.model)
        self.masks.check(self.plan, parameters)
        if self.plan.budget is not None:  # which may have been shared out anew
            reached = self.masks.sparsity(self.plan)
            self.plan = self.plan.model_copy(update={"sparsity": reached, "sparsity_asked": reached})
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
            cost=self.run.stopwatch.cost(self.teacher.num_bytes if self.teacher else 0, self._method_bytes()),
            undistilled=(self.teacher and self.teacher.unfit) or "",
        )

    def _place_model(self) -> None:
        if self._has_steps:
            self.model = self.run.placement.trained(self.workload.model)

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
            self.probe = Probe(self.run)
        if self.snapshot:
            self._load_method(self.snapshot)
        else:
            self.curve.append(self._measure(str(self.method_name), 0, None, 0.0))
            check_finite(self.curve[0].metric, " for the model as it was given")
            if self.start is not None:
                self.model.load_state_dict(self.start, strict=False)
                self.method = self._make_method(total)
            if total:
                self.method.start(self._probe_loss)
        if total:
            hooks = Hooks(
                after_backward=self.method.add_penalty_gradient,
                after_step=self.method.after_step,
                on_update=lambda: self.method.update(self._probe_loss),
            )
            self._run_phase(Phase(str(self.method_name), total, hooks, self.method.rho_at))

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
        retraining = self.config.retrain_epochs * self.run.epoch_steps if self.config.retrain_epochs else 0
        return retraining + (0 if self.prune is None else self._asked_steps)

    @property
    def _asked_steps(self) -> int:
        if self.workload.train_batches is None or not self.config.trains:
            return 0
        return sparse_steps(self.config, self.run.epoch_steps)

    def _updates_in(self, total: int) -> int:
        """Return how many updates there are in so many steps."""
        if not total:
            return 0
        due = update_steps(self.run.epoch_steps, self.config.updates_per_epoch)
        epochs, rest = divmod(total, self.run.epoch_steps)
        return epochs * len(due) + sum(step <= rest for step in due)

    def _load_method(self, snapshot: Snapshot) -> None:
        assert self.resume_from is not None
        try:
            self.method.load_state(snapshot.method)
        except (KeyError, RuntimeError) as error:
            raise misfit(self.resume_from, error) from error

    def _retrain_phase(self) -> Phase:
        # Zeroing after each step undoes what momentum, weight decay and the gradient did to pruned weights.
        parameters = _parameters(self.model)
        masks = [(parameters[n], own_of(m, parameters[n])) for n, m in self.masks.tensors.items()]

        def keep_pruned() -> None:
            with torch.no_grad():
                for parameter, mask in masks:
                    own(parameter).mul_(mask)

        return Phase(RETRAIN, self._masked_steps, Hooks(_nothing, keep_pruned, _nothing))

    def _probe_loss(self) -> float:
        assert self.probe is not None
        return self.probe.loss(self.model, len(self.curve) - 1)

    def _run_phase(self, phase: Phase) -> None:
        resumed = None
        if self.snapshot and self.folder and self.resume_from and self.snapshot.phase == phase.name:
            folder, found = self.folder, self.resume_from
            resumed = Resumed(self.snapshot, lambda: folder.restore(self.accelerator, found))
        save = partial(self._save, phase.name) if self.folder else None
        listener = Listener(partial(self._end_epoch, phase.name), save)
        PhaseLoop(self.run, phase, self.model, self.teacher, listener).go(resumed)

    def _end_epoch(self, phase: str, epoch: int, loss: float, seconds: float) -> None:
        record = self._measure(phase, epoch, loss, seconds)
        self.curve.append(record)
        self.reporter.note(_describe(record))
        if not all(math.isfinite(value) for value in (record.metric, record.hard_pruned) if value is not None):
            self.reporter.note("  note: a compile cannot end with a metric that is not finite: look at `evaluate`")

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

    def _save(self, phase: str, epochs_done: int, part: PartOfEpoch, average: Mapping[str, Tensor]) -> None:
        assert self.folder is not None
        retraining = phase == RETRAIN
        state = MethodState({}, {}, tuple(self.method.history)) if retraining else self.method.state()
        masks = self.masks.tensors if retraining else {}
        options = (self.plan if retraining else self.method.plan).options()
        snapshot = Snapshot(phase, epochs_done, part, tuple(self.curve), state, masks, average, options)
        self.folder.save(self.accelerator, snapshot)


def _describe(record: EpochRecord) -> str:
    metric = "" if record.metric is None else f", metric {record.metric:.4f}"
    hard = "" if record.hard_pruned is None else f", hard-pruned {record.hard_pruned:.4f}"
    return f"  {record.phase} epoch {record.epoch}: loss {record.loss:.4f}{metric}{hard}, {record.seconds:.1f} s"


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name they have: a plan may name a tied one by any."""
    return dict(model.named_parameters(remove_duplicate=False))
