"""Plots of what `convergence.py` has measured: one for each question."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from reading import (
    BUDGETED,
    COMPARED,
    EPOCHS_OF_RUNS,
    PACED,
    RIVALS,
    Results,
    final,
    mean,
    ratio_of_epochs,
    share_of_run,
)
from run import METHODS

COLORS = dict(
    zip(METHODS, ("#d62728", "#1f77b4", "#17becf", "#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"), strict=True)
)
ACROSS = 4
"""Panels in a row."""


def draw(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], marker: str = "") -> None:
    """Draw a method's line, SLR's the widest."""
    axes.plot(x, y, color=COLORS[name], lw=2.2 if name == "slr" else 1.0, label=name, marker=marker, ms=3)


def panels(titles: Sequence[str], x: str, y: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each title."""
    across = min(ACROSS, len(titles))
    down = -(-len(titles) // ACROSS)
    figure = Figure(figsize=(1.0 + 3.0 * across, 0.6 + 2.6 * down), layout="constrained")
    every = [figure.add_subplot(down, across, i + 1) for i in range(len(titles))]
    for axes, title in zip(every, titles, strict=True):
        axes.set_title(title, fontsize=8)
    for axes in every[-across:]:
        axes.set_xlabel(x)
    figure.supylabel(y, fontsize=8)
    return figure, every


def explain(figure: Figure) -> None:
    """Put one legend under all panels."""
    entries = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if entries:
        names = [name for name in METHODS if name in entries]
        lines = [entries[name] for name in names]
        figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=8)


def curves(results: Results) -> Figure:
    """Hard-pruned accuracy over epochs."""
    cases = list(results.cases(COMPARED))
    titles = [f"{case[1]}, {case[2]}" for case, _ in cases]
    figure, every = panels(titles, "epoch", "accuracy, hard-pruned, %")
    for axes, (_, by_name) in zip(every, cases, strict=True):
        for name in reversed(METHODS):
            if by_name[name]:
                points = list(zip(*(row["curve"] for row in by_name[name]), strict=True))
                heights = [statistics.fmean(p["hard_bn"] for p in at) for at in points]
                draw(axes, name, [at[0]["epoch"] for at in points], heights)
        dense = by_name["slr"][0]["dense"]
        axes.axhline(dense, color="#888888", lw=0.8, ls=":")
        axes.set_ylim(max(0, dense - 25), dense + 2)
    explain(figure)
    return figure


def sparsity(results: Results) -> Figure:
    """Hard-pruned accuracy over sparsity, and a point below dense."""
    found = {key: value for key, value in results.sparsities().items() if len(value["slr"]) > 1}
    dense = results.dense()
    titles = [", ".join(key) for key in found]
    figure, every = panels(titles, "sparsity; dotted: a point below dense", "accuracy, hard-pruned, %")
    for axes, ((network, _), by_method) in zip(every, found.items(), strict=True):
        for name in reversed(METHODS):
            if name in by_method:
                at = sorted(by_method[name])
                draw(axes, name, at, [by_method[name][s] for s in at], "o")
        axes.axhline(dense[network] - 1, color="#888888", lw=0.8, ls=":")
        axes.set_ylim(max(0, dense[network] - 25), dense[network] + 2)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    explain(figure)
    return figure


def epochs(results: Results) -> Figure:
    """How soon SLR is within a point of a rival's end: pairs of rows, sorted."""
    titles = ["share of all epochs", "over the rival's own epochs to there"]
    figure, every = panels(titles, "epochs to within a point of a rival's final accuracy", "share of pairs")
    for axes, ratio in zip(every, (share_of_run, ratio_of_epochs), strict=True):
        for name in reversed(RIVALS):
            values = sorted(ratio(*pair, 1.0) for pair in results.pairs(name, PACED))
            if values:
                axes.step(
                    values,
                    [(i + 1) / len(values) for i in range(len(values))],
                    color=COLORS[name],
                    label=name,
                    where="post",
                )
        axes.axvline(1 / 3, color="#888888", lw=0.8, ls=":")
        axes.set_xlim(0, 2)
    explain(figure)
    return figure


