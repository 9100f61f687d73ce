"""A sweep's table on the terminal, and its page."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from rich.table import Table

from slrc.reporting import plots
from slrc.reporting.page import render
from slrc.reporting.tables import make_table
from slrc.sweep.summary import DENSE, DENSE_INT8, Row, State, Summary

TEMPLATE = "sweep.html.j2"


def sweep_table(found: Summary) -> Table:
    """The dense networks, then a line for each point; the recommended one is marked. It fits in 80 columns."""
    trained = trainings(found)
    table = make_table(f"{found.model} on {found.target}" + f": {trained[0]}" * (len(trained) == 1), "", "point")
    for name in (found.metric or "metric", "latency", "speed-up", "model file", "pruned"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    lines = dense_lines(found)
    for i, (name, (metric, ms, _, _, size, _), said) in enumerate(lines):
        table.add_row(str(i), name, metric, ms, "", size, "", said)
    for i, row in enumerate(found.rows, start=len(lines)):
        metric, ms, speedup, _, size, pruned = cells(row)
        table.add_row(str(i), row.name, metric, ms, speedup, size, pruned, remark(row, found.recommended))
    return table


def dense_lines(found: Summary) -> list[tuple[str, tuple[str, ...], str]]:
    """Return the lines of what was not pruned: a name, figures as of points, and what else is to be said."""
    dominated = {p.name for p in found.points if p.is_dominated}
    known = [(DENSE, found.dense)] + ([(DENSE_INT8, found.dense_int8)] if found.dense_int8 is not None else [])
    lines: list[tuple[str, tuple[str, ...], str]] = []
    for name, x in known:
        said = "recommended" if name == found.recommended else "dominated" if name in dominated - {DENSE} else ""
        lines.append((name, (_number(x.metric), _ms(x.ms), "", "", _mb(x.size_bytes), ""), said))
    return lines


def trainings(found: Summary) -> list[str]:
    """Return how points were trained: by which method, for how many epochs. One line where it was so for all."""
    done = {row.name: f"{row.method}, {_epochs(row)}" for row in found.rows if row.state is State.DONE}
    alike = set(done.values())
    return sorted(alike) if len(alike) == 1 else [f"{name}: {trained}" for name, trained in done.items()]


def sweep_notes(found: Summary) -> list[str]:
    """Return what speed-ups are over, how points were trained, what they started from, and why they failed.

    A line for each; none for what is usual, or the same for all.
    """
    notes = trained if len(trained := trainings(found)) > 1 else []
    notes += [f"{row.name} started from {row.start}" for row in found.rows if row.start]
    notes += [f"{row.name} failed: {row.why}" for row in found.rows if row.state is State.FAILED]
    return notes if found.dense_int8 is None else [f"speed-ups are those over {DENSE_INT8}", *notes]


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
    dense = dense_lines(found)
    rows = [(row, cells(row), remark(row, found.recommended)) for row in found.rows]
    notes, trained = sweep_notes(found), trainings(found)
    return render(TEMPLATE, found=found, pareto=pareto, dense=dense, rows=rows, notes=notes, trained=trained)


def _epochs(row: Row) -> str:
    return "no training" if not row.epochs else f"{row.epochs} epoch{'s' if row.epochs > 1 else ''}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} ms"


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.3f} MB"
