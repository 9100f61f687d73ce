"""Compiling a program by AOTInductor, and what a package needs of the machine that runs it."""

from __future__ import annotations

import copy
import os
import platform
import re
import shlex
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from slrc.errors import BackendError
from slrc.ir.quiet import quiet_torch
from slrc.kernels.build import family_of
from slrc.machine.processor import processor

DIGEST, TORCH, DEVICE, FAMILY = "sha256", "torch", "device", "processor"
INSTRUCTIONS, CAPABILITY = "instruction_sets", "compute_capability"
"""The properties in a manifest by which a package is known and may be loaded."""


def find_compiler() -> str | None:
    """Return the C++ compiler that AOTInductor is to call: `$CXX`, else GCC or Clang; `None` if there is none."""
    return next(filter(None, map(shutil.which, _candidates())), None)


def why_no_compiler() -> str:
    """Return what is missing where there is no C++ compiler; empty if there is one."""
    return "" if find_compiler() else f"no C++ compiler: tried {', '.join(_candidates())}; set CXX or install g++"


def build_package(exported: ExportedProgram, path: Path, device: str) -> Mapping[str, str]:
    """Compile a program to a package at `path`, which ends in `.pt2`; return the properties for its manifest.

    Raises:
        Exception: whatever the compiler makes of the program.
    """
    import torch._inductor
    from torch.export.passes import move_to_device_pass
    from torch.fx.experimental import _config

    if device == "cuda":
        exported = move_to_device_pass(copy.deepcopy(exported), "cuda")
    # Without gradients weights are frozen, and then stored in the layout that oneDNN multiplies them in. Not to look at
    # the example's batch keeps choices that depend on it, as at 16 for a convolution, from bounding all others.
    with quiet_torch(), torch.no_grad(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=_settings(device))
    family = family_of(platform.machine())
    return {DIGEST: digest(path), TORCH: torch.__version__, DEVICE: device, FAMILY: family, **_needs(device)}


def check_package(path: Path, properties: Mapping[str, str]) -> None:
    """Make sure that the package is the one that a manifest describes, and that this machine can run it.

    A package is native code, which runs when it is loaded: nothing else than what is described may be.

    Raises:
        BackendError: it is not, or cannot.
    """
    if not path.is_file():
        raise BackendError(f"there is no package `{path}`")
    if digest(path) != properties.get(DIGEST):
        raise BackendError(
            f"the package `{path}` is not the one that its manifest describes",
            hint="it was damaged or exchanged: do not run it, compile it anew",
        )
    needed, here = properties.get(TORCH, "none"), torch.__version__
    if needed.split(".")[:2] != here.split(".")[:2]:
        raise BackendError(
            f"the package `{path}` was compiled by PyTorch {needed}, and this is {here}",
            hint="compile it anew with this version",
        )
    if reason := _why_not_here(properties):
        raise BackendError(f"the package `{path}` cannot run here: {reason}", hint="compile it on this machine")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        found = sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _candidates() -> tuple[str, ...]:
    given = shlex.split(os.environ.get("CXX", ""))
    return (given[0],) if given else ("g++", "clang++")


def _settings(device: str) -> dict[str, Any]:
    """Return the settings of the compiler: as many threads as there are when it runs, no more instructions than named.

    Earlier versions of PyTorch do not have all of them.
    """
    from torch._inductor import config

    wanted = {
        "freezing": device == "cpu",
        "cpp.cxx": (find_compiler(),),
        "cpp.dynamic_threads": True,
        "cpp.march": "",
        "aot_inductor.check_lowerbound": False,  # exported with a batch of two, a program takes one all the same
    }
    known = config.get_config_copy()  # type: ignore[attr-defined]
    return {name: value for name, value in wanted.items() if name in known}


def _needs(device: str) -> dict[str, str]:
    """Return what a package needs of the processor or the GPU."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if device == "cuda":
        return {CAPABILITY: _capability()}
    flags = pick_vec_isa().build_arch_flags()
    names = ["sve"] if "sve" in flags else re.findall(r"-m((?:avx|amx|fma)[\w-]*)", flags)
    return {INSTRUCTIONS: " ".join(dict.fromkeys(map(_bare, names)))}


def _why_not_here(properties: Mapping[str, str]) -> str:
    """Return what of a package's needs is missing here; empty if nothing is."""
    family, device = family_of(platform.machine()), properties.get(DEVICE)
    if properties.get(FAMILY) != family:
        return f"it is for {properties.get(FAMILY)}, and this machine is {family}"
    if device == "cuda":
        here = _capability() if torch.cuda.is_available() else "without a CUDA GPU that torch can use"
        needed = properties.get(CAPABILITY)
        return "" if here == needed else f"it is for a GPU {needed}, and this machine is {here}"
    missing = {*properties.get(INSTRUCTIONS, "").split()} - {*map(_bare, processor().features)}
    return f"the processor has no {' '.join(sorted(missing))}" if missing else ""


def _capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _bare(feature: str) -> str:
    """Return a processor's feature without what compilers and Linux write differently."""
    return re.sub(r"\W|_", "", feature)