def budgets(results: Results) -> Figure:
    """Accuracy at the end of whole runs, over their epochs."""
    cases = list(results.budgets())
    titles = [f"{case[1]}, {case[2]}" for case, _ in cases]
    y = "accuracy, hard-pruned, %; dotted: a point below ADMM's longest run"
    figure, every = panels(titles, "epochs of the run", y)
    for axes, (_, by_name) in zip(every, cases, strict=True):
        for name in reversed(BUDGETED):
            runs = by_name[name].values()
            if runs:
                ends = [statistics.fmean(final(run[epochs]) for run in runs) for epochs in EPOCHS_OF_RUNS]
                draw(axes, name, EPOCHS_OF_RUNS, ends, "o")
                if name == "admm":
                    axes.axhline(ends[-1] - 1, color="#888888", lw=0.8, ls=":")
        top = max(final(run[EPOCHS_OF_RUNS[-1]]) for run in by_name["slr"].values())
        axes.set_ylim(max(0, top - 25), top + 2)
    explain(figure)
    return figure


def retraining(results: Results) -> Figure:
    """Accuracy over epochs of masked retraining."""
    cases = list(results.cases(("retraining",)))
    figure, every = panels([f"{case[1]}, {case[2]}" for case, _ in cases], "epochs of masked retraining", "accuracy, %")
    for axes, (_, by_name) in zip(every, cases, strict=True):
        for name in reversed(METHODS):
            rows = by_name[name]
            if rows:
                after = {int(e): statistics.fmean(row["retrained"][e] for row in rows) for e in rows[0]["retrained"]}
                draw(axes, name, [0, *after], [statistics.fmean(map(final, rows)), *after.values()], "o")
        dense = by_name["slr"][0]["dense"]
        axes.axhline(dense, color="#888888", lw=0.8, ls=":")
        axes.set_ylim(dense - 8, dense + 1)
    explain(figure)
    return figure


def sensitivity(results: Results) -> Figure:
    """What changes when one part of SLR's default does: accuracy on validation images less the default's."""
    cases = [(case, by_name) for case, by_name in results.cases(("ablation",))]
    names = list(dict.fromkeys(name for _, by_name in cases for name in by_name if name != "slr"))[::-1]
    figure = Figure(figsize=(8, 0.3 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    marks = dict(zip((case for case, _ in cases), "osD^v<>", strict=False))
    for case, by_name in cases:
        default = statistics.fmean(row["final"]["hard_bn_val"] for row in by_name["slr"])
        points = {n: mean(row["final"]["hard_bn_val"] - default for row in by_name[n]) for n in names}
        known = {n: p for n, p in points.items() if p is not None}
        axes.plot([*known.values()], [names.index(n) for n in known], marks[case], ms=4, label=f"{case[1]}, {case[2]}")
    axes.set_yticks(range(len(names)), [name.removeprefix("slr: ") for name in names])
    axes.axvline(0, color="#888888", lw=0.8, ls=":")
    axes.set_xlabel("accuracy less that of the default, points")
    if cases:
        axes.legend(fontsize=7)
    return figure


def residual(results: Results) -> Figure:
    """‖W − Z‖ over the updates, and how often the conditions of acceptance held."""
    figure, (norms, accepted) = panels(["‖W − Z‖ over the first, median", "conditions that held"], "update", "")
    for name in ("admm-rising", "admm", "slr"):
        found = [row["history"] for _, by_name in results.cases(("small",)) for row in by_name[name]]
        if found:
            steps = list(zip(*found, strict=True))
            at = range(1, len(steps) + 1)
            relative = zip(*([p["residual"] / h[0]["residual"] for p in h] for h in found), strict=True)
            draw(norms, name, at, [statistics.median(r) for r in relative])
            if name == "slr":
                draw(accepted, name, at, [statistics.fmean(p["accepted"] / 2 for p in step) for step in steps])
    norms.set_yscale("log")
    accepted.set_ylim(0, 1.05)
    accepted.yaxis.set_major_formatter(PercentFormatter(1.0))
    explain(figure)
    return figure


PLOTS: tuple[Callable[[Results], Figure], ...] = (curves, sparsity, epochs, budgets, retraining, sensitivity, residual)


def write_plots(results: Results, folder: Path) -> None:
    """Write `convergence_NAME.svg` for each plot."""
    with matplotlib.style.context({"svg.hashsalt": "slrc", "svg.fonttype": "none", "font.size": 8}):
        for plot in PLOTS:
            plot(results).savefig(folder / f"convergence_{plot.__name__}.svg", metadata={"Date": None})
