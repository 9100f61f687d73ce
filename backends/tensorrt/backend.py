"""The TensorRT backends: one implementation, two flavours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from slrc.backends.base import INT8, INT8_TOLERANCE, Artifact, Availability, Backend, Runner, Target
from slrc.backends.engine_summary import EngineSummary
from slrc.backends.onnx_export import OLDEST_OPSET, export_onnx
from slrc.backends.onnx_opset import rewrite_opset
from slrc.backends.tensorrt.build import (
    BatchProfile,
    build_engine,
    default_capabilities,
    known_capabilities,
)
from slrc.backends.tensorrt.inspect import inspect_engine
from slrc.backends.tensorrt.log import message_log
from slrc.backends.tensorrt.options import Options, parse_options
from slrc.backends.tensorrt.precision import convert_to_float16
from slrc.backends.tensorrt.run import TensorRTRunner
from slrc.backends.tensorrt.sparse_layers import sparse_layers, warnings_of
from slrc.errors import BackendError
from slrc.forms.quantization import SYMMETRIC, Scheme
from slrc.ir.program import Program
from slrc.ir.tracing import source_line

ONNX_FILE = "model.onnx"
ENGINE_FILE = "model.engine"
MAX_DIMENSIONS = 8
"""The most dimensions that a tensor of TensorRT can have."""
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, INT8: INT8_TOLERANCE}
"""Of the largest value. Float16 networks differed by 1e-3 on a CPU; a GPU may also sum in float16."""
UNSUPPORTED_DTYPES = (torch.float64, torch.complex64, torch.complex128)


class _TensorRTBackend(Backend):
    """What both flavours share; `names_gpus` says whether an engine is built for GPUs named in the target."""

    module: ClassVar[str]
    install: ClassVar[str]
    names_gpus: ClassVar[bool]
    scheme: ClassVar[Scheme] = SYMMETRIC

    def check_target(self, target: Target) -> None:
        """Options are `fp32`, `fp16` or `int8`, and GPUs, or a device's version and `dla`: see `parse_options`.

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
        """Write `model.onnx` as asked for, `model.engine` if it is built here, and the manifest."""
        options = self._options(target)
        if reason := self.available(target).why_not_emit:
            raise BackendError(
                f"`{self.name}` cannot build here: {reason}", hint="`slrc targets` says what can be emitted"
            )
        model = out / ONNX_FILE
        _write_onnx(program, model, options)
        inputs, outputs = _signature(model)
        batches = {name: BatchProfile.around(size) for name, size in _batches(program, model).items()}
        built = None if self._why_not_build(target) else self._build(target, options, out, batches)
        artifact = Artifact(
            target=str(target),
            model_file=ENGINE_FILE if built else ONNX_FILE,
            precision=options.precision,
            dynamic_batch=bool(batches),
            max_batch=max((batch.largest for batch in batches.values()), default=_example_batch(program)),
            inputs=inputs,
            outputs=outputs,
            engine=built[0] if built else None,
            warnings=tuple(warnings_of(sparse_layers(model), options.precision, dla=options.dla)),
            properties={
                **(built[1] if built else {}),
                "batch_profile": "; ".join(f"{name}: {batch}" for name, batch in batches.items()) or "fixed",
                "opset": str(options.parser.opset),
            },
        )
        artifact.write(out)
        return artifact

    def channel_multiple(self, target: Target) -> int:
        """Return 8, what tensor cores take at a time in float16, or 32 for a DLA."""
        return self._options(target).channel_multiple

    def tolerance(self, artifact: Artifact) -> float:
        """Return 1e-4 in float32, which is not narrowed to TF32, 1e-2 in float16, and `INT8_TOLERANCE` in int8."""
        return TOLERANCES[artifact.precision]

    def load(self, folder: Path, *, threads: int | None = None, stock: bool = False) -> Runner:
        """Load the engine onto the current GPU; with `stock`, the ONNX file on the CPU, with so many threads."""
        from slrc.backends.ort.run import OnnxRuntimeRunner

        artifact = Artifact.read(folder)
        if stock:
            return OnnxRuntimeRunner(folder / ONNX_FILE, threads)
        if artifact.model_file == ONNX_FILE:
            raise BackendError(
                f"`{folder}` holds no engine: it is built on the device from its {ONNX_FILE}",
                hint="`slrc deploy` builds and runs it there",
            )
        if reason := self._why_no_gpu():
            raise BackendError(
                f"the engine in `{folder}` cannot run here: {reason}",
                hint="copy the folder to a machine with the GPU it was built for",
            )
        return TensorRTRunner(folder / artifact.model_file, self._import(), artifact.inputs, artifact.outputs)

    @abstractmethod
    def _why_not_build(self, target: Target | None) -> str:
        """Return why no engine is built here; empty if one is."""

    def _build(
        self, target: Target, options: Options, out: Path, batches: Mapping[str, BatchProfile]
    ) -> tuple[EngineSummary | None, dict[str, str]]:
        """Build `model.engine`; return what it consists of, and what it was built by and for."""
        trt = self._import()
        self._check_capabilities(target, options.capabilities)
        capabilities = options.capabilities
        if self.names_gpus and not capabilities:
            capabilities = default_capabilities(trt)
        build_engine(trt, out / ONNX_FILE, out / ENGINE_FILE, batches, capabilities)
        summary = inspect_engine(trt, out / ENGINE_FILE, message_log(trt))
        return summary, {
            "builder": f"{self.name} {trt.__version__}",
            "compute_capabilities": " ".join(capabilities or [_present_capability()]),
        }

    def _options(self, target: Target) -> Options:
        return parse_options(target, names_gpus=self.names_gpus)

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

    def _why_no_gpu(self) -> str:
        """Return why no engine runs here; empty if one does."""
        if not self._is_installed():
            return f"the package `{self.name}` is not installed: {self.install}"
        return "" if torch.cuda.is_available() else "there is no CUDA GPU that torch can use"

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


