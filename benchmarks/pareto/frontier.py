"""A plot and a table of what `train.py` trained, `latency.py` timed and `int8.py` rounded: accuracy over latency.

python benchmarks/pareto/frontier.py     # writes benchmarks/results/pareto.svg
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from networks import ALLOCATED, FOR_INT8, TORCH_PRUNING, UNIFORM

sys.path.insert(1, str(Path(__file__).parents[1]))
from results import FOLDER, Row, file_of, rows_of

STYLES = {
    "auto": ("#d62728", "o-"),
    "auto, by energy": ("#ff9896", "o-"),
    "auto, gradual": ("#ff7f0e", "o-"),
    "block:8x1": ("#1f77b4", "o-"),
    "channel": ("#2ca02c", "o-"),
    "uniform block:8x1": ("#1f77b4", "s:"),
    "uniform block:8x1, gradual": ("#aec7e8", "s:"),
    "uniform channel": ("#2ca02c", "s:"),
    TORCH_PRUNING: ("#9467bd", "^--"),
    "smaller": ("#7f7f7f", "D--"),
    "dense, int8": ("#000000", "*"),
    "auto, int8": ("#d62728", "o:"),
    "auto, for int8": ("#d62728", "s-"),
    "block:8x1, int8": ("#1f77b4", "o:"),
    "smaller, int8": ("#7f7f7f", "D:"),
}
"""What is drawn, in which colour and line; what is rounded is hollow."""
INT8 = ", int8"
"""What the name of a contender ends with that was rounded."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of a 95% interval, by the number of seeds."""


@dataclass(frozen=True)
class Point:
    """A contender at a share of the dense latency, over seeds: all in percent, times in milliseconds."""

    network: str
    contender: str
    asked: float | None
    share: float
    ms: float
    dense: float
    tests: tuple[float, ...]

    @property
    def test(self) -> float:
        """The mean accuracy on test images."""
        return statistics.fmean(self.tests)

    @property
    def interval(self) -> float | None:
        """Half of its 95% interval; `None` of one seed."""
        if (n := len(self.tests)) not in STUDENT:
            return None
        return STUDENT[n] * statistics.stdev(self.tests) / math.sqrt(n)


def points() -> Iterator[Point]:
    """Yield what was both trained and timed, and what was rounded, networks and contenders in order."""
    times = rows_of(file_of("pareto_latency"))
    found: dict[tuple[str, str, float | None], list[tuple[Row, Row]]] = defaultdict(list)
    for name, row in rows_of(file_of("pareto")).items():
        if name in times:
            found[row["network"], row["contender"], row["share"]].append((row, times[name]))
    for row in rows_of(file_of("pareto_int8")).values():
        name = row["contender"] if row["contender"].endswith(FOR_INT8) else f"{row['contender']}{INT8}"
        found[row["network"], name, row["asked"]].append((row, row))
    for (network, contender, asked), pairs in sorted(found.items(), key=lambda item: item[0][0]):
        yield Point(
            network,
            contender,
            asked,
            share=100 * statistics.fmean(time["share"] for _, time in pairs),
            ms=statistics.fmean(time["ms"] for _, time in pairs),
            dense=pairs[0][0]["dense"],
            tests=tuple(row["test"] for row, _ in pairs),
        )


def kind_of(contender: str) -> str:
    """Return the style that a contender is drawn in; what has none is not drawn."""
    name = contender.removesuffix(INT8)
    known = (*ALLOCATED, *UNIFORM, TORCH_PRUNING, "dense")
    return contender if name in known else contender.replace(name, "smaller")


def draw(found: list[Point]) -> Figure:
    """Return the plot: a panel for each network."""
    networks = list(dict.fromkeys(p.network for p in found))
    figure = Figure(figsize=(3.2 * max(1, len(networks)), 3.4), layout="constrained")
    for axes, network in zip(figure.subplots(1, max(1, len(networks)), squeeze=False)[0], networks, strict=False):
        mine = [p for p in found if p.network == network]
        for kind, (color, style) in STYLES.items():
            line = sorted((p for p in mine if kind_of(p.contender) == kind), key=lambda p: p.share)
            if line:
                label = kind.replace("smaller", "smaller dense networks")
                hollow = {"mfc": "none"} if kind.endswith((INT8, FOR_INT8)) else {}
                errors = [p.interval or 0.0 for p in line]
                where = [p.share for p in line], [p.test for p in line]
                axes.errorbar(*where, errors, fmt=style, color=color, label=label, ms=4, **hollow)
        axes.plot(100, mine[0].dense, "k*", label="dense")
        axes.set_title(network)
        axes.set_xlabel("latency, % of dense")
        axes.set_ylabel("accuracy, test, %")
    entries: Mapping[str, Any] = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=7)
    return figure


if __name__ == "__main__":
    with matplotlib.style.context({"svg.hashsalt": "slrc", "svg.fonttype": "none", "font.size": 8}):
        draw(list(points())).savefig(FOLDER / "pareto.svg", metadata={"Date": None})
