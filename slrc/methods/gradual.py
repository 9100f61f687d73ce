"""Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878): more and more groups are pruned while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from slrc.methods.base import Iteration, MaskedMethod
from slrc.methods.settings import GradualSettings
from slrc.sparsity.plans import Plan


class Gradual(MaskedMethod):
    """At each update, keeps the groups of the largest energy, fewer each time: cubic in time, as in equation 1."""

    name: ClassVar[str] = "gradual"

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, updates: int, settings: GradualSettings | None = None
    ) -> None:
        super().__init__(parameters, plan)
        self.settings, self.updates = settings or GradualSettings(), updates

    def update(self, loss: Callable[[], float]) -> Iteration:
        """Prune as far as the schedule has come; until its end a budget is shared out anew each time."""
        self.k += 1
        time = self.k / (self.updates * self.settings.until)
        if time <= 1:
            self.reallocate()
        self.prune(self.plan.partly(cubic(time)))
        return self.record(loss())


def cubic(time: float) -> float:
    """Return the share of the pruning that is done at `time`, from 0 to 1: fast at first, slow at the end."""
    return 1.0 - (1.0 - min(1.0, time)) ** 3