class TensorRT(_TensorRTBackend):
    """Engines for the GPU that is present, or ONNX of which a device builds one: a Jetson or a data centre's GPU."""

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = (
        "TensorRT, built on the GPU that is present or on a device; tensorrt:10.3+fp16 for its version"
    )
    module: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = "pip install tensorrt"
    names_gpus: ClassVar[bool] = False

    def available(self, target: Target | None = None) -> Availability:
        """Emitting is always possible, as ONNX; running needs the package and a GPU, and no device named."""
        return Availability("", self._why_not_build(target))

    def _why_not_build(self, target: Target | None) -> str:
        if target is not None and self._options(target).for_device:
            return "the engine is built and run on the device"
        return self._why_no_gpu()


class TensorRTRTX(_TensorRTBackend):
    """Engines for named GPUs, Turing to Blackwell, built with none present."""

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX, built for named GPUs with none present"
    module: ClassVar[str] = "tensorrt_rtx"
    install: ClassVar[str] = "pip install 'slrc[tensorrt-rtx]'"
    names_gpus: ClassVar[bool] = True

    def available(self, target: Target | None = None) -> Availability:
        """Emitting needs the package; running needs a GPU too."""
        return Availability(self._why_not_build(target), self._why_no_gpu())

    def _why_not_build(self, target: Target | None) -> str:
        return "" if self._is_installed() else self._why_no_gpu()


def _write_onnx(program: Program, path: Path, options: Options) -> None:
    """Write the ONNX model that the parser of the options' version takes."""
    parser = options.parser
    export_onnx(program, path, max(parser.opset, OLDEST_OPSET))
    if options.precision == "float16":
        convert_to_float16(path)
    if options.for_device:
        rewrite_opset(
            path,
            parser.opset,
            inline=not parser.functions,
            split_layer_norm=not parser.layer_norm,
            batches=_batches(program, path) if options.dla else None,
        )


def _signature(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of an ONNX model's inputs and outputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return tuple(i.name for i in graph.input), tuple(o.name for o in graph.output)


def _batches(program: Program, path: Path) -> dict[str, int]:
    """Return the example's batch for each input of an ONNX model that has a dimension that may vary: the first one."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    examples = [x for x in pytree.tree_leaves(program.example_inputs) if isinstance(x, Tensor)]
    if len(examples) != len(inputs):
        raise BackendError(
            f"{program.name} has {len(examples)} example tensors, but its ONNX form has {len(inputs)} inputs",
            hint="give tensors as example inputs, and nothing else",
        )
    varying = [any(dim.dim_param for dim in i.type.tensor_type.shape.dim) for i in inputs]
    return {i.name: x.shape[0] for i, x, varies in zip(inputs, examples, varying, strict=True) if varies}


def _example_batch(program: Program) -> int:
    return max((x.shape[0] for x in program.flat_inputs() if x.dim() > 0), default=1)


def _present_capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
