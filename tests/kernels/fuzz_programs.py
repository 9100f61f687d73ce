"""`fuzz.cpp`, compiled in several ways and kept in the cache by content."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from slrc.kernels.build import INT8_SETS, SOURCES, TILE_SETS, Compiler, compile_library, find_compiler, sources_digest
from slrc.machine.cache import cache_folder

CASES = int(os.environ.get("SLRC_FUZZ", "3000"))
SOURCE = Path(__file__).parent / "fuzz.cpp"
INT8 = Path(__file__).parent / "fuzz_int8.h"
ALL_SETS = INT8_SETS["x86_64"] | TILE_SETS["x86_64"]
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def sets_of_this_machine() -> dict[str, tuple[str, ...]]:
    """Return the sets that this x86-64 processor runs, those of int8 layers alone among them."""
    said = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    features = set(said.replace("_", "").split())
    needed = {
        name: {flag.removeprefix("-m").replace("-", "") for flag in flags if not flag.startswith("-mprefer")}
        for name, flags in ALL_SETS.items()
    }
    return {name: ALL_SETS[name] for name, needs in needed.items() if needs <= features}


def linked(library: Path) -> Path:
    """Return a program that loads the library that users get."""
    compiler = find_compiler("x86_64")
    flags = (f"-I{SOURCES}", str(library), f"-Wl,-rpath,{library.parent}")

    def make(folder: Path, program: Path) -> None:
        command = [*compiler.command, "-std=c++17", "-O2", str(SOURCE), *flags, "-o", str(program)]
        subprocess.run(command, check=True, capture_output=True)

    return _cached(compiler, flags, make)


def sanitized() -> Path:
    """Return a program with the address and undefined-behaviour sanitizers, of the sets that this machine runs."""
    sets = {name: flags for name, flags in sets_of_this_machine().items() if name in TILE_SETS["x86_64"]}
    return _compiled(find_compiler("x86_64"), "x86_64", SANITIZERS, sets)


def static(compiler: Compiler, family: str) -> Path:
    """Return a program that needs no library, for an emulator."""
    return _compiled(compiler, family, ("-static",), TILE_SETS[family])


def run(command: Sequence[str], name: str, cases: int) -> str:
    """Run `cases` cases with an instruction set; return what the program says."""
    environment = {**os.environ, "SLRC_KERNEL_ISA": name}
    done = subprocess.run([*command, "0", str(cases)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _compiled(compiler: Compiler, family: str, flags: Sequence[str], sets: Mapping[str, tuple[str, ...]]) -> Path:
    def make(folder: Path, program: Path) -> None:
        compile_library(compiler, family, folder, program, flags, SOURCE, sets)

    return _cached(compiler, (*flags, family, *sets), make)


def _cached(compiler: Compiler, flags: Sequence[str], make: Callable[[Path, Path], None]) -> Path:
    parts = (*compiler.command, compiler.version, *flags, sources_digest(), SOURCE.read_text(), INT8.read_text())
    path = cache_folder() / f"fuzz_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    # The workers of a test run need it at the same time.
    with FileLock(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if not path.exists():
            make(Path(folder), Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
    return path
