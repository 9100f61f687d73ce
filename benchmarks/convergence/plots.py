"""A plot of what `convergence/run.py` has measured: accuracy over the length of runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from contenders import CONTENDERS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run import CASES, DEFAULT, EPOCHS

Result = Mapping[str, Any]
PALETTE = ("#d62728", "#1f77b4", "#aec7e8", "#2ca02c", "#98df8a", "#17becf", "#9edae5", "#9467bd", "#c5b0d5", "#ff7f0e")
COLORS = dict(zip(CONTENDERS, (*PALETTE, "#8c564b", "#e377c2", "#7f7f7f", "#000000"), strict=True))
BELOW, ABOVE = 8.0, 1.5
"""Points around the dense accuracy that are drawn."""


def draw(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], marker: str = "") -> None:
    """Draw a contender's line, the default's the widest."""
    axes.plot(x, y, color=COLORS[name], lw=2.2 if name == DEFAULT else 1.0, label=name, marker=marker, ms=3)


def explain(figure: Figure) -> None:
    """Put one legend under all panels."""
    entries = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in CONTENDERS if name in entries]
    if names:
        figure.legend([entries[n] for n in names], names, loc="outside lower center", ncols=4, fontsize=7)


def budgets(rows: Mapping[str, Result]) -> Figure:
    """Test accuracy at the end of whole runs, over their length."""
    network, pattern, sparsity = CASES[0]
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    dense: list[float] = []
    for name, row in rows.items():
        tier, at, case, _, epochs, _ = name.split("/")
        whole_run = tier == "budgets" or (tier == "small" and int(epochs) == EPOCHS)
        if whole_run and (at, case) == (network, f"{pattern}@{sparsity}") and row["contender"] != "dense":
            found[row["contender"]][int(epochs)].append(row["test"])
            dense.append(row["dense"])
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in reversed([n for n in CONTENDERS if n in found]):
        lengths = sorted(found[name])
        draw(axes, name, lengths, [statistics.fmean(found[name][e]) for e in lengths], "o")
    if dense:
        axes.axhline(dense[0], color="#888888", lw=0.8, ls=":")
        axes.set_ylim(dense[0] - BELOW, dense[0] + ABOVE)
    axes.set_xlabel("epochs of the run")
    axes.set_ylabel("accuracy, test, %")
    explain(figure)
    return figure


def write_plots(rows: Mapping[str, Result], folder: Path) -> None:
    """Write `convergence_budgets.svg`."""
    with matplotlib.style.context({"svg.hashsalt": "slrc", "svg.fonttype": "none", "font.size": 8}):
        budgets(rows).savefig(folder / "convergence_budgets.svg", metadata={"Date": None})
