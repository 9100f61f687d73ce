"""The picture of the README, drawn from the first row of its table.

    python benchmarks/front_page.py --only 1 && python docs/images/make.py

Reads `benchmarks/results/front_page.json` and writes `before_after.svg` beside this file: accuracy, parameters and
latency of the dense and of the compiled model, each pair on a scale of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slrc.reporting.plots import STYLE

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from front_page import CASES
from results import file_of, rows_of

PICTURE = Path(__file__).with_name("before_after.svg")
# Mid-tones that read on a white and on a dark page.
INK, DENSE, COMPILED = "#7a828c", "#8b949e", "#2f81b7"
SIZE_IN = (9.0, 1.9)
Panel = tuple[str, float, float, str, str]
"""A title, two values, how they are written, and a remark on the second."""


def panels(row: dict[str, Any]) -> tuple[Panel, ...]:
    """Return what a row says of accuracy, parameters and latency."""
    accuracy, params = row["accuracy"], row["params"]
    fewer = f"−{1 - params['compiled'] / params['dense']:.0%}"
    return (
        (accuracy["metric"], accuracy["dense"], accuracy["final"], "{:.1%}", ""),
        ("parameters", params["dense"], params["compiled"], "{:,.0f}", fewer),
        ("milliseconds a run", row["dense_ms"], row["compiled_ms"], "{:.3f}", f"{row['speedup']:.1f}× as fast"),
    )


def draw(row: dict[str, Any], path: Path) -> None:
    """Write the picture of a row: one panel for each of its figures."""
    style = {k: v for k, v in STYLE.items() if "color" not in k} | {"text.color": INK, "svg.hashsalt": "slrc"}
    with matplotlib.style.context(style, after_reset=True):
        figure = Figure(figsize=SIZE_IN, layout="constrained", facecolor="none")
        drawn = panels(row)
        for axes, panel in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
            draw_panel(axes, panel)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw two bars, dense over compiled, each with its value."""
    title, dense, compiled, words, remark = panel
    for place, (value, color) in enumerate(((dense, DENSE), (compiled, COMPILED))):
        axes.barh(place, value, height=0.7, color=color)
        inside = value > 0.7 * max(dense, compiled)
        axes.annotate(
            words.format(value) + (f"  ({remark})" if remark and place else ""),
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
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    draw(rows_of(file_of("front_page"))[CASES[0].command], args.out)


if __name__ == "__main__":
    main()
