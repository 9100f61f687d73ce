"""The ONNX Runtime backend."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from slrc.backends.base import Artifact, Availability, Backend, Runner, Target
from slrc.backends.onnx_export import OPSET, export_onnx
from slrc.errors import BackendError
from slrc.program import Program

MODEL_FILE = "model.onnx"


class OnnxRuntime(Backend):
    """ONNX, run by ONNX Runtime on the CPU."""

    name: ClassVar[str] = "ort"
    summary: ClassVar[str] = "ONNX Runtime on the CPU"

    def available(self) -> Availability:
        """ONNX Runtime comes with slrc; it may have been removed."""
        missing = "" if find_spec("onnxruntime") else "the package `onnxruntime` is not installed"
        return Availability("", missing)

    def check_target(self, target: Target) -> None:
        """There are no options yet."""
        if target.options:
            raise BackendError(f"target `{target}`: `ort` takes no options", hint="use `--target ort`")

    def check(self, program: Program) -> list[str]:
        """Every program that `torch.onnx` can export will do: the exporter says what it cannot take."""
        return []

    def lower(self, program: Program, target: Target, out: Path) -> Artifact:
        """Write `model.onnx` and its manifest."""
        import onnx

        export_onnx(program, out / MODEL_FILE)
        model = onnx.load(out / MODEL_FILE, load_external_data=False)
        artifact = Artifact(
            target=str(target),
            model_file=MODEL_FILE,
            dynamic_batch=program.batch_is_dynamic,
            max_batch=None if program.batch_is_dynamic else program.batch,
            inputs=tuple(i.name for i in model.graph.input),
            outputs=tuple(o.name for o in model.graph.output),
            properties={"opset": str(OPSET)},
        )
        artifact.write(out)
        return artifact

    def tolerance(self, artifact: Artifact) -> float:
        """Return 1e-4: float32 throughout, summed in another order."""
        return 1e-4

    def load(self, folder: Path, *, threads: int | None = None) -> Runner:
        """Open an inference session on the CPU."""
        from slrc.backends.ort.run import OnnxRuntimeRunner

        return OnnxRuntimeRunner(folder / Artifact.read(folder).model_file, threads)
