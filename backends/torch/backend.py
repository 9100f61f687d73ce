"""The backend of PyTorch's own compiler."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from slrc.backends.base import Artifact, Availability, Backend, Runner, Target
from slrc.backends.torch.options import parse_options
from slrc.backends.torch.package import DEVICE, build_package, check_package, why_no_compiler
from slrc.backends.torch.precision import in_half
from slrc.errors import BackendError
from slrc.ir.program import Program
from slrc.sparsity.patterns import NM
from slrc.user_code import first_line

MODEL_FILE = "package.pt2"
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Of the largest value."""
PAIRS = NM(2, 4)


class TorchInductor(Backend):
    """A package of native code that PyTorch loads and runs, on the CPU or a GPU."""

    name: ClassVar[str] = "torch"
    summary: ClassVar[str] = "PyTorch, compiled by AOTInductor on the CPU; torch:cuda for a GPU, torch:bf16 for half"

    def available(self, target: Target | None = None) -> Availability:
        """Emitting needs a C++ compiler, and for a GPU the GPU and Triton; running needs the GPU alone."""
        no_gpu = no_triton = ""
        if target is not None and parse_options(target).device == "cuda":
            no_gpu = "" if torch.cuda.is_available() else "there is no CUDA GPU that torch can use"
            no_triton = "" if find_spec("triton") else "the package `triton` is not installed"
        return Availability(no_gpu or no_triton or why_no_compiler(), no_gpu)

    def check_target(self, target: Target) -> None:
        """Options are a device, `cpu` or `cuda`, and a precision, `fp32`, `fp16` or `bf16`."""
        parse_options(target)

    def check(self, program: Program) -> list[str]:
        """Every program is of PyTorch's own operators."""
        return []

    def why_not_timed(self, target: Target) -> str:
        """A package takes a C++ compiler many seconds."""
        return "a package takes many seconds to compile, too long for every layer in every form"

    def lower(self, program: Program, target: Target, out: Path, *, portable: bool = True) -> Artifact:
        """Write `package.pt2` and the manifest."""
        options = parse_options(target)
        if reason := self.available(target).why_not_emit:
            raise BackendError(f"`{target}` cannot be built here: {reason}", hint="see `slrc targets`")
        try:
            half = options.dtype != torch.float32
            exported = in_half(program, options.dtype) if half else program.exported
            properties = build_package(exported, out / MODEL_FILE, options.device)
        except Exception as error:  # whatever the compiler makes of a program
            raise BackendError(
                f"AOTInductor cannot compile {program.name} for `{target}`: {first_line(error)}",
                hint="`--debug` shows the whole trace; `--target ort` is another way",
            ) from error
        graph = program.graph_module.graph
        inputs = [n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), Tensor)]
        outputs = [n for n in pytree.tree_leaves(graph.output_node().args) if isinstance(n, Node)]
        artifact = Artifact(
            target=str(target),
            model_file=MODEL_FILE,
            precision=options.precision,
            dynamic_batch=program.batch_is_dynamic,
            max_batch=None if program.batch_is_dynamic else program.batch,
            inputs=tuple(n.name for n in inputs),
            outputs=tuple(n.name for n in outputs),
            warnings=_dense_pairs(program),
            properties=properties,
        )
        artifact.write(out)
        return artifact

    def tolerance(self, artifact: Artifact) -> float:
        """Return 1e-4 in float32, 1e-2 in float16 and 5e-2 in bfloat16."""
        return TOLERANCES[artifact.precision]

    def load(self, folder: Path, *, threads: int | None = None, stock: bool = False) -> Runner:
        """Check the package that the manifest names, and load it: that runs its code.

        Raises:
            BackendError: it is another package than the manifest describes, or cannot run here, or `stock` is asked
                for: there is no ONNX file.
        """
        from slrc.backends.torch.run import PackageRunner

        artifact = Artifact.read(folder)
        if stock:
            raise BackendError(f"`{folder}` holds no ONNX file", hint="use `--target ort` for one")
        check_package(folder / artifact.model_file, artifact.properties)
        device, count = artifact.properties[DEVICE], len(artifact.inputs)
        return PackageRunner(folder / artifact.model_file, device, count, threads)


def _dense_pairs(program: Program) -> tuple[str, ...]:
    """Return what is to be said of 2:4 weights, where there are any."""
    weights = [(layer, program.tensors[name]) for name, layer in program.layers.items()]
    views = [PAIRS.group_view(w) for layer, w in weights if not PAIRS.why_not(layer.shape, layer.groups)]
    count = sum(bool(((view != 0).sum(1) <= PAIRS.n).all()) for view in views)
    return (f"{count} layers with {PAIRS} weights run dense: a package has no kernels for them",) if count else ()
