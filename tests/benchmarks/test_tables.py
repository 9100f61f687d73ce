"""The tables of the docs are those that the results files make."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


def test_the_docs_show_the_rows_as_they_are(tables: ModuleType) -> None:
    for page in tables.pages():
        text = page.read_text()
        assert text.count("<!-- table: ") == text.count("<!-- end -->"), page.name
        assert text == tables.filled(text), f"{page.name}: `make tables` writes it anew"


def test_every_table_stands_in_the_docs(tables: ModuleType) -> None:
    text = "".join(page.read_text() for page in tables.pages())
    assert not [name for name in tables.TABLES if f"<!-- table: {name} -->" not in text]


def test_a_table_is_filled_from_its_rows(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tables.CASES[0]
    row = {
        "accuracy": {"dense": 0.99, "final": 0.98},
        "params": {"dense": 1000, "compiled": 250},
        "dense_ms": 2.0,
        "compiled_ms": 1.0,
        "speedup": 2.0,
        "spread": [1.9, 2.1],
    }
    monkeypatch.setattr(tables, "read", lambda name: {case.command: row} if name == "front_page" else {})
    page = "before\n<!-- table: front-page -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(page)
    assert "| 99.0% → 98.0% | −75.0% | 2.00 → 1.00 ms | 2.00× (1.90 to 2.10) |" in filled
    assert filled.count(tables.TO_FILL) == 4 * (len(tables.CASES) - 1)
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")
