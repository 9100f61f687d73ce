"""`fuzz.cpp`, with the sanitizers here and on an emulated aarch64."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from slrc.errors import BackendError
from slrc.kernels.build import Compiler, compile_library, find_compiler

CASES = os.environ.get("SLRC_KERNEL_CASES", "300")
SOURCE = Path(__file__).parent / "fuzz.cpp"


def run(command: list[str], name: str, cases: str = CASES) -> str:
    done = subprocess.run(
        [*command, "0", cases], env={**os.environ, "SLRC_KERNEL_ISA": name}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("flags", "cases"),
    [((), "20000"), (("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), CASES)],
    ids=["many", "under the sanitizers"],
)
def test_random_layers(tmp_path: Path, flags: tuple[str, ...], cases: str) -> None:
    try:
        compiler = find_compiler("x86_64")
    except BackendError as error:
        pytest.skip(error.message)
    compile_library(compiler, "x86_64", tmp_path, tmp_path / "fuzz", flags, SOURCE)
    supported = Path("/proc/cpuinfo").read_text()
    for name, flag in (("portable", "fpu"), ("avx2", "avx2"), ("avx512", "avx512f")):
        if flag in supported:
            assert run([str(tmp_path / "fuzz")], name, cases).startswith(f"{name}: ")


def test_on_an_emulated_aarch64(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("no qemu-aarch64-static")
    try:
        compiler = find_compiler("aarch64")
    except BackendError as error:
        pytest.skip(error.message)
    # Zig links statically with musl alone; the emulated system has no libraries of its own.
    command = tuple(part.replace("-linux-gnu.", "-linux-musl#").partition("#")[0] for part in compiler.command)
    compiler = Compiler(command, compiler.version)
    compile_library(compiler, "aarch64", tmp_path, tmp_path / "fuzz", ("-static",), SOURCE)
    for name in ("neon", "portable"):
        assert run([emulator, str(tmp_path / "fuzz")], name, "60").startswith(f"{name}: ")
