"""The report's plots as inline SVG.

Every plot is the same bytes for the same data. Text stays text, and colours are the page's CSS variables, so that one
drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter, SymmetricalLogLocator

if TYPE_CHECKING:
    from slrc.measuring.timing import Latency
    from slrc.methods.base import Iteration
    from slrc.reporting.pareto import Point
    from slrc.reporting.report import LayerSparsity
    from slrc.training.checkpoints import EpochRecord

# matplotlib knows only fixed colours: each stands in for a variable of the page's style sheet.
COLORS = tuple(f"#0101{i:02x}" for i in range(7))
INK, MUTED, GRID, DENSE, COMPILED, HARD, PRUNED = COLORS
VARIABLES = ("--ink", "--muted", "--line", "--dense", "--compiled", "--hard", "--pruned")
WIDTH = 480  # units of the view box, which are those of the font sizes
ROWS_PER_PLOT = 40
LONGEST_NAME = 28
PARETO_MARKERS = ("o", "s", "^", "v", "P")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slrc",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
}


def training_plot(curve: Sequence[EpochRecord], metric: str, dense: float | None) -> str:
    """Draw metric and loss over epochs, the phases one after another; empty where there is neither."""
    metrics = any(r.metric is not None or r.hard_pruned is not None for r in curve)
    losses = any(r.loss is not None for r in curve)
    if not metrics and not losses:
        return ""
    with matplotlib.style.context(STYLE, after_reset=True):
        ratios = ([1.6] if metrics else []) + ([1.0] if losses else [])
        figure = _figure(60 + 130 * sum(ratios))
        rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        epochs, phases = _epochs(curve)
        if metrics:
            _draw_metric(rows[0], epochs, curve, metric, dense)
            figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        if losses:
            rows[-1].plot(epochs, _values([r.loss for r in curve]), color=INK, marker="o", markersize=3, clip_on=False)
            rows[-1].set_ylabel("training loss")
            rows[-1].set_ylim(bottom=min(0.0, rows[-1].get_ylim()[0]))
        for i, (name, start) in enumerate(phases):
            for axes in rows if i else ():
                axes.axvline(start, color=MUTED, linewidth=1, linestyle=":")
            _write(rows[0], name, (start, 1), (3 if i else 0, 3), "data", "axes fraction", color=MUTED)
        rows[-1].set_xlabel("epoch")
        rows[-1].set_xlim(min(epochs), max(max(epochs), min(epochs) + 1))
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        for axes in rows:
            axes.margins(y=0.06)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        figure.align_ylabels(list(rows))
        drawn = " and ".join([metric] * metrics + ["training loss"] * losses)
        return _svg(figure, "training", f"{drawn} over {max(epochs)} epochs")


def layers_plots(layers: Sequence[LayerSparsity]) -> list[str]:
    """Draw kept and pruned shares of each constraint, in as many plots of equal length as are readable."""
    count = math.ceil(len(layers) / ROWS_PER_PLOT)
    size = math.ceil(len(layers) / count) if count else 1
    return [_layers_plot(layers[i : i + size], i + 1, size) for i in range(0, len(layers), size)]


def latency_plot(latency: Sequence[Latency]) -> str:
    """Draw dense and compiled bars for each target, each on its own scale; empty where nothing was measured."""
    if not latency:
        return ""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = _figure(44 + 108 * len(latency))
        rows = figure.subplots(len(latency), 1, squeeze=False)[:, 0]
        for axes, x in zip(rows, latency, strict=True):
            _draw_latency(axes, x)
        rows[-1].set_xlabel("milliseconds per run")
        handles = [
            Patch(color=DENSE, label="dense, p50"),
            Patch(color=COMPILED, label="compiled, p50"),
            Line2D([], [], color=INK, marker="|", markersize=11, markeredgewidth=1.8, linewidth=1, label="p90"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        return _svg(figure, "latency", "latency of the dense and of the compiled model, p50 and p90")


def pareto_plot(points: Sequence[Point], metric: str) -> str:
    """Draw a metric against milliseconds, numbered as the table is; empty where fewer than two have both.

    Dominated points are grey, the others joined; the dense network, which is number 0, is a diamond.
    """
    drawn = [(i, p, (p.ms, p.metric)) for i, p in enumerate(points) if p.ms is not None and p.metric is not None]
    if len(drawn) < 2:
        return ""
    kinds = list(dict.fromkeys(p.kind for _, p, _ in drawn if not p.is_dense))
    marker_of = {kind: PARETO_MARKERS[i % len(PARETO_MARKERS)] for i, kind in enumerate(kinds)}
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = _figure(330)
        axes = figure.subplots()
        front = sorted(place for _, p, place in drawn if not p.is_dominated)
        axes.plot([x for x, _ in front], [y for _, y in front], color=COMPILED, linewidth=1.2, zorder=1)
        for i, p, (x, y) in drawn:
            color = INK if p.is_dense else MUTED if p.is_dominated else COMPILED
            style: dict[str, Any] = {
                "markersize": 7,
                "color": color,
                "markerfacecolor": "none" if p.is_dominated else color,
            }
            axes.plot([x], [y], linestyle="", marker="D" if p.is_dense else marker_of[p.kind], **style)
            _write(axes, str(i), (x, y), (5, -11), color=color)  # below the line, which rises
        axes.set_xlim(left=0)
        axes.margins(x=0.08, y=0.12)
        axes.set_xlabel("milliseconds per run")
        axes.set_ylabel(metric)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        handles = [Line2D([], [], linestyle="", marker="D", color=INK, markersize=7, label="dense")]
        handles += [
            Line2D([], [], linestyle="", marker=marker, color=COMPILED, markersize=7, label=_shorten(kind))
            for kind, marker in marker_of.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
        return _svg(figure, "pareto", f"{metric} against milliseconds of {len(drawn)} networks")


def history_plot(history: Sequence[Iteration], has_conditions: bool) -> str:
    """Draw Lagrangian, residual and step size over outer iterations; empty where there are none.

    Args:
        history: the iterations.
        has_conditions: whether the method has acceptance conditions, to be marked.
    """
    if not history:
        return ""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = _figure(390)
        rows = figure.subplots(3, 1, sharex=True)
        k = [r.k for r in history]
        lagrangian = [r.lagrangian for r in history]
        _draw_history(rows[0], k, lagrangian, [r.accepted_loss for r in history] if has_conditions else None)
        scale = _scale_signed(rows[0], lagrangian)
        rows[0].set_ylabel(f"Lagrangian{scale}")
        residual = [r.residual for r in history]
        _draw_history(rows[1], k, residual, [r.accepted_projection for r in history] if has_conditions else None)
        rows[1].set_ylabel("residual ‖W − Z‖")
        rows[1].set_ylim(bottom=0)
        rows[1].yaxis.set_major_locator(MaxNLocator(nbins=4))
        _draw_history(rows[2], k, [r.step_size for r in history], None)
        _scale_log(rows[2], [r.step_size for r in history])
        rows[2].set_ylabel("step size (log)")
        rows[2].set_xlabel("outer iteration")
        rows[2].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        figure.align_ylabels(list(rows))
        if has_conditions:
            handles = [
                Line2D([], [], color=COMPILED, marker="o", label="condition accepted"),
                Line2D([], [], color=HARD, linestyle="", marker="X", markersize=7, label="condition rejected"),
            ]
            figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return _svg(figure, "history", f"Lagrangian, residual and step size over {len(history)} outer iterations")


def _epochs(curve: Sequence[EpochRecord]) -> tuple[list[int], list[tuple[str, int]]]:
    """Return epochs counted through all phases, and where each phase starts."""
    epochs: list[int] = []
    phases = []
    for name, records in groupby(curve, key=lambda r: r.phase):
        before = epochs[-1] if epochs else 0
        phases.append((name, before))
        epochs.extend(before + r.epoch for r in records)
    return epochs, phases


def _draw_metric(
    axes: Axes, epochs: Sequence[int], curve: Sequence[EpochRecord], metric: str, dense: float | None
) -> None:
    if dense is not None:
        axes.axhline(dense, color=DENSE, linewidth=1.4, linestyle="--", label="dense")
    live, hard = [r.metric for r in curve], [r.hard_pruned for r in curve]
    axes.plot(epochs, _values(live), color=COMPILED, marker="o", label="live model", clip_on=False)
    if any(x is not None for x in hard):
        style: dict[str, Any] = {"marker": "D", "markersize": 3, "linewidth": 1.1, "linestyle": (0, (4, 2))}
        axes.plot(epochs, _values(hard), color=HARD, label="hard-pruned copy", clip_on=False, **style)
    axes.set_ylabel(metric)


def _layers_plot(layers: Sequence[LayerSparsity], first: int, rows: int) -> str:
    """Draw one column of bars, `rows` high so that columns side by side match."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = _figure(62 + 16 * max(rows, 3))
        axes = figure.subplots()
        kept = [x.kept / x.groups if x.groups else 1.0 for x in layers]
        y = range(len(layers))
        axes.barh(y, kept, height=0.72, color=COMPILED, label="kept")
        axes.barh(y, [1 - x for x in kept], left=kept, height=0.72, color=PRUNED, label="pruned")
        for i, share in enumerate(kept):
            _write(axes, f"{1 - share:.1%}", (1, i), (42, 0), va="center", ha="right", fontsize=10)
        axes.set_yticks(y, [_shorten(x.name) for x in layers], fontsize=10)
        axes.set_ylim(max(rows, 3) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("share of groups; at the right: pruned")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        last = first + len(layers) - 1
        return _svg(figure, f"layers-{first}", f"kept and pruned shares of constraints {first} to {last}")


def _draw_latency(axes: Axes, x: Latency) -> None:
    widest = max(x.dense_ms.p90, x.compiled_ms.p90, x.dense_ms.p50, x.compiled_ms.p50)
    for i, (times, color) in enumerate(((x.dense_ms, DENSE), (x.compiled_ms, COMPILED))):
        axes.barh(i, times.p50, height=0.66, color=color)
        axes.plot([times.p50, times.p90], [i, i], color=INK, linewidth=1)
        axes.plot(times.p90, i, color=INK, marker="|", markersize=16, markeredgewidth=1.8)
        text = f"p50 {times.p50:.3f}, p90 {times.p90:.3f}"
        _write(axes, text, (max(times.p50, times.p90), i), (7, 0), va="center")
    axes.set_yticks([0, 1], ["dense", "compiled"])
    axes.set_ylim(1.6, -0.6)
    axes.set_xlim(0, widest * 1.8 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(visible=False, axis="y")
    threads = f"{x.threads} thread{'s' if x.threads != 1 else ''}"
    axes.set_title(f"{x.target}, {threads}, batch {x.batch}", loc="left", fontsize=11, color=MUTED, pad=4)


def _draw_history(axes: Axes, k: Sequence[int], values: Sequence[float], accepted: Sequence[bool] | None) -> None:
    axes.plot(k, values, color=COMPILED, linewidth=1.4)
    states = accepted if accepted is not None else ()
    size = 4 if len(k) <= 60 else 2.5
    for state, marker, color, scale in ((True, "o", COMPILED, 1.0), (False, "X", HARD, 1.8)):
        points = [(a, b) for a, b, s in zip(k, values, states, strict=False) if s is state]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, markersize=size * scale, color=color)


def _scale_signed(axes: Axes, values: Sequence[float]) -> str:
    """Choose a scale for values that may span decades and change sign; return what to say of it."""
    sizes = sorted(abs(x) for x in values if x and math.isfinite(x))
    if not sizes or sizes[-1] < 20 * sizes[len(sizes) // 2]:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        return ""
    if min(values) > 0:
        _scale_log(axes, values)
        return " (log)"
    threshold = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 4]))
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.minorticks_off()
    return "\n(symmetric log)"


