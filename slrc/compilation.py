"""One compile under way: what its stages share, say on the way, and write."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from slrc.backends import LoweredProgram, Target, get_backend
from slrc.backends.engine_summary import EngineSummary
from slrc.backends.runner_module import RunnerModule
from slrc.config import CompileConfig
from slrc.errors import BackendError, OutputError
from slrc.forms.form import FormChoice
from slrc.ir.program import Program
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.devices import Device, local_device
from slrc.measuring.timing import Latency
from slrc.methods.settings import MethodName
from slrc.pipeline import apply_forms, lower
from slrc.probes import FirstCall, Probe
from slrc.progress import Reporter
from slrc.quantized_targets import IntegerTargets, Rounded, float_name
from slrc.reconstruction.likeness import likeness_to_dense
from slrc.reconstruction.reconstruct import reconstruct
from slrc.reporting.bench import INPUTS
from slrc.reporting.page import write_page
from slrc.reporting.report import Int8Result, Report
from slrc.sparsity.plans import LatencyForecast, Plan
from slrc.training.batch_norm import constant_channels
from slrc.training.choose_method import choose_method
from slrc.training.distillation import returns_logits
from slrc.training.evaluation import check_finite
from slrc.training.loop import train
from slrc.training.trained import Trained, save_weights
from slrc.verify import Check, Checker, compare_metric
from slrc.workload import Workload
from slrc.workspace import Workspace

PROGRAM = "program"
T = TypeVar("T")
FORECAST_TOLERANCE = 0.15
BUDGET_TOLERANCE = 0.05
"""By how much more than the latency that was asked for a compiled model may take before its report says so."""
ILL_CONDITIONED = 1e-3
"""The share of an output that a model loses in float32 from which on its report says so."""


@dataclass(frozen=True)
class Emitted:
    """The dense and the compiled model for one target; `program` is what the compiled one was lowered from.

    Of an int8 target these are in float32, for what it computes is compared with them; `integers` are its own, dense
    and compiled, and `choice` is theirs.
    """

    target: Target
    dense: LoweredProgram
    compiled: LoweredProgram
    program: Program
    choice: FormChoice
    integers: tuple[Rounded, Rounded] | None = None

    @property
    def own(self) -> tuple[LoweredProgram, LoweredProgram]:
        """The target's own dense and compiled model: in int8 where it asks for that."""
        if self.integers is None:
            return self.dense, self.compiled
        dense, compiled = self.integers
        return dense.lowered, compiled.lowered


@dataclass(frozen=True)
class DenseModel:
    """The dense model for one target, in float32, and in int8 where the target asks for it."""

    program: Program
    lowered: LoweredProgram
    rounded: Rounded | None = None


