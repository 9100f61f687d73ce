"""Libraries are compiled once and kept."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slrc.errors import BackendError
from slrc.kernels import build


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that the compiler, which is a fake, has made."""
    made: list[Path] = []

    def fake(compiler: Any, family: str, folder: Path, library: Path) -> None:
        time.sleep(0.05)
        library.write_bytes(b"library")
        made.append(library)

    monkeypatch.setattr(build, "find_compiler", lambda family: build.Compiler(("c++",), "1"))
    monkeypatch.setattr(build, "compile_library", fake)
    return made


def test_several_at_once_compile_it_once(compiled: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build("x86_64", tmp_path), range(4)))
    assert [p.read_bytes() for p in paths] == [b"library"]
    assert len(compiled) == 1


def test_a_cache_that_cannot_be_written(compiled: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"cannot be written to .*file"):
        build.build("x86_64", tmp_path / "file" / "cache")
    assert not compiled
