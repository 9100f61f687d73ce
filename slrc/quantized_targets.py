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
from slrc.errors import BackendError
from slrc.forms.form import Forms
from slrc.ir.program import Program
from slrc.passes.quantization.insert_quantizers import QuantizeBiases
from slrc.pipeline import pack_layers
from slrc.probes import Probe
from slrc.progress import Reporter
from slrc.quantization.choose import Calibration, Quantized, named_layers, quantizable_weights, quantize
from slrc.quantization.prove import prove_integers, prove_same
from slrc.quantization.train import train_rounded
from slrc.reconstruction.calibration import Inputs, calibration_inputs
from slrc.training.checkpoints import EpochRecord
from slrc.training.distillation import returns_logits
from slrc.training.loop import RETRAIN
from slrc.verify import Check
from slrc.workload import Workload

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
    checks: list[Check] = field(default_factory=list)

    def in_float(self, program: Program) -> tuple[str, ...]:
        """Return the weights of the layers that `--int8-skip` names.

        Raises:
            ConfigError: a name is that of no layer.
        """
        return named_layers(self.config.int8_skip, quantizable_weights(program))

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
        if names := quantized.spared or self.in_float(program):
            spared = ", ".join(n.removesuffix(".weight") for n in names)
            self.note(f"on {target} {len(names)} layers stay in float32: {spared}")
        return quantized

    def train(
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

    def pack(self, rounded: Program, forms: Forms, probes: Sequence[Probe]) -> tuple[Program, list[Check]]:
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


class _Called(nn.Module):
    """A graph called like the user's model."""

    def __init__(self, graph: nn.Module, program: Program) -> None:
        super().__init__()
        self._graph, self._program = graph.eval(), program

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run on the user's arguments."""
        return self._graph(*self._program.arguments(args, kwargs))
