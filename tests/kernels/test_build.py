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

    def fake(compiler: Any, family: str, folder: Path, library: Path, **_: Any) -> None:
        time.sleep(0.05)
        library.write_bytes(b"library")
        made.append(library)

    monkeypatch.setattr(build, "find_compilers", lambda family: iter([build.Compiler(("c++",), "1")]))
    monkeypatch.setattr(build, "compile_library", fake)
    return made


def test_several_at_once_compile_it_once(compiled: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build("x86_64", tmp_path), range(4)))
    assert [p.read_bytes() for p in paths] == [b"library"]
    assert len(compiled) == 1


def test_loops_are_compiled_once_for_both_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fake(compiler: Any, *arguments: str) -> None:
        out = Path(arguments[arguments.index("-o") + 1])
        out.write_bytes(b"object")
        made.append(out.name)

    monkeypatch.setattr(build, "find_compilers", lambda family: iter([build.Compiler(("c++",), "1")]))
    monkeypatch.setattr(build, "_run", fake)
    plain = build.build("x86_64", tmp_path)
    assert {"tile_Avx512.o", "tile_Avx2.o", "tile_Portable.o"} <= set(made)
    assert not any(name.startswith("int8_") for name in made)
    made.clear()
    both = build.build("x86_64", tmp_path, int8=True)
    assert both != plain
    assert {"int8_Avx512Vnni.o", "int8_Portable.o", "processor.o", both.name} <= set(made)
    assert not any(name.startswith("tile_") for name in made)


def test_the_next_compiler_is_tried_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def fake(compiler: build.Compiler, *arguments: str) -> None:
        commands.append(compiler.command[0])
        if compiler.command[0] == "broken":
            raise BackendError("internal compiler error")
        Path(arguments[arguments.index("-o") + 1]).write_bytes(b"object")

    compilers = [build.Compiler((name,), "1") for name in ("broken", "whole")]
    monkeypatch.setattr(build, "find_compilers", lambda family: iter(compilers))
    monkeypatch.setattr(build, "_run", fake)
    made = build.build("x86_64", tmp_path)
    assert set(commands) == {"broken", "whole"}
    commands.clear()
    assert build.build("x86_64", tmp_path) == made
    assert not commands
    monkeypatch.setattr(build, "find_compilers", lambda family: iter(compilers[:1]))
    with pytest.raises(BackendError, match="internal compiler error"):
        build.build("x86_64", tmp_path)


def test_a_cache_that_cannot_be_written(compiled: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"cannot be written to .*file"):
        build.build("x86_64", tmp_path / "file" / "cache")
    assert not compiled
