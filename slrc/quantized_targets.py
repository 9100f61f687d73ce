"""The int8 targets of a compile: what is rounded, trained, emitted, proven and measured beside the float32 models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from slrc.backends import LoweredProgram, Target, get_backend
from slrc.backends.runner_module import RunnerModule
from slrc.config import CompileConfig
from slrc.errors import BackendError, WorkloadError
from slrc.forms.form import FormChoice, Forms
from slrc.ir.program import Program
from slrc.measuring.devices import Measured
from slrc.measuring.timing import Percentiles
from slrc.passes.quantization.find_places import quantizable_weights
from slrc.passes.quantization.insert_quantizers import QuantizeBiases
from slrc.pipeline import pack_layers, split_layers
from slrc.probes import Probe
from slrc.progress import Reporter
from slrc.quantization.choose import Calibration, Quantized, named_layers, quantize
from slrc.quantization.prove import prove_integers, prove_same
from slrc.quantization.train import train_rounded
from slrc.reconstruction.calibration import Inputs, calibration_inputs
from slrc.reporting.report import Corner, Int8Result, Pair
from slrc.training.checkpoints import EpochRecord
from slrc.training.distillation import returns_logits
from slrc.training.evaluation import check_finite
from slrc.training.loop import RETRAIN
from slrc.verify import Check, Checker, compare_rounded
from slrc.workload import Workload
from slrc.workspace import Workspace

Emit = Callable[[Program, Target, str, str], LoweredProgram]
"""Emits a program for a target: the model's name, and the folder of the target."""
ONNX_FILE = "model.onnx"
"""What every backend writes, an engine beside it or not: integers are checked there."""


@dataclass(frozen=True)
class Rounded:
    """An int8 model: what it was emitted from, how that was rounded, and the epochs that it was trained for."""

    lowered: LoweredProgram
    program: Program
    calibration: Calibration
    training: tuple[EpochRecord, ...] = ()

    @property
    def kernels(self) -> Path | None:
        """The library of kernels, where the model has packed layers and is for this machine."""
        target, library = self.lowered.target, self.lowered.artifact.kernels
        runs_here = not get_backend(target).available(target).why_not_run
        return self.lowered.folder / library if library is not None and runs_here else None

    def runner(self, threads: int | None) -> RunnerModule:
        """Return the ONNX model on this CPU in the place of the user's model."""
        from slrc.backends.ort.run import OnnxRuntimeRunner

        runner = OnnxRuntimeRunner(self.lowered.folder / ONNX_FILE, threads, self.kernels)
        free = self.lowered.artifact.model_copy(
            update={"max_batch": None if self.program.batch_is_dynamic else self.program.batch}
        )
        return RunnerModule(runner, free, self.program)


MARGIN = 0.03
"""By how much more than in float32 a model may take in int8 before the report says so."""


