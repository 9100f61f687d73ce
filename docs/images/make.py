"""The picture of the README, drawn from a report.

    make demo && python docs/images/make.py build/digits

Reads `report.json` in the folder that `slrc compile` wrote, and writes `before_after.svg` beside this file: accuracy,
parameters and latency of the dense and of the compiled model, each pair on a scale of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slrc.reporting.plots import STYLE
from slrc.reporting.report import Report

PICTURE = Path(__file__).with_name("before_after.svg")
# Mid-tones that read on a white and on a dark page.
INK, DENSE, COMPILED = "#7a828c", "#8b949e", "#2f81b7"
SIZE_IN = (9.0, 1.9)


def draw(report: Report, path: Path) -> None:
    """Write the picture: one panel for each of accuracy, parameters and latency."""
    assert report.accuracy is not None, "the picture needs a model that was evaluated"
    accuracy, latency = report.accuracy, report.latency[0]
    faster = f"{latency.speedup:.1f}× as fast"
    panels = (
        (accuracy.metric, accuracy.dense, accuracy.final, "{:.1%}", ""),
        ("parameters", report.params.dense, report.params.compiled, "{:,.0f}", ""),
        ("milliseconds a run", latency.dense_ms.p50, latency.compiled_ms.p50, "{:.3f}", faster),
    )
    style = {k: v for k, v in STYLE.items() if "color" not in k} | {"text.color": INK, "svg.hashsalt": "slrc"}
    with matplotlib.style.context(style, after_reset=True):
        figure = Figure(figsize=SIZE_IN, layout="constrained", facecolor="none")
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            draw_panel(axes, *panel)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_panel(axes: Axes, title: str, dense: float, compiled: float, words: str, remark: str) -> None:
    """Draw two bars, dense over compiled, each with its value."""
    remark = remark or (f"{compiled / dense - 1:+.0%}".replace("-", "−") if abs(compiled / dense - 1) > 0.01 else "")
    for place, (value, color) in enumerate(((dense, DENSE), (compiled, COMPILED))):
        axes.barh(place, value, height=0.7, color=color)
        text = words.format(value) + (f"  ({remark})" if remark and place else "")
        inside = value > 0.7 * max(dense, compiled)
        axes.annotate(
            text,
            (value, place),
            (-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else INK,
        )
    axes.set_yticks([0, 1], ["dense", "compiled"], color=INK)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.set_title(title, color=INK, loc="left", fontsize=11)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `slrc compile --out` wrote")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    draw(Report.load(args.folder), args.out)


if __name__ == "__main__":
    main()
