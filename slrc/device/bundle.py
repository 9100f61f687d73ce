"""A bundle: models, their inputs and expected outputs, and what to run, for a device that has a runtime and no slrc.

A bundle is a folder, or a tar of it, in which every file but the manifest is named with its sha256:

    manifest.json        all of this as JSON (`Manifest`)
    run.txt              what a runner needs of it, for those without a JSON parser
    bench.py             the runner for Python 3.8 and later
    bench                where asked for, one that needs none: `./bench LIBONNXRUNTIME`, which reads run.txt
    dense/model.onnx     a folder for each model: what the backend wrote, its kernels beside it, and
    dense/output_0.bin   what it returned on the host
    inputs/0.bin         the tensors that models are run on, each once

A tensor's file holds its numbers alone, in C order and little endian, a `bool` as one byte. An output agrees where

    max |there - expected| <= tolerance * max |expected|    (the largest finite value; NaN and inf at the same places)

`tolerance` stands at each output. One of a coarser precision has a larger one; nothing else is needed for that.

`run.txt` has one statement a line, in fields that a tab separates. `model` begins a model, and the `input` and `output`
lines that follow belong to it, in the order of the ONNX file's:

    slrc-bundle  1
    target       ort:aarch64
    threads      4                                                  (0: the runtime's choice)
    file         SHA256  NAME                                       (every file but manifest.json and run.txt)
    model        NAME  FILE  KERNELS                                (KERNELS is `-` where there is no library)
    input        NAME  DTYPE  SHAPE  FILE                           (SHAPE as 1x3x224x224, `scalar` for no dimension)
    output       NAME  DTYPE  SHAPE  FILE  TOLERANCE                (FILE is `-` where nothing is expected)
    run          SECONDS  LEAST_ROUNDS  BLOCKS  RACE  MODEL  MODEL...   (RACE is 0 or 1; BLOCKS is 1 in a race)

A runner checks the sha256 of each file, runs each model once and compares its outputs, and times each run: its models
in turns, for so many seconds in all, a quarter of them to warm up. With blocks, the turns are divided into so many
equal parts, and the clocks are read between them. What it found it writes into `result.json` beside the manifest
(`slrc.device.results`), whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from slrc.backends.base import bare_name
from slrc.errors import DeviceError, disk_error

MANIFEST = "manifest.json"
RUN = "run.txt"
RUNNER, PROGRAM = "bench.py", "bench"
RESULT = "result.json"
BUNDLE_VERSION: Final = 1


def _inner_name(name: str) -> str:
    parts = name.split("/")
    if len(parts) > 2:
        raise ValueError(f"expected the name of a file, or of one in a folder of the bundle, got {name!r}")
    for part in parts:
        bare_name(part)
    return name


InnerName = Annotated[str, AfterValidator(_inner_name)]
"""The name of a file in a bundle, which lies there or in one of its folders, and nowhere else."""


def _plain_name(name: str) -> str:
    if not name or not name.isprintable() or "\t" in name:
        raise ValueError(f"expected a printable name, got {name!r}")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorFile(_Data):
    """A tensor: its name in the ONNX file, its type as numpy names it, its shape, and the file of its numbers."""

    name: PlainName
    dtype: Literal["float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]
    shape: tuple[int, ...]
    file: InnerName | None

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class ExpectedOutput(TensorFile):
    """An output: what it was on the host, and how far it may lie from it; no file where nothing is expected."""

    tolerance: float


class BundledModel(_Data):
    """A model, what it is run on, and what it must return."""

    name: PlainName
    file: InnerName
    kernels: InnerName | None = None
    precision: str = "float32"
    max_batch: int | None = None
    """The largest batch that it is for, where the first dimension of its inputs is dynamic; else `None`."""
    dynamic_inputs: tuple[PlainName, ...] = ()
    """The inputs whose first dimension is dynamic: a runtime that builds engines must be told its range."""
    inputs: tuple[TensorFile, ...]
    outputs: tuple[ExpectedOutput, ...]


class Run(_Data):
    """Models to time in turns. In a `race` one that clearly is slower takes no more turns, until one is left."""

    models: tuple[PlainName, ...]
    seconds: float
    least_rounds: int
    blocks: int = 1
    race: bool = False


class Requirements(_Data):
    """What a device must have; empty where it does not matter."""

    architecture: str = ""
    """As `uname -m` says, such as `aarch64`."""
    glibc: str = ""
    """The oldest version that the kernels load with."""
    opset: int
    ir_version: int
    onnxruntime: str = ""
    """The oldest version that takes the opset and the kernels."""
    tensorrt: str = ""
    """The oldest version whose parser takes the models."""


class Manifest(_Data):
    """What is in a bundle, and what to do with it."""

    bundle_version: Literal[1] = BUNDLE_VERSION
    model: str
    slrc: str
    target: str
    requires: Requirements
    threads: int = 0
    """Of the runtime; 0 for its own choice."""
    files: Mapping[InnerName, str]
    """The sha256 of every file but the manifest and `run.txt`."""
    models: tuple[BundledModel, ...]
    runs: tuple[Run, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Manifest:
        for model in self.models:
            for file in (model.file, model.kernels, *(t.file for t in (*model.inputs, *model.outputs))):
                if file is not None and file not in self.files:
                    raise ValueError(f"model `{model.name}` names `{file}`, which is not among the files")
        known = {model.name for model in self.models}
        for name in (name for run in self.runs for name in run.models):
            if name not in known:
                raise ValueError(f"a run names the model `{name}`, which there is not")
        return self

    def lines(self) -> str:
        """Return `run.txt`."""

        def line(*fields: object) -> str:
            return "\t".join(str(field) for field in fields)

        def tensor(kind: str, t: TensorFile, *more: object) -> str:
            return line(kind, t.name, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.file or "-", *more)

        found = [line("slrc-bundle", BUNDLE_VERSION), line("target", self.target), line("threads", self.threads)]
        found += [line("file", digest, name) for name, digest in sorted(self.files.items())]
        for model in self.models:
            found.append(line("model", model.name, model.file, model.kernels or "-"))
            found += [tensor("input", t) for t in model.inputs]
            found += [tensor("output", t, repr(t.tolerance)) for t in model.outputs]
        found += [line("run", r.seconds, r.least_rounds, r.blocks, int(r.race), *r.models) for r in self.runs]
        return "\n".join(found) + "\n"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` and `run.txt` beside the files of a bundle."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    (folder / RUN).write_text(manifest.lines())


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a bundle's folder but the manifest and `run.txt`, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: digest_of(path) for name, path in sorted(named.items()) if name not in (MANIFEST, RUN)}


def digest_of(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bundle(folder: Path) -> Manifest:
    """Return the manifest of a bundle's folder, each of whose files is as it says.

    Raises:
        DeviceError: it is no bundle, or not one of this version, or a file is missing, damaged or one too many.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DeviceError(f"`{folder}` is not a bundle: it has no {MANIFEST}", hint="make one: `slrc bundle`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"the manifest in `{folder}` cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DeviceError(f"the manifest in `{folder}`, field `{where}`: {first['msg']}") from None
    there = digests(folder)
    if wrong := sorted(
        name for name in there.keys() | manifest.files.keys() if there.get(name) != manifest.files.get(name)
    ):
        state = "missing" if wrong[0] not in there else "unknown" if wrong[0] not in manifest.files else "damaged"
        raise DeviceError(
            f"bundle `{folder}`: `{wrong[0]}` is {state}: its sha256 is not the manifest's",
            hint="make the bundle anew: `slrc bundle`",
        )
    return manifest


def pack(folder: Path, archive: Path) -> None:
    """Write a bundle's folder as a tar, which is the same to the last byte for the same files.

    Raises:
        OutputError: it cannot be written.
    """
    aside = archive.with_name(f".{archive.name}.partial")
    try:
        with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = path.relative_to(folder).as_posix()
                tar.addfile(_member(name, path.stat().st_size), io.BytesIO(path.read_bytes()))
        aside.rename(archive)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(archive, error) from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar that `pack` wrote into an empty folder; nothing is written elsewhere, whatever it names.

    Raises:
        DeviceError: it is no such tar.
        OutputError: the folder cannot be written.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = _inner_name(member.name)
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:
                    raise ValueError(f"`{name}` is not a plain file")
                (folder / name).parent.mkdir(exist_ok=True)
                with (folder / name).open("xb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, ValueError, FileExistsError, EOFError) as error:
        raise DeviceError(f"`{archive}` is not a bundle: {error}", hint="make one: `slrc bundle`") from None
    except OSError as error:
        raise disk_error(folder, error) from error


def _member(name: str, size: int) -> tarfile.TarInfo:
    """Return what a tar says of a file, with nothing of who wrote it when."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o755 if name == PROGRAM or name.endswith((".py", ".so")) else 0o644
    return member