@dataclass
class Compilation:
    """A run's inputs, where it writes, and its notes so far."""

    workload: Workload
    config: CompileConfig
    targets: Sequence[Target]
    workspace: Workspace
    reporter: Reporter
    device: Device = field(default_factory=local_device)
    notes: list[str] = field(default_factory=list)
    dense_checks: tuple[Check, ...] = ()
    engines: dict[Target, tuple[EngineSummary | None, EngineSummary | None]] = field(default_factory=dict)
    """Of dense and compiled, where a device built them."""

    def __post_init__(self) -> None:
        for text in self.workload.warnings:
            self.note(text)

    def why_not_run(self, target: Target) -> str:
        """Why a target cannot run on the device; empty if it can."""
        return self.device.why_not_run(target)

    def note(self, text: str) -> None:
        """Say something on the way, and in the report."""
        self.notes.append(text)
        self.reporter.note(f"note: {text}")

    def restore_dense(self) -> None:
        """Keep the dense weights for a resumed run, or go back to those that the interrupted one started from."""
        state = {n: t for n, t in self.workload.model.state_dict().items() if isinstance(t, Tensor)}
        kept = self.workspace.keep_tensors("dense", state)
        if {n: t.shape for n, t in kept.items()} != {n: t.shape for n, t in state.items()}:
            raise OutputError(
                f"cannot resume `{self.workspace.out}`: the model is not the one that the run started with",
                hint="`--overwrite` starts anew",
            )
        self.workload.model.load_state_dict(kept, strict=False)

    @cached_property
    def integers(self) -> IntegerTargets:
        """What rounds for int8 targets."""
        return IntegerTargets(self.workload, self.config, self.note, self.reporter)

    def lower_dense(self, program: Program, dense: Program, probes: Sequence[Probe]) -> list[DenseModel]:
        """Check the capture against the eager module, and emit it: what a target cannot take is said before training.

        `dense` is the program with all that the compiled one gets besides sparsity.
        """
        check = Checker(self.workload.model.cpu(), probes)
        check("eager module = captured program", program.module())
        self.workspace.new_result()
        models = []
        for target in self.targets:
            lowered = self._emit(dense, target.in_float, float_name("dense", target), target.folder)
            if runs := _runs_here(lowered):
                self._prove_as(runs, f"eager module = dense on {target.in_float}", lowered, dense, check)
            rounded = None
            if target.is_integer:
                rounded = self.integers.lower_dense(dense, target, self._emit)
                check.checks += self.integers.prove("dense, rounded", rounded, probes)
            models.append(DenseModel(dense, lowered, rounded))
        self.dense_checks = tuple(check.checks)
        return models

    def train(self, program: Program, plan: Plan) -> Trained:
        """Train the workload's model in place under the plan, or refit its layers."""
        if not program.batch_is_dynamic:
            self.note("the model fixes its batch size: the compiled one takes the example's batch only")
        if plan.shortfall:
            self.note(plan.shortfall)
        reconstructs = choose_method(self.config, self.workload, plan) is MethodName.RECONSTRUCT
        run = partial(reconstruct, program) if reconstructs else train
        trained = run(
            self.workload,
            plan,
            self.config,
            checkpoints=self.workspace.checkpoints,
            resume=self.workspace.resumed,
            reporter=self.reporter,
        )
        for text in trained.notes:
            self.note(text)
        if self.workload.train_batches is None and not reconstructs:
            self.note(f"the workload has no training data: pruned by {trained.method} in one shot")
        if trained.undistilled:
            self.note(
                f"not distilled from the dense model: {trained.undistilled}; `Workload(distill=...)` can say how to "
                "compare outputs"
            )
        if not self.workload.is_evaluated:
            alike = self._likeness(program, trained, reconstructs)
            self.note(f"the workload has neither `eval_batches` nor `evaluate`: no accuracy was measured{alike}")
        return trained

    def _likeness(self, program: Program, trained: Trained, reconstructs: bool) -> str:
        """Return what can be told without labels, if there is data."""
        if self.workload.calibration is None and self.workload.train_batches is None:
            return ""
        is_apart = self.workload.calibration is not None  # from what is trained on
        try:
            found = likeness_to_dense(
                program,
                program.with_tensors(trained.tensors),
                self.workload,
                self.config.seed,
                refitted=self.config.reconstruct.images if reconstructs and is_apart else 0,
                logits=None if self.workload.train_batches is None else returns_logits(self.workload),
            )
        except Exception as error:  # of the user's data and model: no reason to lose a compile
            return f", nor how much the outputs are like the dense model's: {str(error).partition(chr(10))[0]}"
        return f"; {found}"

    def evaluate_masked(
        self, program: Program, trained: Trained, probes: Sequence[Probe]
    ) -> tuple[Checker, tuple[str, float] | None]:
        """Return what compares with the user's own module, its weights masked, and that module's leading metric.

        The evaluation's first batch joins the probes.
        """
        module = self.workload.model.cpu()
        module.load_state_dict(trained.tensors, strict=False)  # extra state that is no tensor stays
        with FirstCall(module) as seen:
            metric = self.workload.measure(module)
        if constant := constant_channels(module):
            self.note(f"channels that are constant after pruning, of batch norms: {'; '.join(constant)}")
        check = Checker(module, [*probes, *seen.probe(program)])
        if check.largest_loss > ILL_CONDITIONED:
            self.note(
                f"the pruned model is badly conditioned: in float32 it loses {check.largest_loss:.1e} of its outputs, "
                "and each step was allowed ten times as much"
            )
        return check, metric

    def lower(self, dense: Sequence[DenseModel], slim: Program, check: Checker) -> list[Emitted]:
        """Emit the slim program for every target, with its layers in their forms there."""
        emitted = []
        for target, beside in zip(self.targets, dense, strict=True):
            choice = self._choose(slim, target.in_float)
            formed = apply_forms(slim, choice.forms, check.program)
            compiled = self._emit(formed, target.in_float, float_name("compiled", target), target.folder)
            integers = None
            if beside.rounded is not None:
                choice = self._choose(slim, target)
                choice, rounded = self.integers.lower(
                    slim, target, choice, beside.program, self.workspace, check, self._emit
                )
                integers = beside.rounded, rounded
            pair = Emitted(target, beside.lowered, compiled, formed, choice, integers)
            for text in pair.own[1].artifact.warnings:
                self.note(f"on {target} {text}")
            emitted.append(pair)
        return emitted

    def _choose(self, slim: Program, target: Target) -> FormChoice:
        choice = choose_forms(
            slim,
            target,
            threads=self.config.threads,
            reporter=self.reporter,
            device=self.device,
            in_float=self.integers.in_float(slim) if target.is_integer else (),
        )
        for text in choice.notes({weight: layer.name for weight, layer in slim.layers.items()}):
            self.note(text)
        return choice

    def prove(self, slim: Program, pair: Emitted, metric: tuple[str, float] | None, check: Checker) -> float | None:
        """Run what was emitted where it runs here: compare its outputs and its metric; return the metric."""
        if pair.integers is not None:
            check.checks += self.integers.prove("compiled, rounded", pair.integers[1], check.probes)
        if reason := self.why_not_run(pair.target):
            self.note(f"{pair.target} was not run {f'on {self.device.name}' if self.device.name else 'here'}: {reason}")
        artifact, target, runs = pair.compiled.artifact, pair.compiled.target, _runs_here(pair.compiled)
        if not runs:
            return None
        module = self._prove_as(runs, f"masked module = {target}", pair.compiled, slim, check)
        if runs is Runs.WHOLE and artifact.kernels is not None:
            self._prove(f"masked module = {target} without kernels", pair.compiled, slim, check, stock=True)
        if module is None or metric is None:
            return None
        measured = self.workload.measure_counted(module)
        assert measured is not None
        check_finite(measured.value, f" for `{measured.name}` of the compiled model")
        step = f"{metric[0]}: masked module = {target}"
        check.checks.append(compare_metric(step, metric[1], measured.value, measured.samples))
        return measured.value

    def int8_result(
        self, pair: Emitted, metric: tuple[str, float] | None, dense_metric: float | None, check: Checker
    ) -> Int8Result | None:
        """Return what rounding did for an int8 target. See `IntegerTargets.result`."""
        if pair.integers is None:
            return None
        floats = pair.dense, pair.compiled
        return self.integers.result(pair.target, floats, pair.integers, dense_metric, metric, check)

    def measure(self, slim: Program, pair: Emitted, forecast: LatencyForecast | None, check: Checker) -> Latency:
        """Time the dense and the compiled model in turns; another device also compares what they return there.

        Of an int8 target the float32 models take their turns too.
        """
        inputs, threads = slim.flat_inputs(), self.config.threads
        forms = {weight: str(form) for weight, form in pair.choice.forms.items()}
        others = {} if pair.integers is None else self.integers.beside(pair.target, pair.dense, pair.compiled)
        measured = self.device.latency(*pair.own, inputs, threads, forms, self.reporter, others)
        latency = measured.latency
        self.engines[pair.target] = measured.engines
        if others:
            self.integers.keep_times(pair.target, measured)
        check.checks += measured.checks
        if forecast and (forecast.target, forecast.threads) == (str(pair.target), latency.threads):
            predicted = forecast.predicted * latency.dense_ms.p50
            latency = latency.model_copy(update={"predicted_ms": predicted})
            reached = 1 / latency.speedup
            if reached > forecast.budget * (1 + BUDGET_TOLERANCE):
                self.note(
                    f"on {pair.target} the compiled model takes {reached:.1%} of the dense latency, and "
                    f"{forecast.budget:.1%} was gone for"
                )
            if abs(latency.compiled_ms.p50 / predicted - 1) > FORECAST_TOLERANCE:
                spared = ", ".join(f"`{name}`" for name in self.integers.spared.get(pair.target, ()))
                why = f"that {spared} would stay in float32 was not known" if spared else "was the machine busy then?"
                self.note(
                    f"on {pair.target} the compiled model takes {latency.compiled_ms.p50:.3f} ms, and "
                    f"{predicted:.3f} ms were predicted when its parts were timed: {why}"
                )
        if latency.speedup < 1:
            self.note(
                f"on {pair.target} the compiled model is slower than the dense one ({latency.speedup:.2f}x): "
                "its layers are too small for what the pattern costs; `--skip` the smallest or try `--pattern channel`"
            )
        return latency

    def checks(self, check: Checker) -> tuple[Check, ...]:
        """Return all that was compared: the dense model's checks, then those of the masked one."""
        return (*self.dense_checks, *check.checks)

    def publish(self, report: Report, plan: Plan, trained: Trained, slim: Program) -> Report:
        """Write what is left, put the result in its place, and return the report as it was written."""
        folder = self.workspace.result
        archive = self._unless_unstorable("model.pt2", lambda: _archive(slim))
        stored = self._unless_unstorable(PROGRAM, slim.stored)
        report = report.model_copy(update={"notes": tuple(self.notes)})
        with self.workspace.writing():
            plan.save(folder / "plan.json")
            trained.masks.save(folder / "masks.safetensors")
            save_weights(trained.tensors, folder)
            save_file({f"input_{i}": x for i, x in enumerate(slim.flat_inputs())}, folder / INPUTS)
            if archive is not None:
                (folder / "model.pt2").write_bytes(archive)
            if stored is not None:
                stored.write(folder / PROGRAM)
            report.save(folder)
            write_page(report, folder / "report.html")
        self.workspace.publish()
        return report

    def _unless_unstorable(self, name: str, store: Callable[[], T]) -> T | None:
        """Return what `store` makes of the program; a model that it cannot take is no reason to lose the rest."""
        try:
            return store()
        except Exception as error:  # whatever torch raises for containers and operators of the user's own
            self.note(f"`{name}` was not written: {str(error).partition(chr(10))[0]}")
            return None

    def _emit(self, program: Program, target: Target, name: str, folder: str) -> LoweredProgram:
        self.reporter.note(f"emitting {target} ({name})")
        return lower(program, target, self.workspace.result / folder / name)

    def _prove_as(
        self, runs: Runs, step: str, lowered: LoweredProgram, program: Program, check: Checker
    ) -> RunnerModule | None:
        """As `_prove`; what runs here as plain ONNX alone is no module of its own, and a runtime may not take it."""
        if runs is Runs.WHOLE:
            return self._prove(step, lowered, program, check)
        try:
            self._prove(f"{step}, as ONNX on this CPU", lowered, program, check, stock=True)
        except BackendError as error:
            self.note(f"what is emitted for {lowered.target} was not compared: {error.message}")
        return None

    def _prove(
        self, step: str, lowered: LoweredProgram, program: Program, check: Checker, *, stock: bool = False
    ) -> RunnerModule:
        """Compare an artifact with the model, and return it as a module."""
        backend = get_backend(lowered.target)
        runner = backend.load(lowered.folder, threads=self.config.threads, stock=stock)
        module = RunnerModule(runner, lowered.artifact, program)
        check(step, module, backend.tolerance(lowered.artifact))
        return module


class Runs(Enum):
    """How an artifact runs on this machine: as on its target, or its ONNX file in plain ONNX Runtime."""

    WHOLE = "whole"
    STOCK = "stock"


def _runs_here(lowered: LoweredProgram) -> Runs | None:
    """Return how an artifact runs on this machine, to be compared; one for another machine runs as plain ONNX."""
    if not get_backend(lowered.target).available(lowered.target).why_not_run:
        return Runs.WHOLE
    return Runs.STOCK if find_spec("onnxruntime") else None


def _archive(program: Program) -> bytes:
    """Return a program as `torch.export.save` writes it; to a full disk directly, torch would end the process."""
    archive = io.BytesIO()
    torch.export.save(program.exported, archive)
    return archive.getvalue()
