"""The TensorRT backends: one implementation, two flavours."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from slrc.backends.base import Artifact, Availability, Backend, Runner, Target
from slrc.backends.onnx_export import OPSET, export_onnx
from slrc.backends.tensorrt.build import (
    BatchProfile,
    build_engine,
    default_capabilities,
    known_capabilities,
)
from slrc.backends.tensorrt.precision import convert_to_float16
from slrc.backends.tensorrt.run import TensorRTRunner
from slrc.errors import BackendError
from slrc.ir.program import Program
from slrc.ir.tracing import source_line

ONNX_FILE = "model.onnx"
ENGINE_FILE = "model.engine"
MAX_DIMENSIONS = 8
"""The most dimensions that a tensor of TensorRT can have."""
PRECISIONS = {"fp32": "float32", "fp16": "float16"}
TOLERANCES = {"float32": 1e-4, "float16": 1e-2}
"""Of the largest value. Float16 networks differed by 1e-3 on a CPU; a GPU may also sum in float16."""
UNSUPPORTED_DTYPES = (torch.float64, torch.complex64, torch.complex128)


class Options(NamedTuple):
    """A target's options: the precision as in the manifest, and compute capabilities such as `sm86`."""

    precision: str
    capabilities: tuple[str, ...]


class _TensorRTBackend(Backend):
    """What both flavours share; `names_gpus` says whether an engine is built for GPUs named in the target."""

    module: ClassVar[str]
    install: ClassVar[str]
    names_gpus: ClassVar[bool]

    def available(self, target: Target | None = None) -> Availability:
        """Emitting needs the package and, unless GPUs are named, one; running needs both."""
        if not self._is_installed():
            missing = f"the package `{self.name}` is not installed: {self.install}"
            return Availability(missing, missing)
        if torch.cuda.is_available():
            return Availability()
        no_gpu = "there is no CUDA GPU that torch can use"
        return Availability("" if self.names_gpus else no_gpu, no_gpu)

    def check_target(self, target: Target) -> None:
        """Options are `fp32` (the default) or `fp16`, and compute capabilities where GPUs are named.

        Without the package any well-formed compute capability passes: which exist is the package's to say.
        """
        capabilities = self._options(target).capabilities
        if capabilities and self._is_installed():
            self._check_capabilities(target, capabilities)

    def check(self, program: Program) -> list[str]:
        """Name the operators with types or numbers of dimensions that TensorRT does not have."""
        reasons = []
        for node in program.graph_module.graph.nodes:
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                continue
            where = f"`{node.name}`" + (f" ({line})" if (line := source_line(node)) else "")
            if value.dtype in UNSUPPORTED_DTYPES:
                reasons.append(f"{where} is {value.dtype}, which TensorRT does not have")
            if value.dim() > MAX_DIMENSIONS:
                reasons.append(f"{where} has {value.dim()} dimensions, TensorRT takes {MAX_DIMENSIONS}")
        return reasons

    def lower(self, program: Program, target: Target, out: Path, *, portable: bool = True) -> Artifact:
        """Write `model.onnx`, in the precision asked for, `model.engine`, and the manifest."""
        options = self._options(target)
        if reason := self.available().why_not_emit:
            raise BackendError(f"`{self.name}` cannot build here: {reason}", hint=self._where_hint())
        trt = self._import()
        self._check_capabilities(target, options.capabilities)
        capabilities = options.capabilities
        if self.names_gpus and not capabilities:
            capabilities = default_capabilities(trt)

        export_onnx(program, out / ONNX_FILE)
        if options.precision == "float16":
            convert_to_float16(out / ONNX_FILE)
        inputs, outputs = _signature(out / ONNX_FILE)
        dynamic = build_engine(
            trt,
            out / ONNX_FILE,
            out / ENGINE_FILE,
            _batches(program, inputs),
            capabilities,
        )
        artifact = Artifact(
            target=str(target),
            model_file=ENGINE_FILE,
            precision=options.precision,
            dynamic_batch=program.batch_is_dynamic,
            max_batch=max((batch.largest for batch in dynamic.values()), default=program.batch),
            inputs=inputs,
            outputs=outputs,
            properties={
                "builder": f"{self.name} {trt.__version__}",
                "compute_capabilities": " ".join(capabilities or [_present_capability()]),
                "batch_profile": "; ".join(f"{name}: {batch}" for name, batch in dynamic.items()) or "fixed",
                "opset": str(OPSET),
            },
        )
        artifact.write(out)
        return artifact

    def tolerance(self, artifact: Artifact) -> float:
        """Return 1e-4 in float32, which is not narrowed to TF32, and 1e-2 in float16."""
        return TOLERANCES[artifact.precision]

    def load(self, folder: Path, *, threads: int | None = None, stock: bool = False) -> Runner:
        """Load the engine onto the current GPU; `threads` and `stock` mean nothing there."""
        artifact = Artifact.read(folder)
        if reason := self.available().why_not_run:
            raise BackendError(
                f"the engine in `{folder}` cannot run here: {reason}",
                hint="copy the folder to a machine with the GPU it was built for",
            )
        return TensorRTRunner(folder / artifact.model_file, self._import(), artifact.inputs, artifact.outputs)

    def _options(self, target: Target) -> Options:
        """Parse a target's options; which capabilities exist is not looked at."""
        precisions = [o for o in dict.fromkeys(target.options) if o in PRECISIONS]
        capabilities = tuple(o for o in dict.fromkeys(target.options) if re.fullmatch(r"sm\d+", o))
        unknown = [o for o in target.options if o not in PRECISIONS and o not in capabilities]
        named = ", or compute capabilities such as `sm86`" if self.names_gpus else ""
        if unknown:
            raise BackendError(
                f"target `{target}`: unknown option `{unknown[0]}`: expected `fp32` or `fp16`{named}",
                hint=f"such as `--target {self.name}:{'sm86+' if self.names_gpus else ''}fp16`",
            )
        if len(precisions) > 1:
            raise BackendError(
                f"target `{target}`: an engine has one precision, got {' and '.join(precisions)}",
                hint="name one; without any it is fp32",
            )
        if capabilities and not self.names_gpus:
            raise BackendError(
                f"target `{target}`: `{self.name}` builds for the GPU present, got `{capabilities[0]}`",
                hint=f"leave it out, or use `tensorrt-rtx:{capabilities[0]}` to build for a GPU by name",
            )
        return Options(PRECISIONS[precisions[0] if precisions else "fp32"], capabilities)

    def _check_capabilities(self, target: Target, capabilities: tuple[str, ...]) -> None:
        if not capabilities:
            return
        trt = self._import()
        known = known_capabilities(trt)
        unknown = [c for c in capabilities if c not in known]
        if unknown:
            raise BackendError(
                f"target `{target}`: {self.name} {trt.__version__} does not build for `{unknown[0]}`:"
                f" expected one of {', '.join(known)}",
                hint="name one of these, or use `--target tensorrt` on a machine with that GPU",
            )

    def _is_installed(self) -> bool:
        """Say whether the package is there: a mere folder of its name is found too, but has no origin."""
        spec = find_spec(self.module)
        return spec is not None and spec.origin is not None

    def _import(self) -> Any:
        """Import the package, which is installed."""
        try:
            return import_module(self.module)
        except (ImportError, OSError) as error:
            raise BackendError(
                f"the package `{self.name}` is installed but cannot be imported: {error}",
                hint=f"install it anew for this machine's CUDA: {self.install}",
            ) from error

    def _where_hint(self) -> str:
        if self.names_gpus or not self._is_installed():
            return "`slrc targets` says what can be emitted and run here"
        return "build it where the GPU is, or use `--target tensorrt-rtx`, which needs none to build"


