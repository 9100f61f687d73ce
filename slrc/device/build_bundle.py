"""Make bundles: of artifacts, and of what a compile wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slrc import __version__
from slrc.backends import Artifact, Target, get_backend, parse_target
from slrc.backends.base import MANIFEST as ARTIFACT_MANIFEST
from slrc.backends.ort.backend import family_of_target
from slrc.backends.tensorrt.backend import ENGINE_FILE, ONNX_FILE
from slrc.backends.tensorrt.options import parse_options
from slrc.device.build_runner import build_runner
from slrc.device.bundle import (
    PROGRAM,
    RUNNER,
    BundledModel,
    ExpectedOutput,
    Manifest,
    Requirements,
    Run,
    TensorFile,
    digests,
    write_manifest,
)
from slrc.errors import DeviceError, OutputError
from slrc.kernels.build import TILE_SETS
from slrc.measuring.timing import BLOCKS, REPORT
from slrc.reporting.bench import INPUTS
from slrc.reporting.report import Report

RUNNER_FILE = Path(__file__).parent / "runner" / RUNNER
RUNTIME_OF_OPSET = ((21, "1.18"), (20, "1.17"), (19, "1.15"), (18, "1.14"), (17, "1.12"))
"""The oldest ONNX Runtime that takes an opset, and the IR version that goes with it."""
RUNTIME_OF_KERNELS = "1.17"
REPORTED = Run(models=("dense", "compiled"), seconds=REPORT.seconds, least_rounds=REPORT.least_rounds, blocks=BLOCKS)
"""What a deploy times: what a compile does, for as long."""


@dataclass(frozen=True)
class Source:
    """A model for a bundle: its name there, its artifact's folder, and what it is run on."""

    name: str
    folder: Path
    inputs: Sequence[Tensor]


def make_bundle(
    folder: Path,
    model: str,
    target: Target,
    sources: Sequence[Source],
    runs: Sequence[Run],
    *,
    threads: int | None = None,
    expected: bool = True,
    program: bool = False,
) -> Manifest:
    """Fill an empty folder with a bundle, which links to the artifacts' files.

    Args:
        folder: it exists.
        model: a name for people.
        target: what the artifacts were written for.
        sources: the models.
        runs: what to time.
        threads: of the runtime there, `None` for its choice.
        expected: whether to run each model here, without kernels, for what it must return there.
        program: whether to add the runner for a device without Python, compiled for the target's processor.

    Raises:
        BackendError: a model does not run here, or there is no compiler for the processor.
        DeviceError: the target has no such runner.
    """
    (folder / "inputs").mkdir()
    (folder / RUNNER).symlink_to(RUNNER_FILE)
    if program:
        if target.backend != "ort":
            raise DeviceError(
                f"target `{target}` has no runner without Python: that one drives ONNX Runtime",
                hint="leave `--without-python` out: for TensorRT Python's standard library is enough",
            )
        (folder / PROGRAM).symlink_to(build_runner(family_of_target(target)).resolve())
    known: dict[bytes, str] = {}
    models = [_bundled(folder, source, target, known, expected) for source in sources]
    manifest = Manifest(
        model=model,
        slrc=__version__,
        target=str(target),
        requires=_requirements(folder, target, models),
        threads=threads or 0,
        files=digests(folder),
        models=tuple(models),
        runs=tuple(runs),
    )
    write_manifest(manifest, folder)
    return manifest


def sources_of(output: Path, target: Target) -> list[Source]:
    """Return the dense and the compiled model that a compile wrote for a target.

    Raises:
        OutputError: the example inputs cannot be read.
    """
    try:
        stored = load_file(output / INPUTS)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"`{output / INPUTS}` cannot be read: {error}") from None
    inputs = [stored[f"input_{i}"] for i in range(len(stored))]
    return [Source(name, output / target.folder / name, inputs) for name in ("dense", "compiled")]


def choose_target(
    output: Path, asked: str | None, architecture: str = "", why_not: Callable[[Target], str] = lambda target: ""
) -> Target:
    """Return the target of an output that is meant: the one asked for, else the first for an architecture.

    `why_not` says why one of them cannot run on the device that is meant: one that can is taken first.

    Raises:
        DeviceError: there is none.
        OutputError: `output` is not the output of a compile.
    """
    written = [parse_target(result.target) for result in Report.load(output).targets]
    found = [t for t in written if (str(t) == asked if asked else runs_on(t, architecture))]
    if found:
        return next((t for t in found if not why_not(t)), found[0])
    what = f"target `{asked}`" if asked else f"target for {architecture or 'a bundle'}"
    raise DeviceError(
        f"`{output}` has no {what}: it has {', '.join(map(str, written))}",
        hint=f"compile it with `--target ort:{architecture}`" if architecture in TILE_SETS else None,
    )


