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
    case = tables.latency.CASES[0]
    row = {
        "accuracy": {"dense": 0.99, "final": 0.98},
        "params": {"dense": 1000, "compiled": 250},
        "dense_ms": 2.0,
        "compiled_ms": 1.0,
        "speedup": 2.0,
        "spread": [1.9, 2.1],
    }
    monkeypatch.setattr(tables.latency, "read", lambda name: {case.command: row})
    page = "before\n<!-- table: front-page -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(page)
    assert "| 99.0% → 98.0% | −75.0% | 2.00 → 1.00 ms | 2.00× (1.90 to 2.10) |" in filled
    assert filled.count(tables.latency.TO_FILL) == 4 * (len(tables.latency.CASES) - 1)
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")


def test_a_network_that_failed_says_so(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    proven = {"left": 0.36, "error": 4e-7}
    rows = {"a": {"parameters": 2e6, "channel": proven, "block:8x1": {"failed": "PlanError: nothing"}}, "b": {}}
    monkeypatch.setattr(tables.coverage, "read", lambda name: rows)
    text = tables.coverage.detectors()
    assert "| `a` | 2.0 M | 36%, 4e-07 | PlanError: nothing |" in text
    assert "| `b` | – | ended early | ended early |" in text


def test_what_stands_around_a_network_counts(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"before_ms": 10.0, "after_ms": 10.0, "dense_ms": 100.0, "compiled_ms": 40.0}
    row = {"title": "Net, 8×8", "macs_dense": 2e9, "speedup": 2.5, "spread": [2.4, 2.6], **times}
    faster = {**row, "compiled_ms": 20.0}
    rows = {"net block:8x1 0.75 avx2": row, "net channel 0.75 avx2": row, "net block:8x1 0.75 avx512": faster}
    monkeypatch.setattr(tables.latency, "read", lambda name: rows)
    speed = "2.50× (2.40 to 2.60)"
    found = tables.latency.tasks_latency()
    assert f"| Net, 8×8 | AVX2 | 2.00 G | 100 ms | {speed} | – | {speed} |" in found
    assert f"| Net, 8×8 | AVX-512 | 2.00 G | 100 ms | {speed} | – | – |" in found
    found = tables.latency.tasks_pipeline()
    assert "| Net, 8×8 | AVX2 | 10.0 | 100.0 | 40.0 | 10.0 | 2.00× | 33% |" in found
    assert "| Net, 8×8 | AVX-512 | 10.0 | 100.0 | 20.0 | 10.0 | 3.00× | 50% |" in found


def test_what_was_foretold_stands_beside_what_was_measured(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where doctor had no time, nothing is foretold, and nothing counts as an error."""
    first, second, third = tables.latency.doctor.__globals__["complete"].__globals__["NETWORKS"][:3]
    rows = {
        first: {"seconds": 49.6, "timed": [2, 9], "predicted": {"block:8x1 0.75": [2.0, 1.9, 2.1]}},
        f"{first} block:8x1 0.75": {"speedup": 2.5},
        f"{first} channel 0.5": {"speedup": 2.0},
        second: {"seconds": 30.0, "timed": [9, 9], "predicted": {"block:8x1 0.75": [3.0], "channel 0.5": [2.02]}},
        f"{second} block:8x1 0.75": {"speedup": 3.0},
        f"{second} channel 0.5": {"speedup": 2.0},
        third: {"seconds": 70.0, "timed": [0, 9], "predicted": {}},
    }
    monkeypatch.setattr(tables.latency, "read", lambda name: rows)
    text = tables.latency.doctor()
    assert f"| `{first}` | 50 s | 2 of 9 | 2.00×, 2.50×, -20% | –, 2.00× |" in text
    assert f"| `{second}` | 30 s | 9 of 9 | 3.00×, 3.00×, +0% | 2.02×, 2.00×, +1% |" in text
    assert third not in text
    assert "The longest examination took 50 s. Of the 3 pruned networks" in text
    assert "off by 1.0% in the median and by 20.0% at most" in text
