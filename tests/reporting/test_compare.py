"""Reports side by side: the same figures in the table and on the page, and what makes them hard to compare."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_reports import Page, make_report

from slrc.errors import OutputError
from slrc.reporting.compare import Comparison, compare, compare_tables, render_comparison


def build(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    make_report(**changes).save(folder)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> Comparison:
    report = make_report()
    faster = report.latency[0].model_copy(
        update={
            "compiled_ms": report.latency[0].compiled_ms.model_copy(update={"p50": 0.5}),
            "speedup": 4.0,
            "speedup_spread": (3.9, 4.1),
        }
    )
    fewer = report.layers[0].model_copy(update={"name": "only<here>", "kept": 1, "groups": 4})
    first = build(tmp_path / "a")
    second = build(
        tmp_path / "b",
        pattern="block:8x1",
        accuracy=report.accuracy.model_copy(update={"final": 0.75}),
        latency=(faster,),
        layers=(fewer,),
    )
    return compare([first, second])


def cells(found: Comparison, name: str) -> tuple[str, ...]:
    return next(row.cells for row in (*found.rows, *found.layers) if row.name == name)


def test_figures_stand_side_by_side(two: Comparison) -> None:
    assert two.names == ("a", "b")
    assert cells(two, "pattern") == ("channel", "block:8x1")
    assert cells(two, "accuracy") == ("0.9050", "0.7500")
    assert cells(two, "latency, ort") == ("0.800 ms", "0.500 ms")
    assert cells(two, "  speed-up") == ("2.50x", "4.00x")
    assert cells(two, "model file") == ("0.422 MB", "0.422 MB")
    assert cells(two, "checks passed") == ("2 of 2", "2 of 2")
    assert cells(two, "only<here>") == ("", "75.0%")
    assert all(len(row.cells) == 2 for row in (*two.rows, *two.layers))
    assert not two.notes


def test_the_table_and_the_page_show_them_all(two: Comparison) -> None:
    console = Console(file=StringIO(), width=120, markup=False, highlight=False)
    for table in compare_tables(two):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    page = Page(render_comparison(two))
    assert not page.faults
    assert len(set(page.ids)) == len(page.ids)
    assert all(address.startswith("#") for address in page.addresses)
    assert "script" not in page.tags
    for row in (*two.rows, *two.layers):
        for cell in (row.name.strip(), *row.cells):
            assert cell in text
            assert cell in page.text
    assert "svg" in page.tags
    assert "0 is the dense network, 1 is a, 2 is b" in " ".join(page.text.replace(" ,", ",").replace("\n", " ").split())


def test_what_was_not_alike_is_told(tmp_path: Path) -> None:
    folders = [build(tmp_path / "x" / "build"), build(tmp_path / "y" / "build", environment={"cpu": "another"})]
    found = compare(folders)
    assert found.names == tuple(map(str, folders))
    assert len(found.notes) == 1
    assert "different processors" in found.notes[0]
    bare = build(tmp_path / "bare", accuracy=None, latency=(), layers=())
    assert render_comparison(compare([folders[0], bare]))


def test_a_folder_that_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no report\.json"):
        compare([build(tmp_path / "a"), tmp_path])