def runs_on(target: Target, architecture: str) -> bool:
    """Tell whether a target's files are for an architecture; any, where that is empty."""
    if target.backend != "ort":
        return target.backend == "tensorrt"
    return not architecture or family_of_target(target) == architecture


def _bundled(folder: Path, source: Source, target: Target, known: dict[bytes, str], expected: bool) -> BundledModel:
    artifact, backend = Artifact.read(source.folder), get_backend(target)
    own = folder / source.name
    own.mkdir()
    builds_there = target.backend == "tensorrt"
    model_file = ONNX_FILE if builds_there else artifact.model_file
    for path in source.folder.iterdir():
        if path.name != ARTIFACT_MANIFEST and not (builds_there and path.name == ENGINE_FILE):
            (own / path.name).symlink_to(path.resolve())
    outputs: Sequence[Tensor | None] = [None] * len(artifact.outputs)
    if expected:  # one thread: the same numbers each time
        outputs = backend.load(source.folder, threads=1, stock=True)(*source.inputs)
    tolerance = backend.tolerance(artifact)
    return BundledModel(
        name=source.name,
        file=f"{source.name}/{model_file}",
        kernels=f"{source.name}/{artifact.kernels}" if artifact.kernels else None,
        precision=artifact.precision,
        max_batch=artifact.max_batch if artifact.dynamic_batch else None,
        dynamic_inputs=_dynamic_inputs(source.folder / model_file),
        inputs=tuple(_input(folder, name, x, known) for name, x in zip(artifact.inputs, source.inputs, strict=True)),
        outputs=tuple(
            _output(folder, f"{source.name}/output_{i}.bin", name, y, tolerance)
            for i, (name, y) in enumerate(zip(artifact.outputs, outputs, strict=True))
        ),
    )


def _input(folder: Path, name: str, x: Tensor, known: dict[bytes, str]) -> TensorFile:
    numbers = _numbers(x)
    if numbers not in known:
        known[numbers] = f"inputs/{len(known)}.bin"
        (folder / known[numbers]).write_bytes(numbers)
    return TensorFile(name=name, dtype=_dtype(x), shape=tuple(x.shape), file=known[numbers])


def _output(folder: Path, file: str, name: str, y: Tensor | None, tolerance: float) -> ExpectedOutput:
    if y is None:
        return ExpectedOutput(name=name, dtype="float32", shape=(), file=None, tolerance=tolerance)
    (folder / file).write_bytes(_numbers(y))
    return ExpectedOutput(name=name, dtype=_dtype(y), shape=tuple(y.shape), file=file, tolerance=tolerance)


def _numbers(x: Tensor) -> bytes:
    array = x.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _dtype(x: Tensor) -> Any:
    return str(x.dtype).removeprefix("torch.")


def _requirements(folder: Path, target: Target, models: Sequence[BundledModel]) -> Requirements:
    import onnx

    opset, ir_version, oldest = 0, 0, "1.12"
    for model in models:
        graph = onnx.load(folder / model.file, load_external_data=False)
        own = max((o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")), default=0)
        opset, ir_version = max(opset, own), max(ir_version, graph.ir_version)
    oldest = next((version for number, version in RUNTIME_OF_OPSET if opset >= number), oldest)
    if target.backend == "tensorrt":
        version = ".".join(map(str, parse_options(target, names_gpus=False).oldest))
        return Requirements(architecture="", opset=opset, ir_version=ir_version, tensorrt=version)
    compiled = {folder / model.kernels for model in models if model.kernels}
    compiled |= {folder / PROGRAM} if (folder / PROGRAM).exists() else set()
    if not compiled:
        return Requirements(opset=opset, ir_version=ir_version, onnxruntime=oldest)
    oldest = max(oldest, RUNTIME_OF_KERNELS)
    needed = max((_glibc_of(file) for file in compiled), key=lambda v: tuple(map(int, v.split("."))))
    architecture = family_of_target(target)
    return Requirements(architecture=architecture, glibc=needed, opset=opset, ir_version=ir_version, onnxruntime=oldest)


def _dynamic_inputs(model: Path) -> tuple[str, ...]:
    import onnx

    inputs = onnx.load(model, load_external_data=False).graph.input
    return tuple(i.name for i in inputs if any(dim.dim_param for dim in i.type.tensor_type.shape.dim))


def _glibc_of(file: Path) -> str:
    """Return the newest version of glibc that a library or program asks for."""
    asked = {(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", file.read_bytes())}
    return ".".join(map(str, max(asked, default=(2, 17))))