def _scale_log(axes: Axes, values: Sequence[float]) -> None:
    """Scale by decades, over at least a factor of four so that a tick is always in sight."""
    positive = [x for x in values if x > 0 and math.isfinite(x)]
    if not positive:
        return
    low, high = min(positive), max(positive)
    widen = max(1.15, math.sqrt(4 * low / high))
    axes.set_yscale("log")
    axes.set_ylim(low / widen, high * widen)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.minorticks_off()


def _write(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int],
    x: str = "data", y: str = "data", **style: Any,
) -> None:  # fmt: skip
    axes.annotate(text, at, offset, xycoords=(x, y), textcoords="offset points", annotation_clip=False, **style)


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}".replace("-", "−")


def _values(values: Sequence[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in values]


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def _svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure for a page: no prolog, ids of its own, the page's colours and font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _, opening, body = re.split(r"(<svg [^>]*>)", buffer.getvalue(), maxsplit=1)
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r'\bfont: [^;"]*?([\d.]+px)[^;"]*', r"font-size: \1", body)  # as matplotlib < 3.10 writes it
    body = re.sub(r'\bfont-family: [^;"]*(; )?', "", body)
    for color, variable in zip(COLORS, VARIABLES, strict=True):
        body = body.replace(color, f"var({variable})")
    box = re.findall(r'viewBox="[^"]*"', opening)
    return f'<svg role="img" aria-label="{escape(label)}" {box[0]}>' + re.sub(r"\n\s*", "\n", body)
