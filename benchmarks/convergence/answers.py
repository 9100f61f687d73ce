"""Tables and plots of what `convergence.py` has measured.

    python benchmarks/convergence/answers.py

Reads `benchmarks/results/convergence.jsonl`, prints tables and writes them to `convergence.md` beside it, with a
plot for each question: `convergence_curves.svg` and others. Accuracies are of test images, in percent, of a copy that
was hard-pruned without retraining and has batch-norm statistics of its own, unless said otherwise; seeds are averaged.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plots import write_plots
from reading import (
    BUDGETED,
    COMPARED,
    EPOCHS_OF_RUNS,
    PACED,
    RIVALS,
    Case,
    Result,
    Results,
    cost,
    final,
    least_budget,
    mean,
    ratio_of_epochs,
    share_of_run,
)
from run import METHODS, RESULTS, USUAL_EPOCHS, read_rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int = 1) -> str:
    """Print a number, or that there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def accuracy_table(results: Results) -> str:
    """Hard-pruned accuracy at equal sparsity, and how often SLR is ahead."""
    rows = []
    for case, by_name in results.cases(COMPARED):
        means = {name: mean(map(final, by_name[name])) for name in METHODS}
        best = max(value for value in means.values() if value is not None)
        cells = [f"**{number(v, 2)}**" if v == best else number(v, 2) for v in means.values()]
        rows.append([case[1], case[2], str(len(by_name["slr"])), number(by_name["slr"][0]["dense"], 2), *cells])
    wins = [[final(mine) >= final(theirs) for mine, theirs in results.pairs(rival)] for rival in RIVALS]
    shares = [f"{sum(won)} of {len(won)}" if won else "–" for won in wins]
    rows.append(["SLR at least as good", "", "", "", "", *shares])
    return table(["network", "pattern", "seeds", "dense", *METHODS], rows)


def epochs_table(results: Results) -> str:
    """Epochs, and time, until the accuracy is within 1 and 0.5 points of what the rival has at its end.

    Time is in steps of plain training: processors differed between rows.
    """
    rows = []
    for rival in RIVALS:
        pairs = list(results.pairs(rival, PACED))
        cells = [rival]
        for margin in (1.0, 0.5):
            ratios = [ratio_of_epochs(*pair, margin) for pair in pairs]
            times = [ratio * cost(mine) / cost(theirs) for ratio, (mine, theirs) in zip(ratios, pairs, strict=True)]
            cells += [number(median(ratios), 2), number(median(times), 2), up_to_a_third(ratios)]
            cells.append(str(sum(ratio == float("inf") for ratio in ratios)))
        rows.append(cells)
    heads = (("within 1: epochs, ratio", "time, ratio"), ("within 0.5: epochs, ratio", "time, ratio"))
    return table(["rival", *(cell for head in heads for cell in (*head, "at most 1/3", "never"))], rows)


def share_of_run_table(results: Results) -> str:
    """The share of all epochs after which SLR is within a point of a rival's accuracy at its end."""
    rows = []
    for rival in RIVALS:
        shares = [share_of_run(*pair, 1.0) for pair in results.pairs(rival, PACED)]
        rows.append([rival, number(median(shares), 2), up_to_a_third(shares)])
    return table(["rival", "share of the epochs, median", "at most 1/3"], rows)


def budget_table(results: Results) -> str:
    """Accuracy at the end of whole runs of few epochs, and the shortest within a point of a rival's usual run."""
    rows = []
    shares: dict[str, list[float]] = {name: [] for name in BUDGETED}
    ratios: dict[str, list[float]] = {name: [] for name in BUDGETED}
    for case, by_name in results.budgets():
        cells = []
        for name in BUDGETED:
            seeds = by_name[name].items()
            means = [mean(final(runs[epochs]) for _, runs in seeds) for epochs in EPOCHS_OF_RUNS]
            cells.append(", ".join(map(number, means)))
            for mine, theirs in ((by_name["slr"][seed], runs) for seed, runs in seeds if seed in by_name["slr"]):
                goal = final(theirs[USUAL_EPOCHS]) - 1.0
                shares[name].append(least_budget(mine, goal) / USUAL_EPOCHS)
                ratios[name].append(least_budget(mine, goal) / least_budget(theirs, goal))
        rows.append([case[1], case[2], str(len(by_name["slr"])), *cells])
    for what, found in (("share of the rival's usual run", shares), ("ratio to the rival's shortest run", ratios)):
        cells = [f"{number(median(found[name]), 2)}; {up_to_a_third(found[name])}" for name in BUDGETED[1:]]
        rows.append([f"SLR's shortest run, {what}: median; at most 1/3", "", "", "", *cells])
    epochs = ", ".join(map(str, EPOCHS_OF_RUNS))
    return table(["network", "pattern", "seeds", *(f"{name}: {epochs} epochs" for name in BUDGETED)], rows)


def median(values: Sequence[float]) -> float | None:
    """Return the median, or nothing of nothing."""
    return statistics.median(values) if values else None


def up_to_a_third(ratios: Sequence[float]) -> str:
    """Say how many ratios are a third or less."""
    return f"{sum(ratio <= 1 / 3 for ratio in ratios)} of {len(ratios)}"


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
    dense, rows = results.dense(), []
    for key, by_method in results.sparsities().items():
        if key[1] != "2:4":
            near = [
                [s for s, accuracy in by_method[name].items() if accuracy >= dense[key[0]] - 1.0] for name in METHODS
            ]
            rows.append([*key, *(f"{100 * max(found):.0f} %" if found else "–" for found in near)])
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


SECTIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("Hard-pruned accuracy without retraining", accuracy_table),
    ("Epochs to come near a rival's final accuracy, over the rival's own", epochs_table),
    ("Share of the run after which SLR is within 1 point of a rival's final accuracy", share_of_run_table),
    ("Whole runs of few epochs, each with its own schedule", budget_table),
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
    text = "# Convergence\n\nMade by `python benchmarks/convergence/answers.py`; see there what the words mean.\n"
    for title, make in SECTIONS:
        text += f"\n## {title}\n\n{make(results)}"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "convergence.md").write_text(text)
    write_plots(results, args.out)


if __name__ == "__main__":
    main()
