"""How the channel analysis grows with the size of the graph.

    python benchmarks/analysis_growth.py                     # what has no row yet, or one out of date
    python benchmarks/analysis_growth.py torchvision:resnet152 --again

Captures each model (random weights) and times `label_indices` on a program that nothing has been derived from yet: CPU
time of this process, the median of three. Prints a table, adds each row to `benchmarks/results/analysis_growth.json` as
it comes, and draws time against operators, with the slope of the line fitted to the logarithms: 1 is linear growth.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from results import Rows
from zoo import make

from slrc.ir.program import Program, capture
from slrc.passes.analysis.label_indices import label_indices
from slrc.reporting.plots import COMPILED, DENSE, GRID, INK, MUTED, STYLE

REPEATS = 3
MODELS = (
    *(f"torchvision:resnet{n}" for n in (18, 34, 50, 101, 152)),
    *(f"torchvision:densenet{n}" for n in (121, 161, 169, 201)),
    *(f"torchvision:efficientnet_b{n}" for n in range(8)),
    *("torchvision:swin_t", "torchvision:swin_b", "torchvision:vit_b_16", "torchvision:convnext_base"),
    *("torchvision:regnet_y_16gf", "torchvision:shufflenet_v2_x1_0", "torchvision:mobilenet_v2"),
    *("torchvision:mobilenet_v3_large", "torchvision:googlenet", "torchvision:maxvit_t"),
    *("timm:beit_base_patch16_224", "timm:hrnet_w18", "timm:hrnet_w48", "timm:volo_d1_224", "timm:volo_d3_224"),
    *("timm:xcit_small_12_p16_224", "timm:xcit_medium_24_p16_224", "timm:maxvit_base_tf_224"),
    *("timm:gcvit_tiny", "timm:coatnet_1_rw_224", "timm:mobilevitv2_100"),
)
LABELLED = ("resnet18", "resnet152", "densenet201", "swin_b", "vit_b_16", "mobilenet_v2")
# Mid-tones that read on a white and on a dark page.
PAGE = {INK: "#7a828c", MUTED: "#7a828c", GRID: "#8b949e55", DENSE: "#8b949e", COMPILED: "#2f81b7"}


def measure(name: str) -> dict[str, Any]:
    """Return one row: the size of the graph, and the CPU seconds that its analysis takes."""
    program = capture(*make(name), name)
    seconds = []
    for _ in range(REPEATS):
        fresh = Program(program.exported, program.example_inputs, name)
        operators = sum(1 for _ in fresh.nodes)
        gc.collect()
        started = time.process_time()
        labels = label_indices(fresh)
        seconds.append(time.process_time() - started)
    return {
        "operators": operators,
        "labels": len(labels.roots),
        "parameters": program.num_parameters,
        "groups": len(labels.groups),
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
    }


def slope(rows: list[dict[str, Any]], size: str) -> tuple[float, float]:
    """Return the exponent and the factor of `seconds = factor * size ** exponent`, fitted to the logarithms."""
    exponent, offset = np.polyfit(np.log([r[size] for r in rows]), np.log([r["seconds"] for r in rows]), 1)
    return float(exponent), float(np.exp(offset))


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw seconds against operators, on logarithmic scales, with the fitted line."""
    sizes = [r["operators"] for r in rows.values()]
    exponent, factor = slope(list(rows.values()), "operators")
    style = {k: PAGE.get(v, v) if isinstance(v, str) else v for k, v in STYLE.items()}
    with matplotlib.style.context(style, after_reset=True):
        figure = Figure(figsize=(640 / 72, 400 / 72), layout="constrained")
        axes = figure.subplots()
        ends = np.array([min(sizes), max(sizes)])
        label = f"fitted: seconds ∝ operators^{exponent:.2f}"
        axes.plot(ends, factor * ends**exponent, color=PAGE[DENSE], linestyle="--", linewidth=1.4, label=label)
        for source, marker in (("torchvision", "o"), ("timm", "D")):
            points = [(r["operators"], r["seconds"]) for n, r in rows.items() if n.startswith(source)]
            if points:
                axes.plot(*zip(*points, strict=True), color=PAGE[COMPILED], linestyle="", marker=marker, label=source)
        slowest = max(rows, key=lambda n: rows[n]["seconds"])
        for name, row in rows.items():
            short = name.partition(":")[2]
            if short in LABELLED or name == slowest:
                at, side = (row["operators"], row["seconds"]), "right" if row["operators"] > max(sizes) / 2 else "left"
                shift = (-6 if side == "right" else 6, -10)
                axes.annotate(short, at, shift, textcoords="offset points", ha=side, size=9)
        axes.set(xscale="log", yscale="log", xlabel="operators in the captured graph", ylabel="analysis, CPU seconds")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.minorticks_off()
        axes.legend(loc="upper left")
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure what is missing, print the table, write rows and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision:NAME or timm:NAME; all by default")
    parser.add_argument("--again", action="store_true", help="also models that have a row already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(__file__)
    print(f"{'model':36} {'operators':>9} {'labels':>9} {'groups':>7} {'seconds':>8} {'µs/operator':>12}")
    for name in args.models:
        row = rows.add(name, measure(name)) if args.again or not rows.has(name) else rows[name]
        per_operator = row["seconds"] / row["operators"] * 1e6
        print(
            f"{name:36} {row['operators']:9} {row['labels']:9} {row['groups']:7} {row['seconds']:8.3f} "
            f"{per_operator:12.0f}",
            flush=True,
        )
    if len(rows.rows) > 1:
        found = list(rows.rows.values())
        print(", ".join(f"seconds ∝ {size}^{slope(found, size)[0]:.2f}" for size in ("operators", "labels")))
        draw(rows.rows, rows.path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
