"""Compile the block-sparse kernels to one shared library for a processor family, cached by content.

The library holds the loops of every instruction set of its family and chooses at run time, so it depends on the
family alone, not on the machine that it was compiled on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from slrc.errors import BackendError
from slrc.machine.cache import cache_folder

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi")
TILE_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "Avx512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
        "Avx2": ("-mavx2", "-mfma"),
        "Portable": (),
    },
    "aarch64": {"Neon": ("-DSLRC_TILE_NEON",), "Portable": ()},
}
"""The compiler's flags for each instruction set of a family, the best first; processors run the last one always."""
INT8_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "Avx512Amx": (*TILE_SETS["x86_64"]["Avx512"], "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
        "Avx512Vnni": (*TILE_SETS["x86_64"]["Avx512"], "-mavx512vnni"),
        "Avx512": TILE_SETS["x86_64"]["Avx512"],
        "Avx2Vnni": (*TILE_SETS["x86_64"]["Avx2"], "-mavxvnni"),
        "Avx2": TILE_SETS["x86_64"]["Avx2"],
        "Portable": (),
    },
    "aarch64": {
        "NeonI8mm": ("-DSLRC_TILE_NEON", "-DSLRC_TILE_DOT", "-DSLRC_TILE_MATMUL"),
        "NeonDot": ("-DSLRC_TILE_NEON", "-DSLRC_TILE_DOT"),
        "Neon": ("-DSLRC_TILE_NEON",),
        "Portable": (),
    },
}
"""The same of int8 layers; the name of each begins with that of the set that float32 layers then use."""
WITH_MATRICES = "Avx512Amx"
"""The set that has loops of matrix registers, and the others of the set that follows it."""
OLDEST_GLIBC = "2.28"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler for one processor family: its command and what it says its version is."""

    command: tuple[str, ...]
    version: str


def build(target: str | None = None, cache: Path | None = None, *, int8: bool = False) -> Path:
    """Return the library for `target`, compiled now unless the cache has it.

    The loops of int8 layers take longer to compile than all else, and are left out where no layer needs them. What is
    compiled of both libraries is kept for the other one. Where a compiler fails, the next one is tried.

    Args:
        target: a processor family or a triple that begins with one, such as `aarch64-linux-gnu`; this machine's own
            if `None`.
        cache: the folder to keep libraries in; `cache_folder()` if `None`.
        int8: whether it is for int8 layers too.

    Raises:
        BackendError: there are no kernels or no compiler for the target, all compilers fail, or the library cannot be
            written.
    """
    family = _family(target)
    place = cache or cache_folder()
    if path := _built(place, family, int8=int8):
        return path
    failures: list[BackendError] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        # Processes that need it at the same time, as those of a test run, compile it once.
        with FileLock(_path(place, family, find_compiler(family), int8=False).with_suffix(".lock")):
            if path := _built(place, family, int8=int8):
                return path
            for compiler in find_compilers(family):
                path = _path(place, family, compiler, int8=int8)
                try:
                    _make(compiler, family, path, int8=int8)
                except BackendError as error:
                    failures.append(error)
                else:
                    return path
    except OSError as error:
        raise BackendError(
            f"the block-sparse kernels cannot be written to `{place}`: {error.strerror}",
            hint="free some space, or name another folder in SLRC_CACHE",
        ) from error
    raise failures[0]


def _make(compiler: Compiler, family: str, path: Path, *, int8: bool) -> None:
    objects = path.parent / f"slrc_kernels_{family}_{_key(family, compiler)}"
    objects.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        compile_library(compiler, family, Path(folder), made, int8=int8, kept=objects)
        made.replace(path)


def is_built(target: str | None = None, *, int8: bool = False) -> bool:
    """Whether the cache has the library for `target`. See `build`.

    Raises:
        BackendError: there are no kernels or no compiler for the target.
    """
    return _built(cache_folder(), _family(target), int8=int8) is not None


def _built(place: Path, family: str, *, int8: bool) -> Path | None:
    paths = (_path(place, family, compiler, int8=int8) for compiler in find_compilers(family))
    return next((path for path in paths if path.exists()), None)


def _path(cache: Path, family: str, compiler: Compiler, *, int8: bool) -> Path:
    return cache / f"libslrc_kernels_{family}{'_int8' if int8 else ''}_{_key(family, compiler)}.so"


def find_compiler(family: str) -> Compiler:
    """Return the first of `find_compilers`.

    Raises:
        BackendError: there is none.
    """
    return next(find_compilers(family))


def find_compilers(family: str) -> Iterator[Compiler]:
    """Yield what compiles for `family`: `$CXX` alone if it does, else installed GCC and Clang, then `ziglang`.

    Raises:
        BackendError: there is none.
    """
    _family(family)
    given = tuple(shlex.split(os.environ.get("CXX", "")))
    commands = [*([given] if given else []), *_candidates(family)]
    found: set[str] = set()
    for command in commands:
        compiler = _compiler(command, family)
        version = compiler.version.partition(" ")[2] if compiler else ""  # behind the name that it was called by
        if compiler and version not in found:
            found.add(version)
            yield compiler
            if command == given:
                break
    if not found:
        raise BackendError(
            f"no C++ compiler for {family}: tried {', '.join(map(shlex.join, commands))}",
            hint="set CXX, install g++ or clang++, or `pip install ziglang`, which compiles for every target",
        )


def _compiler(command: tuple[str, ...], family: str) -> Compiler | None:
    made_for = family if "-target" in command else _ask(command, "-dumpmachine")
    version = _ask(command, "--version")
    if made_for is None or version is None or family_of(made_for) != family:
        return None
    return Compiler(command, version)


def compile_library(
    compiler: Compiler,
    family: str,
    folder: Path,
    library: Path,
    extra: Sequence[str] = (),
    main: Path | None = None,
    sets: Mapping[str, tuple[str, ...]] | None = None,
    *,
    int8: bool = True,
    kept: Path | None = None,
) -> None:
    """Compile and link every source; `main` is the source of a program to make in place of a shared library.

    `sets` are the instruction sets, best first, if they are not to be all of `TILE_SETS`. Without `int8` it has no
    loops for int8 layers. In the folder `kept` loops are looked for, and left, that were compiled by the same compiler
    with the same `extra` flags.
    """
    left_out = {"tile", "tile_matrix"} | (set() if main is None else {"ort_ops", "ort_int8_ops"})
    sets = sets or TILE_SETS[family]
    integer = {n: flags for n, flags in INT8_SETS[family].items() if int8 and any(n.startswith(name) for name in sets)}
    listed = (
        f"-DSLRC_TILE_SETS={''.join(f'&k{name},' for name in sets)}",
        f"-DSLRC_INT8_SETS={''.join(f'&k{name}Int8,' for name in integer)}",
        *(["-DSLRC_HAS_AMX"] if WITH_MATRICES in integer else []),
    )
    units: list[tuple[str, Path, tuple[str, ...]]] = [(f.stem, f, listed) for f in _sources() if f.stem not in left_out]
    for name, flags in sets.items():
        defines = (f"-DSLRC_TILE_SET=k{name}", f'-DSLRC_TILE_NAME="{name.lower()}"')
        units.append((f"tile_{name}", SOURCES / "tile.cpp", (*flags, *defines)))
    for name, flags in integer.items():
        matrix = name == WITH_MATRICES
        defines = (f"-DSLRC_TILE_SET=k{name}{'' if matrix else 'Int8'}", f'-DSLRC_TILE_NAME="{name.lower()}"')
        source = SOURCES / ("tile_matrix.cpp" if matrix else "tile.cpp")
        units.append((f"int8_{name}", source, (*flags, *defines, "-DSLRC_TILE_INT8")))
    if main is not None:
        units.append((main.stem, main, (f"-I{SOURCES}",)))
    loops = {SOURCES / "tile.cpp", SOURCES / "tile_matrix.cpp"}
    objects = [(kept if kept and source in loops else folder) / f"{name}.o" for name, source, _ in units]

    def compile_unit(unit: tuple[str, Path, tuple[str, ...]], made: Path) -> None:
        if made.parent == kept and made.exists():
            return
        aside = folder / made.name
        _run(compiler, *FLAGS, *extra, *unit[2], "-c", str(unit[1]), "-o", str(aside))
        aside.replace(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, units, objects))
    shared = (f"-Wl,--version-script={SOURCES / 'exports.map'}", "-shared") if main is None else ()
    own_runtime = ("-static-libstdc++", "-static-libgcc") if "ziglang" not in compiler.command else ()
    _run(compiler, *extra, *shared, *own_runtime, *map(str, objects), "-o", str(library))


def _family(target: str | None) -> str:
    if sys.platform != "linux":
        raise BackendError(f"the block-sparse kernels are for Linux, this is {sys.platform}")
    family = family_of(target or platform.machine())
    if family not in TILE_SETS:
        raise BackendError(f"no block-sparse kernels for {family}: expected {' or '.join(TILE_SETS)}")
    return family


def family_of(triple: str) -> str:
    """Return the processor family that a machine's name or a triple begins with, such as `x86_64` or `aarch64`."""
    family = triple.strip().split("-")[0].lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(family, family)


def _candidates(family: str) -> Iterator[tuple[str, ...]]:
    yield from ((name,) for name in ("g++", "clang++", f"{family}-linux-gnu-g++"))
    if importlib.util.find_spec("ziglang"):
        yield (sys.executable, "-m", "ziglang", "c++", "-target", f"{family}-linux-gnu.{OLDEST_GLIBC}")


def _ask(command: Sequence[str], question: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run([*command, question], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _key(family: str, compiler: Compiler) -> str:
    parts = [
        *compiler.command,
        compiler.version,
        *FLAGS,
        repr((TILE_SETS[family], INT8_SETS[family])),
        sources_digest(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def sources_digest() -> str:
    """Return a name for the content of the kernels' sources and of how they are built."""
    files = [*_sources(), *sorted(SOURCES.glob("*.h")), SOURCES / "exports.map", Path(__file__)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _run(compiler: Compiler, *arguments: str) -> None:
    done = subprocess.run([*compiler.command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise BackendError(
            f"the compiler failed on the block-sparse kernels: {shlex.join(compiler.command)}\n{said}",
            hint="another compiler can be named in CXX",
        )
