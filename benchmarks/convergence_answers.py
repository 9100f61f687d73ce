"""Tables and plots of what `convergence.py` has measured.

    python benchmarks/convergence_answers.py

Reads `benchmarks/results/convergence.jsonl`, prints tables and writes them to `convergence.md` beside it, with
`convergence_curves.svg` and `convergence_residual.svg`. Accuracies are of test images, in percent, of a copy that was
hard-pruned without retraining and has batch-norm statistics of its own, unless said otherwise; seeds are averaged.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from convergence import METHODS, RESULTS, TIERS, read_rows
from matplotlib.figure import Figure

Result = dict[str, Any]
Case = tuple[str, str, str]
"""Tier, network, pattern@sparsity."""
RIVALS = [name for name in METHODS if name != "slr"]


class Results:
    """The rows by case and contender."""

    def __init__(self, rows: Iterable[Result]) -> None:
        self.rows: dict[Case, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            tier, network, case, contender, _ = row["row"].split("/")
            if "error" not in row:
                self.rows[tier, network, case][contender].append(row)

    def cases(self, tiers: Sequence[str]) -> Iterator[tuple[Case, dict[str, list[Result]]]]:
        """Yield the cases of some tiers in which SLR was run."""
        for case, by_name in sorted(self.rows.items(), key=lambda item: (TIERS.index(item[0][0]), item[0][1:])):
            if case[0] in tiers and "slr" in by_name:
                yield case, by_name

    def pairs(self, case: Case, rival: str) -> list[tuple[Result, Result]]:
        """Return SLR's and a rival's rows of the same seeds."""
        mine = {row["row"].rsplit("/", 1)[1]: row for row in self.rows[case]["slr"]}
        theirs = {row["row"].rsplit("/", 1)[1]: row for row in self.rows[case][rival]}
        return [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


def final(row: Result) -> float:
    """Return the accuracy at the end, with no retraining."""
    return float(row["final"]["hard_bn"])


def reached(row: Result, accuracy: float) -> float | None:
    """Return the epoch at which a row first had an accuracy; both on the images looked at while training."""
    return next((point["epoch"] for point in row["curve"] if point["hard_bn"] >= accuracy), None)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or nothing of nothing."""
    found = list(values)
    return statistics.fmean(found) if found else None


def number(value: float | None, digits: int = 1) -> str:
    """Print a number, or that there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def accuracy_table(results: Results) -> str:
    """Hard-pruned accuracy at equal sparsity, and how often SLR is ahead."""
    rows, wins = [], defaultdict(list)
    for case, by_name in results.cases(TIERS[1:4]):
        means = {name: mean(map(final, by_name[name])) for name in METHODS}
        best = max(value for value in means.values() if value is not None)
        cells = [f"**{number(v, 2)}**" if v == best else number(v, 2) for v in means.values()]
        dense = by_name["slr"][0]["dense"]
        rows.append([case[1], case[2], str(len(by_name["slr"])), number(dense, 2), *cells])
        for rival in RIVALS:
            wins[rival] += [final(a) >= final(b) for a, b in results.pairs(case, rival)]
    shares = [f"{sum(wins[n])} of {len(wins[n])}" if wins[n] else "–" for n in RIVALS]
    rows.append(["SLR at least as good", "", "", "", "", *shares])
    return table(["network", "pattern", "seeds", "dense", *METHODS], rows)


def epochs_table(results: Results) -> str:
    """Epochs until the accuracy is within 1 and 0.5 points of what the rival has at its end."""
    rows = []
    for rival in RIVALS:
        cells = [rival]
        for margin in (1.0, 0.5):
            ratios, never, count = [], 0, 0
            for case, _ in results.cases(TIERS[1:4]):
                for mine, theirs in results.pairs(case, rival):
                    goal = theirs["curve"][-1]["hard_bn"] - margin
                    own, other = reached(mine, goal), reached(theirs, goal)
                    count += 1
                    never += own is None
                    ratios.append(float("inf") if own is None or other is None else own / other)
            median = statistics.median(ratios) if ratios else None
            cells += [number(median, 2), f"{sum(r <= 1 / 3 for r in ratios)} of {count}", str(never)]
        rows.append(cells)
    head = ["rival", "within 1: epochs, ratio", "at most 1/3", "never"]
    return table([*head, "within 0.5: epochs, ratio", "at most 1/3", "never"], rows)


def share_of_run_table(results: Results) -> str:
    """The share of all epochs after which SLR is within a point of a rival's accuracy at its end."""
    rows = []
    for rival in RIVALS:
        shares = []
        for case, _ in results.cases(TIERS[1:4]):
            for mine, theirs in results.pairs(case, rival):
                own = reached(mine, theirs["curve"][-1]["hard_bn"] - 1.0)
                shares.append(float("inf") if own is None else own / mine["curve"][-1]["epoch"])
        if shares:
            rows.append(
                [rival, number(statistics.median(shares), 2), f"{sum(s <= 1 / 3 for s in shares)} of {len(shares)}"]
            )
    return table(["rival", "share of the epochs, median", "at most 1/3"], rows)


def retraining_table(results: Results) -> str:
    """Accuracy after masked retraining for some epochs."""
    rows = []
    for case, by_name in results.cases(("retraining",)):
        for name in METHODS:
            retrained = [row for row in by_name[name] if row["retrained"]]
            if retrained:
                after = [mean(row["retrained"][e] for row in retrained) for e in ("1", "3", "10")]
                zero = mean(map(final, retrained))
                gain = after[1] - zero if after[1] is not None and zero is not None else None
                rows.append([case[1], case[2], name, *(number(v, 2) for v in (zero, *after)), number(gain, 2)])
    return table(["network", "pattern", "method", "0 epochs", "1", "3", "10", "gain of 3"], rows)


