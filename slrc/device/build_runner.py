"""Compile the runner for devices without Python to one program for a processor family, cached by content."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from slrc.errors import DeviceError
from slrc.kernels.build import OLDEST_GLIBC, find_compiler
from slrc.machine.cache import cache_folder

SOURCES = Path(__file__).parent / "runner"
FLAGS = ("-x", "c", "-std=gnu11", "-O2", "-s", "-Wall", "-Wextra", "-Werror=implicit-function-declaration")
LIBRARIES = ("-ldl", "-lm")


def build_runner(family: str, cache: Path | None = None) -> Path:
    """Return the program for a processor family, such as `aarch64`, compiled now unless the cache has it.

    The `ziglang` package is taken where it is, since what it makes runs with every glibc from 2.28 on; else the
    compiler of the kernels.

    Raises:
        BackendError: there is no compiler for the family.
        DeviceError: the compiler fails.
    """
    command = _compiler(family)
    sources = [SOURCES / "bench.c", *sorted(SOURCES.glob("*.h"))]
    parts = [*command, *FLAGS, *LIBRARIES, *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = (cache or cache_folder()) / f"bench_{family}_{key}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        arguments = [*command, *FLAGS, str(sources[0]), "-o", str(made), *LIBRARIES]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DeviceError(
                f"the compiler failed on the runner: {shlex.join(command)}\n{done.stderr.strip()}",
                hint="`pip install ziglang` gives one that compiles for every target",
            )
        made.replace(path)
    return path


def _compiler(family: str) -> tuple[str, ...]:
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc", "-target", f"{family}-linux-gnu.{OLDEST_GLIBC}")
    return find_compiler(family).command
