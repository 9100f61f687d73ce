"""A sweep's table on the terminal, and its page."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from rich.table import Table

from slrc.reporting import plots
from slrc.reporting.page import render
from slrc.reporting.tables import make_table
from slrc.sweep.summary import Row, State, Summary

TEMPLATE = "sweep.html.j2"


def sweep_table(found: Summary) -> Table:
    """The dense network, then a line for each point; the recommended one is marked. It fits in 80 columns."""
    table = make_table(f"{found.model} on {found.target}", "", "point")
    for name in (found.metric or "metric", "latency", "speed-up", "model file", "pruned"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    table.add_row("0", "dense", _number(found.dense_metric), _ms(found.dense_ms), "", _mb(found.dense_bytes), "", "")
    for i, row in enumerate(found.rows, start=1):
        metric, ms, speedup, _, size, pruned = cells(row)
        table.add_row(str(i), row.name, metric, ms, speedup, size, pruned, remark(row, found.recommended))
    return table


def sweep_notes(found: Summary) -> list[str]:
    """Return what points started from, where not from the dense weights, and why points failed, a line each."""
    started = [f"{row.name} started from {row.start}" for row in found.rows if row.start]
    return started + [f"{row.name} failed: {row.why}" for row in found.rows if row.state is State.FAILED]


def cells(row: Row) -> tuple[str, ...]:
    """Return a point's figures: metric, latency, speed-up, its range, size, share pruned."""
    spread = f"{row.speedup_spread[0]:.2f} to {row.speedup_spread[1]:.2f}" if row.speedup_spread else ""
    speedup = f"{row.speedup:.2f}x" if row.speedup is not None else ""
    pruned = f"{row.sparsity:.1%}" if row.sparsity is not None else ""
    return _number(row.metric), _ms(row.ms), speedup, spread, _mb(row.size_bytes), pruned


def remark(row: Row, recommended: str | None) -> str:
    """Return what is to be said of a point besides its figures."""
    if row.state is not State.DONE:
        return str(row.state)
    return "recommended" if row.name == recommended else "dominated" if row.is_dominated else ""


def write_sweep_page(found: Summary, path: Path) -> None:
    """Write the page, whole or not at all."""
    aside = path.with_suffix(".partial")
    aside.write_text(render_sweep(found), encoding="utf-8")
    aside.replace(path)


def render_sweep(found: Summary) -> str:
    """Return a self-contained page."""
    pareto = Markup(plots.pareto_plot(found.points, found.metric)) if found.metric else ""
    dense = (_number(found.dense_metric), _ms(found.dense_ms), "", "", _mb(found.dense_bytes), "")
    rows = [(row, cells(row), remark(row, found.recommended)) for row in found.rows]
    return render(TEMPLATE, found=found, pareto=pareto, dense=dense, rows=rows, notes=sweep_notes(found))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} ms"


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.3f} MB"
