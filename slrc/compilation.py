"""One compile under way: what its stages share, and what they write."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from slrc.backends import LoweredProgram, Runner, Target, get_backend
from slrc.config import CompileConfig
from slrc.errors import BackendError, OutputError, WorkloadError
from slrc.forms.form import FormChoice
from slrc.ir.program import Program
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.timing import Latency, environment, time_pair
from slrc.pipeline import STRUCTURE, apply_forms, run_passes
from slrc.progress import Reporter
from slrc.reporting.bench import INPUTS
from slrc.reporting.page import write_page
from slrc.reporting.report import Accuracy, LayerSparsity, Pair, Report, Sparsity, TargetResult
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import LatencyForecast, Plan
from slrc.training.checkpoints import disk_error
from slrc.training.loop import Trained, train
from slrc.verify import TOLERANCE_FP32, Check, RunnerModule, compare, compare_metric, outputs_of
from slrc.workload import Workload
from slrc.workspace import Workspace

PROGRAM = "program"
T = TypeVar("T")
FORECAST_TOLERANCE = 0.15


@dataclass
class Lowered:
    """The dense and the compiled program on one target."""

    target: Target
    dense: LoweredProgram
    compiled: LoweredProgram
    program: Program
    """What `compiled` was lowered from: its layers are in the forms of `choice`."""
    choice: FormChoice


@dataclass
class Compilation:
    """State of a run: its checks and notes so far."""

    workload: Workload
    config: CompileConfig
    targets: Sequence[Target]
    workspace: Workspace
    reporter: Reporter
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for text in self.workload.warnings:
            self.note(text)

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

    def lower_dense(self, program: Program, dense: Program) -> list[LoweredProgram]:
        """Check the capture against the eager module, and emit it: what a target cannot take is said before training.

        `dense` is the program with all that the compiled one gets besides sparsity.
        """
        reference = outputs_of(self.workload.model.cpu(), program.example_inputs)
        outputs = outputs_of(program.module(), program.example_inputs)
        self.checks.append(compare("eager module = captured program", reference, outputs, TOLERANCE_FP32))
        self.workspace.new_result()
        lowered = []
        for target in self.targets:
            lowered.append(self._emit(dense, target, "dense"))
            if not get_backend(target).available(target).why_not_run:
                self._prove_equal(f"dense program = {target}", reference, lowered[-1], dense)
        return lowered

    def train(self, program: Program, plan: Plan) -> Trained:
        """Train the workload's model in place under the plan."""
        if not program.batch_is_dynamic:
            self.note("the model fixes its batch size: the compiled one takes the example's batch only")
        if plan.shortfall:
            self.note(plan.shortfall)
        trained = train(
            self.workload,
            plan,
            self.config,
            checkpoints=self.workspace.checkpoints,
            resume=self.workspace.resumed,
            reporter=self.reporter,
        )
        if self.workload.train_batches is None:
            self.note(f"the workload has no training data: pruned by {trained.method} in one shot")
        if self.workload.evaluate is None:
            self.note("the workload has no `evaluate`: no accuracy was measured")
        return trained

    def structure(self, program: Program, plan: Plan, trained: Trained) -> Program:
        """Turn masks into structure, each step checked against the user's own module with its weights masked."""
        module = self.workload.model.cpu()
        module.load_state_dict(trained.tensors, strict=False)  # extra state that is no tensor stays
        reference = outputs_of(module, program.example_inputs)
        masked = program.with_tensors(trained.tensors)
        return run_passes(STRUCTURE, masked, plan, trained.masks, reference, self.checks)

    def lower(self, dense: Sequence[LoweredProgram], slim: Program) -> list[Lowered]:
        """Emit the slim program for every target, with its layers in their forms there."""
        reference = outputs_of(self.workload.model.cpu(), slim.example_inputs)
        lowered = []
        for target, beside in zip(self.targets, dense, strict=True):
            choice = choose_forms(slim, target, threads=self.config.threads, reporter=self.reporter)
            if choice.lost:
                self.note(f"on {target} layers stay dense that could be packed: {choice.lost}")
            formed = apply_forms(slim, choice.forms, reference, self.checks)
            lowered.append(Lowered(target, beside, self._emit(formed, target, "compiled"), formed, choice))
        return lowered

    def report(
        self,
        program: Program,
        dense: Program,
        slim: Program,
        plan: Plan,
        trained: Trained,
        lowered: Sequence[Lowered],
    ) -> Report:
        """Run what can run here: prove, evaluate and measure it."""
        metric = self.workload.measure(self.workload.model)
        final = None if metric is None else self.workload.measure(slim.module())
        latency, results = [], []
        for pair in lowered:
            why_not = get_backend(pair.target).available(pair.target).why_not_run
            if why_not:
                self.note(f"{pair.target} was not run here: {why_not}")
            else:
                measured = self._prove(slim, pair, metric)
                final = measured or final
                latency.append(self._measure(slim, pair, plan.latency))
            size = Pair(dense=pair.dense.size_bytes, compiled=pair.compiled.size_bytes)
            results.append(
                TargetResult(
                    target=str(pair.target),
                    folder=pair.target.folder,
                    size_bytes=size,
                    precision=pair.compiled.artifact.precision,
                    not_run=why_not,
                    forms=pair.choice,
                )
            )
        return Report(
            model=self.workload.name,
            pattern=" + ".join(sorted({str(c.pattern) for c in plan})),
            method=trained.method,
            sparsity=Sparsity(asked=plan.sparsity_asked, reached=plan.sparsity),
            accuracy=_accuracy(metric, trained, final),
            params=Pair(dense=dense.num_parameters, compiled=_surviving(slim, trained.masks)),
            macs=Pair(dense=dense.macs, compiled=lowered[0].program.macs),
            size_bytes=results[0].size_bytes,
            latency=tuple(latency),
            checks=tuple(self.checks),
            slr=trained.history,
            curve=trained.curve,
            layers=tuple(
                LayerSparsity(
                    name=c.name,
                    pattern=str(c.pattern),
                    groups=c.groups,
                    kept=c.keep,
                    weights=c.num_weights(program.tensors),
                )
                for c in plan
            ),
            targets=tuple(results),
            notes=tuple(self.notes),
            config=self.config.model_dump(mode="json"),
            environment=environment(),
        )

    def publish(self, report: Report, plan: Plan, trained: Trained, slim: Program) -> Report:
        """Write what is left, put the result in its place, and return the report as it was written."""
        folder = self.workspace.result
        archive = self._unless_unstorable("model.pt2", lambda: _archive(slim))
        stored = self._unless_unstorable(PROGRAM, slim.stored)
        report = report.model_copy(update={"notes": tuple(self.notes)})
        with self.workspace.writing():
            plan.save(folder / "plan.json")
            trained.masks.save(folder / "masks.safetensors")
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

    def _emit(self, program: Program, target: Target, name: str) -> LoweredProgram:
        backend = get_backend(target)
        reasons = [backend.available(target).why_not_emit, *backend.check(program)]
        if reason := next(filter(None, reasons), None):
            raise BackendError(f"target `{target}` cannot be built here: {reason}")
        folder = self.workspace.result / target.folder / name
        folder.mkdir(parents=True)
        self.reporter.note(f"emitting {target} ({name})")
        try:
            return LoweredProgram(backend.lower(program, target, folder), folder, target)
        except OSError as error:
            raise disk_error(folder, error) from error

    def _prove_equal(
        self, step: str, reference: Sequence[Tensor], lowered: LoweredProgram, program: Program
    ) -> tuple[Runner, list[Tensor]]:
        """Run an artifact on the program's inputs and compare; return the runner and its outputs."""
        backend = get_backend(lowered.target)
        runner = backend.load(lowered.folder, threads=self.config.threads)
        outputs = runner(*program.flat_inputs())
        self.checks.append(compare(step, reference, outputs, backend.tolerance(lowered.artifact)))
        return runner, outputs

    def _prove(self, slim: Program, pair: Lowered, metric: tuple[str, float] | None) -> tuple[str, float] | None:
        reference = outputs_of(slim.module(), slim.example_inputs)
        runner, outputs = self._prove_equal(f"slim program = {pair.target}", reference, pair.compiled, slim)
        backend, artifact = get_backend(pair.target), pair.compiled.artifact
        if artifact.kernels is not None:
            stock = backend.load(pair.compiled.folder, threads=self.config.threads, stock=True)
            step = f"{pair.target} with kernels = without"
            self.checks.append(compare(step, outputs, stock(*slim.flat_inputs()), backend.tolerance(artifact)))
        if metric is None:
            return None
        measured = self.workload.measure(RunnerModule(runner, artifact, slim))
        if measured is None or not math.isfinite(measured[1]):
            raise WorkloadError(f"`evaluate` returned {measured} for the compiled model")
        self.checks.append(compare_metric(f"{metric[0]}: masked module = {pair.target}", metric[1], measured[1]))
        return measured

    def _measure(self, slim: Program, pair: Lowered, forecast: LatencyForecast | None) -> Latency:
        latency = time_pair(pair.dense, pair.compiled, slim.flat_inputs(), self.config.threads, self.reporter)
        if forecast and (forecast.target, forecast.threads) == (str(pair.target), latency.threads):
            predicted = forecast.predicted * latency.dense_ms.p50
            latency = latency.model_copy(update={"predicted_ms": predicted})
            if abs(latency.compiled_ms.p50 / predicted - 1) > FORECAST_TOLERANCE:
                self.note(
                    f"on {pair.target} the compiled model takes {latency.compiled_ms.p50:.3f} ms, "
                    f"{predicted:.3f} ms were predicted: was the machine busy when the parts were timed?"
                )
        if latency.speedup < 1:
            self.note(
                f"on {pair.target} the compiled model is slower than the dense one ({latency.speedup:.2f}x): "
                "its layers are too small for what the pattern costs; `--skip` the smallest or try `--pattern channel`"
            )
        return latency


def _archive(program: Program) -> bytes:
    """Return a program as `torch.export.save` writes it; to a full disk directly, torch would end the process."""
    archive = io.BytesIO()
    torch.export.save(program.exported, archive)
    return archive.getvalue()


def _accuracy(masked: tuple[str, float] | None, trained: Trained, final: tuple[str, float] | None) -> Accuracy | None:
    if masked is None or final is None or trained.dense is None or trained.hard_pruned is None:
        return None
    return Accuracy(metric=masked[0], dense=trained.dense, hard_pruned=trained.hard_pruned, final=final[1])


def _surviving(slim: Program, masks: Masks) -> int:
    """Return the number of parameters that are not pruned: stored ones less those that are masked."""
    masked = sum(
        int((~mask).sum())
        for name, mask in masks.tensors.items()
        if name in slim.tensors and slim.tensors[name].shape == mask.shape
    )
    return slim.num_parameters - masked
