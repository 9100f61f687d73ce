"""`slrc compare`: reports side by side, as a table and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich.table import Table

from slrc.reporting import plots
from slrc.reporting.page import render
from slrc.reporting.pareto import Point, point_of, with_dominated
from slrc.reporting.report import Report
from slrc.reporting.tables import make_table

TEMPLATE = "compare.html.j2"


class Row(NamedTuple):
    """One figure of every build; an empty text where a build has none."""

    name: str
    cells: tuple[str, ...]


class Comparison(NamedTuple):
    """Reports side by side: figures, the share pruned of each layer, and what makes them hard to compare."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    layers: tuple[Row, ...]
    notes: tuple[str, ...]
    points: tuple[Point, ...]
    metric: str


def compare(folders: Sequence[Path]) -> Comparison:
    """Read the reports of output folders and set them side by side.

    Raises:
        OutputError: a folder is not the output of a finished compile.
    """
    reports = [Report.load(folder) for folder in folders]
    names = _names(folders)
    metric = next((r.accuracy.metric for r in reports if r.accuracy), "")
    points = [_dense_point(name, r) for name, r in zip(names, reports, strict=True)]
    points += [point_of(name, r) for name, r in zip(names, reports, strict=True)]
    return Comparison(
        names=names,
        rows=tuple(_rows(reports)),
        layers=tuple(_layers(reports)),
        notes=tuple(_notes(reports)),
        points=tuple(with_dominated(_one_dense(points), metric)),
        metric=metric,
    )


def compare_tables(found: Comparison) -> Iterator[Table]:
    """The figures, then the share pruned of each layer."""
    for title, rows in (("", found.rows), ("pruned of each layer", found.layers)):
        if rows:
            table = make_table(title, "")
            for name in found.names:
                table.add_column(name, justify="right", overflow="fold")
            for row in rows:
                table.add_row(row.name, *row.cells)
            yield table


def render_comparison(found: Comparison) -> str:
    """Return a self-contained page."""
    return render(TEMPLATE, found=found, pareto=Markup(plots.pareto_plot(found.points, found.metric)))


def _names(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the folders' own names, or their paths where two would be alike."""
    own = [folder.resolve().name for folder in folders]
    return tuple(own if len(set(own)) == len(own) else map(str, folders))


def _rows(reports: Sequence[Report]) -> Iterator[Row]:
    def row(name: str, cell: Callable[[Report], str]) -> Row:
        return Row(name, tuple(map(cell, reports)))

    yield row("model", lambda r: r.model)
    yield row("pattern", lambda r: r.pattern)
    yield row("method", lambda r: r.method)
    yield row("sparsity", lambda r: f"{r.sparsity.reached:.1%}")
    metrics = dict.fromkeys(r.accuracy.metric for r in reports if r.accuracy)
    for metric in metrics:
        yield row(metric, lambda r, m=metric: _metric(r, m, lambda a: f"{a.final:.4f}"))  # type: ignore[misc]
        yield row("  dense", lambda r, m=metric: _metric(r, m, lambda a: f"{a.dense:.4f}"))  # type: ignore[misc]
        yield row("  change", lambda r, m=metric: _metric(r, m, lambda a: f"{a.final - a.dense:+.4f}"))  # type: ignore[misc]
    yield row("parameters", lambda r: f"{r.params.compiled / 1e6:.3f} M")
    yield row("multiply-accumulates", lambda r: f"{r.macs.compiled / 1e6:.3f} M")
    yield row("model file", lambda r: f"{r.size_bytes.compiled / 1e6:.3f} MB")
    yield row("  dense", lambda r: f"{r.size_bytes.dense / 1e6:.3f} MB")
    for target in dict.fromkeys(x.target for r in reports for x in r.latency):
        found = [next((x for x in r.latency if x.target == target), None) for r in reports]
        yield Row(f"latency, {target}", tuple(f"{x.compiled_ms.p50:.3f} ms" if x else "" for x in found))
        yield Row("  dense", tuple(f"{x.dense_ms.p50:.3f} ms" if x else "" for x in found))
        yield Row("  speed-up", tuple(f"{x.speedup:.2f}x" if x else "" for x in found))
        spreads = (f"{x.speedup_spread[0]:.2f} to {x.speedup_spread[1]:.2f}" if x else "" for x in found)
        yield Row("  its range", tuple(spreads))
        yield Row("  threads, batch", tuple(f"{x.threads}, {x.batch}" if x else "" for x in found))
    yield row("checks passed", lambda r: f"{sum(c.passed for c in r.checks)} of {len(r.checks)}")


def _metric(report: Report, metric: str, cell: Callable[..., str]) -> str:
    return cell(report.accuracy) if report.accuracy and report.accuracy.metric == metric else ""


def _layers(reports: Sequence[Report]) -> Iterator[Row]:
    """One row for each constraint's name, in the order of the reports; a mixed plan may have several of a layer."""
    shares = [{x.name: 1 - x.kept / x.groups for x in r.layers if x.groups} for r in reports]
    for name in dict.fromkeys(name for own in shares for name in own):
        yield Row(name, tuple(f"{own[name]:.1%}" if name in own else "" for own in shares))


def _notes(reports: Sequence[Report]) -> Iterator[str]:
    """Say what was not alike, so that figures of a row may not be compared."""
    conditions = (
        ("models", {r.model for r in reports}),
        ("metrics", {r.accuracy.metric for r in reports if r.accuracy}),
        ("processors", {str(r.environment.get("cpu", "")) for r in reports}),
        ("numbers of threads", {str(x.threads) for r in reports for x in r.latency}),
        ("batches", {str(x.batch) for r in reports for x in r.latency}),
    )
    for what, found in conditions:
        if len(found) > 1:
            yield f"these are of different {what}: {', '.join(sorted(found))}"


def _dense_point(name: str, report: Report) -> Point:
    return Point(
        name=f"{name}, dense",
        metric=report.accuracy.dense if report.accuracy else None,
        ms=report.latency[0].dense_ms.p50 if report.latency else None,
        is_dense=True,
    )


def _one_dense(points: Sequence[Point]) -> list[Point]:
    """Keep the first dense network alone: all builds began with it, or else a note says so."""
    dense = [p for p in points if p.is_dense]
    return [*dense[:1], *(p for p in points if not p.is_dense)]