@dataclass
class IntegerTargets:
    """Rounds programs for int8 targets.

    Args:
        workload: its data calibrates.
        config: the options.
        note: says something on the way, and in the report.
        reporter: where progress goes.
    """

    workload: Workload
    config: CompileConfig
    note: Callable[[str], None]
    reporter: Reporter
    corner_ms: dict[Target, list[Percentiles]] = field(default_factory=dict)
    """Of the targets that were timed: dense in float32 and int8, compiled in float32 and int8."""
    spared: dict[Target, dict[str, None]] = field(default_factory=dict)
    """The layers, by name, that stay in float32 in the dense or the compiled model; those of `--int8-skip` too."""

    def require_data(self) -> None:
        """Make sure of the data that the options need: better said now than after training.

        Raises:
            WorkloadError: `--max-drop` has no metric, or `--qat-epochs` nothing to train on.
        """
        if self.config.max_drop is not None and not self.workload.is_evaluated:
            raise WorkloadError(
                "`--max-drop` needs a metric, and the workload has none",
                hint="give `Workload(eval_batches=...)` or `evaluate`, or leave `--max-drop` out",
            )
        if self.config.qat_epochs and self.workload.train_batches is None:
            raise WorkloadError(
                "`--qat-epochs` needs training data, and the workload has none",
                hint="give `Workload(train_batches=..., loss=...)`, or leave `--qat-epochs` out",
            )

    def in_float(self, program: Program) -> tuple[str, ...]:
        """Return the weights of the layers that `--int8-skip` names.

        Raises:
            ConfigError: a name is that of no layer.
        """
        return named_layers(self.config.int8_skip, quantizable_weights(program.graph_module))

    def round(self, program: Program, target: Target, forms: Forms | None = None) -> Quantized:
        """Find how a program of a target loses least by rounding, its layers in their forms.

        Raises:
            BackendError: there is no ONNX Runtime here to prove by what is emitted.
            ConfigError: `--int8-skip` names no layer.
            WorkloadError: the calibration data does not fit.
        """
        if not find_spec("onnxruntime"):
            raise BackendError(
                f"target `{target}`: what is emitted is proven by ONNX Runtime, and `onnxruntime` is not installed",
                hint="pip install onnxruntime",
            )
        self.reporter.note(f"calibrating {program.name} for {target}")
        quantized = quantize(
            program,
            get_backend(target).scheme,
            self._inputs(program),
            self.config.int8,
            skip=self.config.int8_skip,
            forms=forms,
            logits=returns_logits(self.workload),
            acceptable=self._acceptable(program),
            reporter=self.reporter,
        )
        if quantized.spared:
            names = [n.removesuffix(".weight") for n in quantized.spared]
            self.spared.setdefault(target, {}).update(dict.fromkeys(names))
            self.note(f"on {target} these layers stay in float32: {', '.join(f'`{name}`' for name in names)}")
        return quantized

    def lower_dense(self, program: Program, target: Target, emit: Emit) -> Rounded:
        """Round the dense program, and emit it."""
        quantized = self.round(program, target)
        rounded = quantized.program()
        return Rounded(emit(rounded, target, "dense", target.folder), rounded, quantized.calibration)

    def lower(
        self,
        slim: Program,
        target: Target,
        choice: FormChoice,
        teacher: Program,
        workspace: Workspace,
        check: Checker,
        emit: Emit,
    ) -> tuple[FormChoice, Rounded]:
        """Round the slim program, its layers in their forms, train it if that is asked for, and emit it.

        The choice that comes back has what stays in float32.
        """
        split = split_layers(slim, choice.forms, check.program)
        quantized = self.round(split, target, choice.forms)
        choice = choice.spared(quantized.spared)
        if not quantized.calibration.quantized_layers:
            self.note(
                f"on {target} no layer of the compiled model is in int8: in float32 they are faster there, or rounding "
                f"them loses too much; `--target {target.in_float}` gives the same"
            )
        program, training = self._train(quantized, teacher, workspace.work / f"qat-{target.folder}", workspace.resumed)
        packed, checks = self._pack(program, choice.forms, check.probes)
        check.checks += checks
        emitted = emit(packed, target, "compiled", target.folder)
        return choice, Rounded(emitted, packed, quantized.calibration, training)

    def _train(
        self, quantized: Quantized, teacher: Program, checkpoints: Path, resume: bool
    ) -> tuple[Program, tuple[EpochRecord, ...]]:
        """Return the program to emit, after the epochs of quantisation-aware training that were asked for.

        The records are that before them, and one for each.
        """
        if not self.config.qat_epochs:
            return quantized.program(), ()
        rounded, trained = train_rounded(
            quantized.program(biases=False),
            self.workload,
            self.config,
            teacher.module(),
            checkpoints=checkpoints,
            resume=resume,
            reporter=self.reporter,
        )
        curve = (trained.curve[0], *(r for r in trained.curve if r.phase == RETRAIN))
        if curve[0].metric is not None and curve[-1].metric is not None and curve[-1].metric < curve[0].metric:
            self.note(
                f"quantisation-aware training lost: the metric was {curve[0].metric:.4f}, is {curve[-1].metric:.4f}; "
                "try a lower `int8.qat-lr`, or leave `--qat-epochs` out"
            )
        return QuantizeBiases()(rounded).program if quantized.scheme.integer_bias else rounded, curve

    def _pack(self, rounded: Program, forms: Forms, probes: Sequence[Probe]) -> tuple[Program, list[Check]]:
        """Pack the layers of a rounding program that stay in floating point, and compare.

        Raises:
            VerificationError: the packed program computes something else.
        """
        packed = pack_layers(rounded, forms)
        if packed is rounded:
            return rounded, []
        return packed, [prove_same("rounded program = its float32 layers packed", rounded, packed, probes)]

    def prove(self, what: str, rounded: Rounded, probes: Sequence[Probe]) -> list[Check]:
        """Compare an emitted int8 model with the program that rounds.

        Raises:
            VerificationError: they differ by more than a step.
        """
        step = f"{what} = {rounded.lowered.target}"
        file = rounded.lowered.folder / ONNX_FILE
        return prove_integers(step, rounded.program, file, probes, self.config.threads, rounded.kernels)

    def beside(self, target: Target, dense: LoweredProgram, compiled: LoweredProgram) -> dict[str, LoweredProgram]:
        """Return the float32 models that are timed beside an int8 target's own, by name."""
        return {float_name("dense", target): dense, float_name("compiled", target): compiled}

    def keep_times(self, target: Target, measured: Measured) -> None:
        """Keep what a target's own models and those `beside` them took, for the result; say so where int8 is slower."""
        dense, compiled = (measured.others[float_name(name, target)] for name in ("dense", "compiled"))
        own = measured.latency.compiled_ms
        self.corner_ms[target] = [dense, measured.latency.dense_ms, compiled, own]
        if own.p50 > min(dense.p50, compiled.p50) * (1 + MARGIN):
            self.note(
                f"on {target} int8 is slower than float32: the compiled model takes {own.p50:.3f} ms, in float32 "
                f"{compiled.p50:.3f} ms, and the dense one {dense.p50:.3f} ms; try `--target {target.in_float}`"
            )

    def result(
        self,
        target: Target,
        floats: tuple[LoweredProgram, LoweredProgram],
        rounded: tuple[Rounded, Rounded],
        dense_metric: float | None,
        metric: tuple[str, float] | None,
        check: Checker,
    ) -> Int8Result:
        """Measure the metric of the int8 models, and compare the compiled one's with that of its float32 model.

        `floats` and `rounded` are pairs of dense and compiled; the two metrics are those of `floats`.

        Raises:
            VerificationError: the compiled one lost more than `--max-drop`.
            WorkloadError: a metric is no finite number.
        """
        own = [self.workload.measure(x.runner(self.config.threads)) for x in rounded]
        found = [None if m is None else m[1] for m in own]
        for name, value in zip(("dense", "compiled"), found, strict=True):
            check_finite(value, f" for the {name} model in int8")
        if any(own) and (target.backend != "ort" or get_backend(target).available(target).why_not_run):
            self.note(f"the metrics of {target} in int8 are those of its ONNX files in ONNX Runtime on this CPU")
        if metric is not None and found[1] is not None:
            step = f"{metric[0]}: masked module ~ {target}"
            check.checks.append(compare_rounded(step, metric[1], found[1], self.config.max_drop))
        metrics = (dense_metric, found[0], None if metric is None else metric[1], found[1])
        lowered = (floats[0], rounded[0].lowered, floats[1], rounded[1].lowered)
        names = [(m, p) for m in ("dense", "compiled") for p in ("float32", "int8")]
        times = self.corner_ms.get(target, [None] * 4)
        corners = [
            Corner(model=m, precision=p, metric=x, size_bytes=low.size_bytes, latency_ms=ms)  # type: ignore[arg-type]
            for (m, p), x, low, ms in zip(names, metrics, lowered, times, strict=True)
        ]
        dense, compiled = rounded
        return Int8Result(
            corners=tuple(corners),
            calibration=Pair(dense=dense.calibration, compiled=compiled.calibration),
            training=compiled.training,
        )

    def _acceptable(self, program: Program) -> Callable[[nn.Module], bool] | None:
        """Return what `--max-drop` asks of a module that rounds, where there is a metric to ask it of."""
        most = self.config.max_drop
        if most is None or self.config.qat_epochs:
            return None
        before = self.workload.measure(program.module())
        if before is None:
            return None

        def will_do(module: nn.Module) -> bool:
            after = self.workload.measure(_Called(module, program))
            return after is not None and after[1] >= before[1] - most

        return will_do

    def _inputs(self, program: Program) -> list[Inputs]:
        if self._has_data:
            return calibration_inputs(program, self.workload, self.config.int8.samples, self.config.seed)
        return [program.flat_inputs()]

    @cached_property
    def _has_data(self) -> bool:
        found = self.workload.calibration is not None or self.workload.train_batches is not None
        if not found:
            self.note(
                "the workload has no data to calibrate int8 with: its scales are those of the example inputs, "
                "and its accuracy says nothing"
            )
        return found


def float_name(name: str, target: Target) -> str:
    """Return the folder of a model in float32, which lies beside an int8 target's own."""
    return f"{name}-float32" if target.is_integer else name


class _Called(nn.Module):
    """A graph called like the user's model."""

    def __init__(self, graph: nn.Module, program: Program) -> None:
        super().__init__()
        self._graph, self._program = graph.eval(), program

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run on the user's arguments."""
        return self._graph(*self._program.arguments(args, kwargs))
