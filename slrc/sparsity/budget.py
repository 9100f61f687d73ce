"""A budget of milliseconds over layers: each has options, one of which is chosen for each at the least loss.

    minimise Σ loss_n(o_n)  subject to  Σ ms_n(o_n) ≤ ms

This is a multiple-choice knapsack (Kellerer, Pferschy & Pisinger, "Knapsack Problems", chapter 11). `choose_options`
solves it by dynamic programming over time, whose unit is a small part of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from slrc.sparsity.patterns import PatternField

TICKS = 8192
"""Into how many units of time a budget is divided."""

Floats = NDArray[np.float64]


class Option(BaseModel):
    """One way to prune a layer: a pattern, how many of its groups survive, and the milliseconds that it takes.

    `weight` is how much the loss of a share of the layer's energy counts with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: PatternField
    groups: int = Field(ge=1)
    keep: int = Field(ge=1)
    ms: float = Field(ge=0)
    weight: float = Field(default=1.0, ge=0)


class Menu(BaseModel):
    """The options of one constraint, which bears this name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: tuple[Option, ...] = Field(min_length=1)


class Budget(BaseModel):
    """The milliseconds that the options of all menus together may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ms: float
    menus: tuple[Menu, ...]

    @property
    def least_ms(self) -> float:
        """What the fastest options take together."""
        return sum(min(o.ms for o in menu.options) for menu in self.menus)


def choose_options(losses: Sequence[Floats], ms: Sequence[Floats], budget: float) -> list[int] | None:
    """Return which option each layer takes, so that the sum of losses is the least within the budget.

    Args:
        losses: for each layer, the loss of each of its options.
        ms: for each layer, the time of each of its options.
        budget: what the times may sum to.

    Returns:
        One index for each layer; `None` where even the fastest options take longer. It is exact for times that are
        rounded to whole `budget / TICKS`: to the nearest, or up where that would go beyond the budget.
    """
    fastest = [int(np.argmin(t)) for t in ms]
    if _total(ms, fastest) > budget:
        return None
    exact = [np.asarray(t) * (TICKS / budget) for t in ms]
    for rounded in (np.round, np.ceil):  # to the nearest first: rounded up alone, what just fits would not
        chosen = _solve(losses, [rounded(t).astype(np.int64) for t in exact])
        if chosen is not None and _total(ms, chosen) <= budget * (1 + 1e-9):
            return chosen
    return fastest


def _total(ms: Sequence[Floats], chosen: Sequence[int]) -> float:
    return sum(float(t[k]) for t, k in zip(ms, chosen, strict=True))


def _solve(losses: Sequence[Floats], ticks: Sequence[NDArray[np.int64]]) -> list[int] | None:
    """Return the choice of the least loss within `TICKS`; `None` if there is none."""
    best = np.zeros(TICKS + 1)  # the least loss of the layers so far within so many ticks
    taken = np.zeros((len(ticks), TICKS + 1), dtype=np.int32)
    for n, (loss, cost) in enumerate(zip(losses, ticks, strict=True)):
        after = np.full(TICKS + 1, np.inf)
        for o in _undominated(np.asarray(loss), cost):
            if cost[o] > TICKS:
                continue
            total = best[: TICKS + 1 - cost[o]] + loss[o]
            better = total < after[cost[o] :]
            after[cost[o] :][better] = total[better]
            taken[n, cost[o] :][better] = o
        best = after
    if not np.isfinite(best[-1]):
        return None
    left, chosen = TICKS, []
    for n in reversed(range(len(ticks))):
        chosen.append(int(taken[n, left]))
        left -= int(ticks[n][chosen[-1]])
    return chosen[::-1]


def _undominated(loss: Floats, cost: NDArray[np.int64]) -> list[int]:
    """Return the options, from the fastest on, that no other one beats in both time and loss."""
    kept: list[int] = []
    for o in sorted(range(len(loss)), key=lambda o: (cost[o], loss[o])):
        if not kept or loss[o] < loss[kept[-1]]:
            kept.append(o)
    return kept
