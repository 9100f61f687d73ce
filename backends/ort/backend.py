"""The ONNX Runtime backend."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from slrc.backends.base import INT8, INT8_TOLERANCE, Artifact, Availability, Backend, Runner, Target
from slrc.backends.int8_onnx import INT8_OPS
from slrc.backends.onnx_export import OPSET, export_onnx
from slrc.backends.packed_onnx import replace_blocks
from slrc.errors import BackendError
from slrc.forms.packed_weight import PackedWeight
from slrc.forms.quantization import ASYMMETRIC, Scheme
from slrc.ir.program import Program
from slrc.kernels.build import TILE_SETS, build, family_of, find_compiler, is_built

MODEL_FILE = "model.onnx"
STOCK = "stock"
"""The target's option for a runtime that is to load no library."""
NOT_FAMILIES = (STOCK, INT8)
KERNELS_FILE = "libslrc_kernels_{family}.so"


class OnnxRuntime(Backend):
    """ONNX, run by ONNX Runtime on the CPU; packed layers by kernels of slrc, in a library beside the model."""

    name: ClassVar[str] = "ort"
    summary: ClassVar[str] = (
        "ONNX Runtime on the CPU; ort:aarch64 for another processor, ort:stock without kernels, ort+int8 in integers"
    )
    scheme: ClassVar[Scheme] = ASYMMETRIC

    def available(self, target: Target | None = None) -> Availability:
        """ONNX Runtime comes with slrc, but may have been removed; a target may name another processor."""
        missing = "" if find_spec("onnxruntime") else "the package `onnxruntime` is not installed"
        here = platform.machine()
        if target is not None and family_of(here) != family_of_target(target):
            missing = f"it is for {family_of_target(target)}, and this machine is {here}"
        return Availability("", missing)

    def check_target(self, target: Target) -> None:
        """Options are one processor family, `stock` to do without kernels of slrc, and `int8`."""
        families = [option for option in target.options if option not in NOT_FAMILIES]
        if len(families) > 1 or any(option not in TILE_SETS for option in families):
            raise BackendError(
                f"target `{target}`: `ort` takes a processor, {' or '.join(TILE_SETS)}, `{STOCK}` and `{INT8}`",
                hint="use `--target ort` for this machine, `--target ort:aarch64`, `ort:stock`, or `ort+int8`",
            )

    def check(self, program: Program) -> list[str]:
        """Every program that `torch.onnx` can export will do: the exporter says what it cannot take."""
        return []

    def why_not_packed(self, target: Target) -> str:
        """Kernels need a compiler for the target's processor, and a runtime that may load them."""
        if STOCK in target.options:
            return "the target is a stock runtime"
        try:
            find_compiler(family_of_target(target))
        except BackendError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        return ""

    def make_ready(self, target: Target, say: Callable[[str], None] | None = None) -> None:
        """Compile the kernels, unless the cache has them."""
        family, int8 = family_of_target(target), target.is_integer
        if STOCK in target.options or is_built(family, int8=int8):
            return
        if say is not None:
            say(f"compiling the kernels for {family}, which takes some minutes, once on each machine")
        build(family, int8=int8)

    def lower(self, program: Program, target: Target, out: Path, *, portable: bool = True) -> Artifact:
        """Write `model.onnx`, the library of kernels if it has packed layers, and the manifest.

        One that is not `portable` links to the library in the cache, which a process then loads once for all.
        """
        import onnx

        is_packed = export_onnx(program, out / MODEL_FILE)
        model = onnx.load(out / MODEL_FILE, load_external_data=False)
        kernels, family = None, family_of_target(target)
        if is_packed:
            kernels = KERNELS_FILE.format(family=family)
            place = shutil.copy if portable else os.symlink
            int8 = any(f.name.startswith(INT8_OPS) for f in model.functions)
            place(build(family, int8=int8).resolve(), out / kernels)
        artifact = Artifact(
            target=str(target),
            model_file=MODEL_FILE,
            precision=INT8 if target.is_integer else "float32",
            dynamic_batch=program.batch_is_dynamic,
            max_batch=None if program.batch_is_dynamic else program.batch,
            inputs=tuple(i.name for i in model.graph.input),
            outputs=tuple(o.name for o in model.graph.output),
            kernels=kernels,
            properties={"opset": str(OPSET)},
        )
        artifact.write(out)
        return artifact

    def repack(self, artifact: Artifact, folder: Path, packed: PackedWeight, out: Path) -> None:
        """Replace the blocks of the one packed node, and link to the rest."""
        import onnx

        for path in folder.iterdir():
            if path.name != artifact.model_file:
                (out / path.name).symlink_to(path.resolve())
        model = onnx.load(folder / artifact.model_file)
        replace_blocks(model, packed)
        onnx.save(model, out / artifact.model_file)

    def tolerance(self, artifact: Artifact) -> float:
        """Return 1e-4 for float32 throughout, summed in another order, and `INT8_TOLERANCE` in int8."""
        return INT8_TOLERANCE if artifact.precision == INT8 else 1e-4

    def load(self, folder: Path, *, threads: int | None = None, stock: bool = False) -> Runner:
        """Open an inference session on the CPU, with the artifact's kernels unless `stock`."""
        from slrc.backends.ort.run import OnnxRuntimeRunner

        artifact = Artifact.read(folder)
        kernels = None if stock or artifact.kernels is None else folder / artifact.kernels
        return OnnxRuntimeRunner(folder / artifact.model_file, threads, kernels)


def family_of_target(target: Target) -> str:
    """Return the processor family that a target is for: the one it names, else this machine's."""
    return next((option for option in target.options if option not in NOT_FAMILIES), family_of(platform.machine()))
