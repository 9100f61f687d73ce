"""What a backend is: it says what it can do here, lowers a program to an artifact, and runs it.

Heavy packages are imported inside `lower` and `load`, so that asking what is available costs nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from slrc.backends.engine_summary import EngineSummary
from slrc.errors import BackendError
from slrc.forms.packed_weight import PackedWeight
from slrc.forms.quantization import Scheme
from slrc.ir.program import Program

MANIFEST = "manifest.json"
MANIFEST_VERSION: Final = 1
INT8 = "int8"
"""The option of targets for layers in integers, and the precision of what is emitted for them."""
INT8_TOLERANCE: Final = 5e-2
"""What a whole int8 network may differ by on two machines, of the largest value. A sum that lies between two steps is
rounded up on one and down on the other, and what reads it differs by more."""


def bare_name(name: str) -> str:
    """Return the name of a file or folder as it is.

    Raises:
        ValueError: it is a path, or no name at all.
    """
    windows = PureWindowsPath(name)
    if name in ("", ".", "..") or windows.name != name or PurePosixPath(name).name != name or not name.isprintable():
        raise ValueError(f"expected the bare name of a file or folder, got {name!r}")
    return name


FileName = Annotated[str, AfterValidator(bare_name)]
"""The name of a file or folder that lies beside the file that names it: no path, so that it leads nowhere else."""


@dataclass(frozen=True)
class Target:
    """Where a compiled model runs: a backend and what to build for.

    `text` forms: `ort`, `ort+int8`, `tensorrt`, `tensorrt:10.3+fp16`, `tensorrt-rtx`, `tensorrt-rtx:sm86+sm89+fp16`,
    `torch:cuda+bf16`.
    """

    backend: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend}:{'+'.join(self.options)}" if self.options else self.backend

    @property
    def is_integer(self) -> bool:
        """Whether layers are to run in int8."""
        return INT8 in self.options

    @property
    def in_float(self) -> Target:
        """The same target with layers in float32."""
        return Target(self.backend, tuple(o for o in self.options if o != INT8))

    @property
    def folder(self) -> str:
        """A name for the target's folder in the output."""
        return re.sub(r"[^\w.-]+", "-", str(self))


class Availability(NamedTuple):
    """Whether a backend can emit and run on this machine; a reason is empty where it can."""

    why_not_emit: str = ""
    why_not_run: str = ""


class Artifact(BaseModel):
    """What a backend wrote: a folder with a model file and how to run it, described by its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest_version: Literal[1] = MANIFEST_VERSION
    target: str
    model_file: FileName
    precision: str = "float32"
    dynamic_batch: bool
    max_batch: int | None = None
    """The largest batch that the artifact takes; its only one where the batch is not dynamic; `None` for any."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kernels: FileName | None = None
    """The library of kernels that makes packed layers fast; the model runs without it too."""
    engine: EngineSummary | None = None
    """What the engine consists of, where one was built and its builder says so."""
    warnings: tuple[str, ...] = ()
    """What is likely slower than it could be, and why."""
    properties: Mapping[str, str] = {}
    """What else the backend wants to record: the opset, the builder's version, compute capabilities."""

    def write(self, folder: Path) -> None:
        """Write the manifest."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Artifact:
        """Read the manifest of an artifact's folder.

        Raises:
            BackendError: there is none, or it is not one of this version.
        """
        try:
            return Artifact.model_validate_json((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise BackendError(f"`{folder}` is not an artifact: it has no {MANIFEST}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BackendError(f"the manifest in `{folder}` cannot be read: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BackendError(f"the manifest in `{folder}`, field `{where}`: {first['msg']}") from None


class Runner(Protocol):
    """A loaded artifact."""

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run on the flattened inputs and return the flattened outputs, on the CPU."""

    def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
        """Return a call that runs on these inputs again and again with nothing but the engine's own work.

        The call returns when the device is done, so that it can be timed by the wall.
        """


class Backend(ABC):
    """A way to emit and run a program."""

    name: ClassVar[str]
    summary: ClassVar[str]
    scheme: ClassVar[Scheme]
    """How integers are laid out in what the backend runs."""

    @abstractmethod
    def available(self, target: Target | None = None) -> Availability:
        """Say whether this machine can emit and run for `target`, or at all, and why not. Imports nothing heavy."""

    def why_not_packed(self, target: Target) -> str:
        """Return why layers with packed blocks cannot run fast on the target; empty if they can."""
        return f"{self.name} has no kernels for packed blocks"

    def make_ready(self, target: Target, say: Callable[[str], None] | None = None) -> None:  # noqa: B027
        """Make what is made once on a machine and kept, such as compiled kernels, before anything is lowered.

        Args:
            target: what it is for.
            say: is told what takes long.

        Raises:
            BackendError: it cannot be made.
        """

    def why_not_timed(self, target: Target) -> str:
        """Return why programs cannot be timed by the hundred on the target; empty if they can."""
        return ""

    @abstractmethod
    def check_target(self, target: Target) -> None:
        """Make sure that the target's options are known; needs no device.

        Raises:
            BackendError: an option is unknown.
        """

    @abstractmethod
    def check(self, program: Program) -> list[str]:
        """Return what in the program the backend cannot take, and why; needs no device."""

    @abstractmethod
    def lower(self, program: Program, target: Target, out: Path, *, portable: bool = True) -> Artifact:
        """Write the program into the existing folder `out`, with its manifest.

        An artifact that is not `portable` runs on this machine, for as long as the cache holds what it links to.

        Raises:
            BackendError: the program cannot be emitted.
        """

    def repack(self, artifact: Artifact, folder: Path, packed: PackedWeight, out: Path) -> None:
        """Write an artifact of one packed layer again into the existing folder `out`, with other blocks in the layer.

        It is much faster than `lower`, for timing one layer with many masks. Only where `why_not_packed` says nothing.
        """
        raise NotImplementedError(f"{self.name} has no packed layers")

    def channel_multiple(self, target: Target) -> int:
        """Return what widths of channels are best a multiple of on the target."""
        return 8

    @abstractmethod
    def tolerance(self, artifact: Artifact) -> float:
        """Return how far the artifact's outputs may lie from the program's, as a share of the largest value."""

    @abstractmethod
    def load(self, folder: Path, *, threads: int | None = None, stock: bool = False) -> Runner:
        """Load an artifact to run it; with `stock`, its ONNX file as plain ONNX Runtime runs it on this CPU.

        Raises:
            BackendError: the artifact cannot run here.
        """


@dataclass(frozen=True)
class LoweredProgram:
    """An artifact and the folder it lies in."""

    artifact: Artifact
    folder: Path
    target: Target = field(default_factory=lambda: Target("ort"))

    @property
    def size_bytes(self) -> int:
        """The size of the model, with the weights that lie in a file beside it."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{self.artifact.model_file}*"))
