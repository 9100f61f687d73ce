"""Rows of `convergence.py` by case and contender, and what is read off them, for tables and plots."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from run import BUDGETS, METHODS, TIERS, USUAL_EPOCHS

Result = dict[str, Any]
Case = tuple[str, str, str]
"""Tier, network, pattern@sparsity."""
Budgeted = Mapping[int, Result]
"""Rows of one case, contender and seed, by the epochs of the whole run."""
COMPARED = ("small", "middle", "wide")
"""Tiers in which methods are compared."""
PACED = ("small", "middle")
"""Those in which epochs are counted, and sparsities compared."""
EPOCHS_OF_RUNS = (*BUDGETS.values(), USUAL_EPOCHS)
"""Of the runs in `Budgeted`."""
BUDGETED = ("slr", "admm", "admm-rising")
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

    def pairs(self, rival: str, tiers: Sequence[str] = COMPARED) -> Iterator[tuple[Result, Result]]:
        """Yield SLR's and a rival's rows of the same case and seed."""
        for _, by_name in self.cases(tiers):
            mine = {seed_of(row): row for row in by_name["slr"]}
            theirs = {seed_of(row): row for row in by_name[rival]}
            yield from ((mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys()))

    def budgets(self) -> Iterator[tuple[Case, dict[str, dict[str, Budgeted]]]]:
        """Yield the cases that were run with every budget of epochs: rows by contender, seed and epochs."""
        for (tier, network, case), usual in self.cases(PACED):
            by_name: dict[str, dict[str, Budgeted]] = defaultdict(dict)
            for name, rows in usual.items():
                for row in rows:
                    shorter = {
                        epochs: found
                        for budget, epochs in BUDGETS.items()
                        for found in self.rows[budget, network, case][name]
                        if seed_of(found) == seed_of(row)
                    }
                    if len(shorter) == len(BUDGETS):
                        by_name[name][seed_of(row)] = {**shorter, USUAL_EPOCHS: row}
            if "slr" in by_name:
                yield (tier, network, case), by_name

    def dense(self) -> dict[str, float]:
        """Return each network's accuracy before pruning, in percent."""
        return {network: by_name["slr"][0]["dense"] for (_, network, _), by_name in self.cases(COMPARED)}

    def sparsities(self) -> dict[tuple[str, str], dict[str, dict[float, float]]]:
        """Return each network's and pattern's mean accuracies: method, sparsity, percent."""
        found: dict[tuple[str, str], dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
        for (_, network, case), by_name in self.cases(PACED):
            pattern, sparsity = case.rsplit("@", 1)
            for name in METHODS:
                accuracy = mean(map(final, by_name[name]))
                if accuracy is not None:
                    found[network, pattern][name][float(sparsity)] = accuracy
        return found


def seed_of(row: Result) -> str:
    """Return the seed, the last part of a row's name."""
    return str(row["row"]).rsplit("/", 1)[1]


def final(row: Result) -> float:
    """Return the accuracy at the end, with no retraining."""
    return float(row["final"]["hard_bn"])


def reached(row: Result, accuracy: float) -> float:
    """Return the epoch at which a row first had an accuracy, on the images looked at while training; or infinity."""
    return next((point["epoch"] for point in row["curve"] if point["hard_bn"] >= accuracy), float("inf"))


def cost(row: Result) -> float:
    """Return the time of a step over that of plain training, which leaves out how fast the machine was."""
    return float(row["step_ms"] / (row["step_ms"] - row["method_ms"]))


def ratio_of_epochs(mine: Result, theirs: Result, margin: float) -> float:
    """Return the epochs to come within some points of a rival's end, over the rival's own to there; or infinity."""
    goal = theirs["curve"][-1]["hard_bn"] - margin
    return reached(mine, goal) / reached(theirs, goal)


def share_of_run(mine: Result, theirs: Result, margin: float) -> float:
    """Return the epochs to come within some points of a rival's end, over all epochs; or infinity."""
    return reached(mine, theirs["curve"][-1]["hard_bn"] - margin) / float(mine["curve"][-1]["epoch"])


def least_budget(rows: Budgeted, accuracy: float) -> float:
    """Return the epochs of the shortest run that ends with an accuracy; or infinity."""
    return min((epochs for epochs, row in rows.items() if final(row) >= accuracy), default=float("inf"))


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or nothing of nothing."""
    found = list(values)
    return statistics.fmean(found) if found else None