class TensorRT(_TensorRTBackend):
    """Engines for the GPU that is present: a Jetson or a data centre's."""

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "TensorRT, built and run on the GPU that is present"
    module: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = "pip install tensorrt"
    names_gpus: ClassVar[bool] = False


class TensorRTRTX(_TensorRTBackend):
    """Engines for named GPUs, Turing to Blackwell, built with none present."""

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX, built for named GPUs with none present"
    module: ClassVar[str] = "tensorrt_rtx"
    install: ClassVar[str] = "pip install 'slrc[tensorrt-rtx]'"
    names_gpus: ClassVar[bool] = True


def _signature(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of an ONNX model's inputs and outputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return tuple(i.name for i in graph.input), tuple(o.name for o in graph.output)


def _batches(program: Program, inputs: tuple[str, ...]) -> dict[str, BatchProfile]:
    """Return the range of each input's first dimension; an input without dimensions has none."""
    examples = [x for x in pytree.tree_leaves(program.example_inputs) if isinstance(x, Tensor)]
    if len(examples) != len(inputs):
        raise BackendError(
            f"{program.name} has {len(examples)} example tensors, but its ONNX form has {len(inputs)} inputs",
            hint="give tensors as example inputs, and nothing else",
        )
    profile = BatchProfile.around if program.batch_is_dynamic else BatchProfile.fixed
    return {name: profile(x.shape[0]) for name, x in zip(inputs, examples, strict=True) if x.dim() > 0}


def _present_capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