def sparsity_table(results: Results) -> str:
    """The greatest sparsity that was tried with an accuracy within a point of the dense one."""
    best: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for (_, network, case), by_name in results.cases(TIERS[1:3]):
        pattern, sparsity = case.rsplit("@", 1)
        if pattern == "2:4":
            continue
        for name in METHODS:
            best[network, pattern].setdefault(name, 0.0)
            accuracy = mean(map(final, by_name[name]))
            if accuracy is not None and accuracy >= by_name[name][0]["dense"] - 1.0:
                best[network, pattern][name] = max(best[network, pattern][name], float(sparsity))
    rows = [[*key, *(f"{100 * found[n]:.0f} %" if found[n] else "–" for n in METHODS)] for key, found in best.items()]
    return table(["network", "pattern", *METHODS], rows)


def ablation_table(results: Results) -> str:
    """What each part of SLR's default gives, on the validation split."""
    cases = [case for case in results.rows if case[0] == "ablation"]
    names = list(dict.fromkeys(name for case in cases for name in results.rows[case]))

    def cells(get: Callable[[Case], list[Result]]) -> list[str]:
        found = [get(case) for case in cases]
        values = [mean(row["final"]["hard_bn_val"] for row in rows) for rows in found]
        early = [mean(row["curve"][3]["hard_bn"] for row in rows) for rows in found]
        known = [v for v in values if v is not None], [e for e in early if e is not None]
        return [*(number(v, 2) for v in values), number(mean(known[0]), 2), number(mean(known[1]), 2)]

    rows = [
        [name, *cells(lambda case, name=name: results.rows[case][name])] for name in sorted(names, key="slr".__ne__)
    ]
    return table(["setting", *(f"{c[1]} {c[2]}" for c in cases), "mean", "mean after 2 epochs (test)"], rows)


def cost_table(results: Results) -> str:
    """Time and memory, and what the conditions of acceptance said."""
    rows = []
    for name in METHODS:
        found = [row for _, by_name in results.cases(("small",)) for row in by_name[name]]
        if found:
            share = statistics.median(row["method_ms"] / row["step_ms"] for row in found)
            state = statistics.median(row["state_kb"] for row in found)
            steps = [point for row in found for point in row["history"]]
            accepted = f"{sum(p['accepted'] for p in steps) / (2 * len(steps)):.0%}" if steps else "–"
            residual = mean(row["history"][-1]["residual"] for row in found if row["history"])
            rows.append(
                [name, f"{share:.1%}", f"{state:.0f} KB", accepted if name == "slr" else "–", number(residual, 3)]
            )
    return table(["method", "share of a step's time", "state", "accepted", "residual at the end"], rows)


def plot_curves(results: Results, path: Path) -> None:
    """Hard-pruned accuracy over epochs for every case, SLR in front."""
    cases = [(case, by_name) for case, by_name in results.cases(TIERS[1:4])]
    columns = 4
    figure = Figure(figsize=(13, 2.6 * -(-len(cases) // columns)), layout="constrained")
    for i, (case, by_name) in enumerate(cases):
        axes = figure.add_subplot(-(-len(cases) // columns), columns, i + 1)
        for name in reversed(METHODS):
            if by_name[name]:
                points = list(zip(*(row["curve"] for row in by_name[name]), strict=True))
                heights = [mean(p["hard_bn"] for p in at) for at in points]
                width = 2.2 if name == "slr" else 1.0
                axes.plot([at[0]["epoch"] for at in points], heights, color=COLORS[name], lw=width, label=name)
        dense = by_name["slr"][0]["dense"]
        axes.axhline(dense, color="#888888", lw=0.8, ls=":")
        axes.set_title(f"{case[1]}, {case[2]}", fontsize=8)
        axes.set_ylim(max(0, dense - 25), dense + 2)
    if cases:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), fontsize=8
        )
    figure.supxlabel("epoch", fontsize=8)
    figure.supylabel("accuracy, hard-pruned, %", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def plot_residual(results: Results, path: Path) -> None:
    """‖W − Z‖ over the updates, relative to the first."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name in ("admm-rising", "admm", "slr"):
        found = [row["history"] for _, by_name in results.cases(("small",)) for row in by_name[name]]
        if found:
            relative = zip(*([p["residual"] / h[0]["residual"] for p in h] for h in found), strict=True)
            axes.plot(
                range(1, len(found[0]) + 1), [statistics.median(r) for r in relative], color=COLORS[name], label=name
            )
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel("‖W − Z‖ over the first, median")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


COLORS = dict(
    zip(METHODS, ("#d62728", "#1f77b4", "#17becf", "#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"), strict=True)
)
SECTIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("Hard-pruned accuracy without retraining", accuracy_table),
    ("Epochs to come near a rival's final accuracy, over the rival's own", epochs_table),
    ("Share of the run after which SLR is within 1 point of a rival's final accuracy", share_of_run_table),
    ("After masked retraining", retraining_table),
    ("Greatest sparsity within 1 point of dense", sparsity_table),
    ("Parts of the default, and its sensitivity (validation images)", ablation_table),
    ("Cost, acceptance, residual", cost_table),
)


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    args = parser.parse_args()
    results = Results(read_rows(args.rows).values())
    text = "# Convergence\n\nMade by `python benchmarks/convergence_answers.py`; see there what the words mean.\n"
    for title, make in SECTIONS:
        text += f"\n## {title}\n\n{make(results)}"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "convergence.md").write_text(text)
    with matplotlib.style.context({"svg.hashsalt": "slrc", "svg.fonttype": "none", "font.size": 8}):
        plot_curves(results, args.out / "convergence_curves.svg")
        plot_residual(results, args.out / "convergence_residual.svg")


if __name__ == "__main__":
    main()
