"""ADMM pruning (Zhang et al., ECCV 2018, arXiv 1804.03294), with the same update frequency as SLR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from slrc.methods.base import Iteration, Method, MethodState
from slrc.methods.settings import ADMMSettings
from slrc.methods.splitting import Splitting
from slrc.sparsity.plans import Plan


class ADMM(Method):
    """Z ← project(W + Λ/ρ), then Λ ← Λ + ρ(W − Z), once an outer iteration."""

    name: ClassVar[str] = "admm"

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, updates: int, settings: ADMMSettings | None = None
    ) -> None:
        super().__init__(parameters, plan)
        self.settings = settings or ADMMSettings()
        rho, growth, follow = self.settings.rho, self.settings.rho_growth, self.settings.follow
        self.splitting = Splitting(self, rho, growth, updates, follows=follow)
        self.k = 0

    def rho_at(self, time: float) -> float:
        """Return ρ, which grows over the run."""
        return self.splitting.rho_at(time)

    def add_penalty_gradient(self) -> None:
        """Add Λ + ρ(W − Z) to `.grad`."""
        self.splitting.add_gradient()

    def update(self, loss: Callable[[], float]) -> Iteration:
        """Project, then move the multipliers by ρ."""
        split = self.splitting
        self.k += 1
        f = loss()
        lagrangian = f + split.penalty(split.difference()).value
        self.reallocate(split.scored())
        split.plan = self.plan
        split.copies = split.project()
        difference = split.difference()
        split.move_multipliers(split.rho, difference)
        step_size = split.rho
        split.go_on(self.k)
        record = Iteration(
            k=self.k,
            loss=f,
            lagrangian=lagrangian,
            accepted_loss=True,
            accepted_projection=True,
            step_size=step_size,
            residual=split.norm(difference),
            multiplier_norm=split.norm(split.multipliers),
        )
        self.history.append(record)
        return record

    def state(self) -> MethodState:
        """Z, Λ, k and the history."""
        return MethodState(self.splitting.tensors(), {"k": float(self.k)}, tuple(self.history))

    def load_state(self, state: MethodState) -> None:
        """Go on from a checkpoint."""
        self.k = int(state.numbers["k"])
        self.splitting.load_tensors(state.tensors, self.k)
        self.history = list(state.history)
