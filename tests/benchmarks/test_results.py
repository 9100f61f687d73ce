"""What the results files say of themselves: where a row was made, and whether its sources have changed since."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DRAWN = ("analysis_growth.svg", "sparse_latency.svg", "convergence.md", "convergence_*.svg", "pareto.svg")
"""What is made from rows."""


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("results")


@pytest.fixture
def tree(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working tree with one benchmark, `speed.py`, of which `speed.json` is measured."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "speed.py").write_text("one")
    (tmp_path / "lib" / "inner.py").write_text("two")
    file = results.ResultsFile("speed.json", "python speed.py", ("speed.py", "lib"))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "FILES", (file,))
    return tmp_path


def test_every_results_file_has_its_command_and_its_sources(results: ModuleType) -> None:
    named = {file.name for file in results.FILES}
    lying = {p.name for p in results.FOLDER.iterdir() if not any(p.match(drawn) for drawn in DRAWN)}
    assert lying <= named
    for file in results.FILES:
        assert all((results.ROOT / source).exists() for source in file.sources), file.name
        scripts = [results.ROOT / word for word in file.command.split() if word.endswith(".py")]
        assert scripts
        assert all(script.exists() for script in scripts), file.name


def test_a_row_is_stamped_and_kept_until_a_source_changes(results: ModuleType, tree: Path) -> None:
    results.Rows("speed.py").add("a", {"ms": 1.0})
    stored = json.loads((tree / "speed.json").read_text())["rows"]["a"]
    assert stored["ms"] == 1.0
    assert stored["made_with"]["versions"]["slrc"]
    assert stored["made_with"]["processor"]
    again = results.Rows("speed.py")
    assert again.has("a")
    assert not again.has("b")

    (tree / "lib" / "inner.py").write_text("three")
    assert not results.Rows("speed.py").has("a")
    assert any("1 sources changed" in line for line in results.report())


def test_a_row_of_another_processor_is_measured_again(
    results: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.Rows("speed.py").add("a", {"ms": 1.0})
    monkeypatch.setattr(results, "processor", lambda: "another")
    assert not results.Rows("speed.py").has("a")
    assert any("1 up to date" in line for line in results.report())


def test_rows_without_a_build_are_named(results: ModuleType, tree: Path) -> None:
    (tree / "speed.json").write_text('{"rows": {"a": {"ms": 1.0}}}')
    assert any("1 no build recorded (machine not recorded" in line for line in results.report())


def test_changed_kernels_are_told_from_other_sources(results: ModuleType) -> None:
    row = {"made_with": {"kernels": "k", "sources": "s"}}
    assert results.state_of(row, {"kernels": "k", "sources": "s"}) == "up to date"
    assert results.state_of(row, {"kernels": "x", "sources": "s"}) == "kernels changed"
    assert results.state_of(row, {"kernels": "x", "sources": "x"}) == "kernels and sources changed"
