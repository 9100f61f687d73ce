"""What is asked of the machine, on systems that say less than Linux does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slrc.backends import parse_target
from slrc.backends.ort import OnnxRuntime
from slrc.errors import BackendError
from slrc.kernels.build import build, find_compiler
from slrc.machine import processor as processor_module
from slrc.machine.cache import cache_folder
from slrc.machine.cores import usable_cores
from slrc.machine.lock import take_lock
from slrc.machine.processor import processor
from slrc.measuring.timing import INSTRUCTION_SETS, environment


@pytest.fixture
def fresh_processor() -> Any:
    processor.cache_clear()
    yield
    processor.cache_clear()


def test_cores_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == 12
    assert environment()["cores"] == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 7}, raising=False)
    assert usable_cores() == 3


ARM = "processor\t: 0\nFeatures\t: fp asimd sve\n"
X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"


@pytest.mark.usefixtures("fresh_processor")
@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [
        (X86, "Some CPU @ 2 GHz", ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]),
        (ARM, "the machine's name", ["asimd", "sve"]),
    ],
)
def test_the_processor_as_linux_tells(
    text: str, name: str, sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor_module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "the machine's name")
    assert processor().name == name
    assert [f for f in INSTRUCTION_SETS if f in processor().features] == sets


@pytest.mark.usefixtures("fresh_processor")
def test_the_processor_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cpuinfo

    asked = []
    monkeypatch.setattr(processor_module, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: asked.append(1) or {"brand_raw": "M9", "flags": ["asimd"]})
    assert (environment()["cpu"], environment()["instruction_sets"]) == ("M9", ["asimd"])
    assert asked == [1]


def test_the_cache_is_where_it_was_asked_for_or_where_the_system_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "asked"))
    assert cache_folder() == tmp_path / "asked"
    monkeypatch.delenv("SLRC_CACHE")
    expected = {"linux": ".cache/slrc", "darwin": "Library/Caches/slrc"}.get(sys.platform)
    assert expected is None or cache_folder() == tmp_path / "home" / expected
    monkeypatch.setenv("SLRC_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "home" / "mine"


HOLD = """
import sys
from slrc.machine.lock import take_lock

lock = take_lock(sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_lock_is_held_by_one_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert take_lock(path) is None
        holder.kill()
    lock = take_lock(path)
    assert lock is not None
    assert take_lock(path) is None
    lock.release()
    again = take_lock(path)
    assert again is not None
    again.release()
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        take_lock(path / "under a file")


WITHOUT = """
import builtins, importlib, os
from accelerate import Accelerator  # whatever others import may be there

imported = builtins.__import__

def without(name, globals=None, *args, **kwargs):
    if name in ("fcntl", "resource", "pwd", "grp") and str((globals or {}).get("__name__")).startswith("slrc"):
        raise ImportError(name)
    return imported(name, globals, *args, **kwargs)

builtins.__import__ = without
del os.sched_getaffinity
for name in ("slrc.api", "slrc.cli", "slrc.reporting.bench"):
    importlib.import_module(name)
from slrc.measuring.timing import environment
assert environment()["cores"] >= 1
"""


def test_nothing_of_slrc_needs_what_only_unix_has() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_kernels_say_that_they_are_for_linux(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    backend, message = OnnxRuntime(), f"the block-sparse kernels are for Linux, this is {system}"
    for target in ("ort", "ort:aarch64", "ort:x86_64"):
        assert backend.why_not_packed(parse_target(target)) == message
        assert backend.available(parse_target("ort:stock")).why_not_run == ""
    for make in (build, lambda: build("x86_64"), lambda: find_compiler("aarch64")):
        with pytest.raises(BackendError, match=message):
            make()
