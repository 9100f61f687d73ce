"""The arrows of the design, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import slrc
import slrc.backends
import slrc.passes

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "errors",
    "progress",
    "user_code",
    "machine",
    "ir",
    "sparsity",
    "forms",
    "kernels",
    "passes",
    "backends",
    "methods",
    "options",
    "config",
    "workload",
    "load_workload",
    "training",
    "reconstruction",
    "probes",
    "verify",
    "quantization",
    "pipeline",
    "measuring",
    "planning",
    "doctor",
    "reporting",
    "workspace",
    "quantized_targets",
    "device",
    "compilation",
    "api",
    "sweep",
    "cli_errors",
    "cli_options",
    "cli_output",
    "cli",
)
"""The folders and files of `slrc`, each of which may import those before it."""


def sources(*folders: str) -> list[Path]:
    """Each source once: `slrc/passes` and `slrc/backends` are links to the folders at the root."""
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    return [f for f in files if not any(p.is_symlink() for p in (f, *f.parents))]


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too, as an absolute name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def test_there_is_something_to_check() -> None:
    for folder, least in (("slrc", 20), ("passes", 6), ("backends", 6)):
        assert len(sources(folder)) >= least
    assert "slrc.ir.program" in set(imports(ROOT / "passes" / "base.py"))


@pytest.mark.parametrize(("folder", "other"), [("passes", "slrc.backends"), ("backends", "slrc.passes")])
def test_passes_and_backends_never_import_each_other(folder: str, other: str) -> None:
    found = {f"{f.relative_to(ROOT)}: {name}" for f in sources(folder) for name in imports(f) if within(name, other)}
    assert not found


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "slrc" else parts[0]


def test_every_room_has_its_place_in_the_order() -> None:
    found = {room_of(f) for f in sources("slrc", "passes", "backends")}
    assert found == {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_before_it(room: str) -> None:
    later = [f"slrc.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]]
    files = [f for f in sources("slrc", "passes", "backends") if room_of(f) == room]
    found = {f"{f.relative_to(ROOT)}: {name}" for f in files for name in imports(f) if within(name, *later)}
    assert not found


def test_nobody_imports_bare_passes_or_backends() -> None:
    files = sources("slrc", "passes", "backends", "tests", "benchmarks", "examples")
    found = {f"{f.relative_to(ROOT)}: {n}" for f in files for n in imports(f) if within(n, "passes", "backends")}
    assert not found


def test_heavy_packages_are_imported_late() -> None:
    """Naming a backend, or asking for help, must not wait for a runtime or for torch."""
    for file in [
        ROOT / "slrc" / f"{name}.py"
        for name in ("cli", "cli_errors", "cli_options", "cli_output", "__init__", "errors")
    ]:
        top = ast.Module([n for n in ast.parse(file.read_text()).body if not isinstance(n, ast.If)], [])
        names = {n for node in ast.walk(top) if isinstance(node, ast.Import) and node in top.body
                 for n in (a.name for a in node.names)}  # fmt: skip
        names |= {str(n.module) for n in top.body if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if within(n, "torch", "onnx", "onnxruntime", "accelerate", "slrc.api")], file


def test_the_tested_package_is_the_installed_one() -> None:
    assert slrc.__version__ == version("slrc")
    assert slrc.passes.__name__ == "slrc.passes"
    assert slrc.backends.__name__ == "slrc.backends"
    assert Path(slrc.passes.__file__ or "").parent.parent == Path(slrc.__file__).parent


def test_the_public_names_exist() -> None:
    assert sorted(slrc._HOME) == sorted(slrc.__all__)
    for name in slrc.__all__:
        assert getattr(slrc, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        slrc.nope  # noqa: B018
