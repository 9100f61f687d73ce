"""`fuzz.cpp` on the library, with the sanitizers, and on an emulated aarch64; `make fuzz` runs many more cases."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import fuzz_programs as programs
import pytest

from slrc.errors import BackendError
from slrc.kernels.build import Compiler, find_compiler

SETS = list(programs.ALL_SETS)


def compiler_for(family: str) -> Compiler:
    try:
        return find_compiler(family)
    except BackendError as error:
        pytest.skip(error.message)


def skip_unless_run_here(name: str) -> None:
    compiler_for("x86_64")
    if name not in programs.sets_of_this_machine():
        pytest.skip(f"this processor has no {name}")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", SETS)
def test_random_layers(library: Path, name: str) -> None:
    skip_unless_run_here(name)
    said = programs.run([str(programs.linked(library))], name.lower(), programs.CASES)
    assert said.startswith(f"{name.lower()}: ")


@pytest.mark.fuzz
@pytest.mark.skipif("SLRC_FUZZ" not in os.environ, reason="compiles for minutes: runs under make fuzz")
@pytest.mark.parametrize("name", SETS)
def test_random_layers_under_the_sanitizers(name: str) -> None:
    skip_unless_run_here(name)
    said = programs.run([str(programs.sanitized())], name.lower(), max(100, programs.CASES // 20))
    assert said.startswith(f"{name.lower()}: ")


def test_on_an_emulated_aarch64() -> None:
    emulator = shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("no qemu-aarch64-static")
    compiler = compiler_for("aarch64")
    # Zig links statically with musl alone; the emulated system has no libraries of its own.
    command = tuple(part.replace("-linux-gnu.", "-linux-musl#").partition("#")[0] for part in compiler.command)
    program = programs.static(Compiler(command, compiler.version), "aarch64")
    for name in ("neoni8mm", "neondot", "neon", "portable"):
        assert programs.run([emulator, str(program)], name, 60).startswith(f"{name}: ")
