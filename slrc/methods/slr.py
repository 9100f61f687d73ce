"""Surrogate Lagrangian Relaxation (Zhou et al., arXiv 2304.04120; Gurevin et al., arXiv 2012.10079).

    minimise f(W) subject to W_n in S_n, with the copy Z_n = W_n, Z_n in S_n:

    L_ρ(W, Z, Λ) = f(W) + Σ <Λ_n, W_n − Z_n> + Σ ρ/2 ‖W_n − Z_n‖²

Each outer iteration k solves the loss subproblem by some steps of the user's optimiser (the penalty's gradient comes
from `add_penalty_gradient`), then, in `update`, checks its surrogate optimality, moves the multipliers, projects,
checks and moves again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from slrc.methods.base import Iteration, MaskedMethod, MethodState
from slrc.methods.gradual import cubic
from slrc.methods.settings import SLRSettings
from slrc.methods.splitting import Splitting
from slrc.sparsity.plans import Plan


class SLR(MaskedMethod):
    """The method of the paper, or with sets that tighten; see the module's docstring and `Method` for its use."""

    name: ClassVar[str] = "slr"

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, updates: int, settings: SLRSettings | None = None
    ) -> None:
        super().__init__(parameters, plan)
        self.settings = settings = settings or SLRSettings()
        self.updates = updates
        first = self.plan_at(0)
        self.splitting = Splitting(
            self, settings.rho, settings.rho_growth, updates, follows=settings.follow, plan=first
        )
        self.step_size = settings.s0
        # L_ρ(W^{k-1}, Z^{k-1}, Λ^k) and ‖W^{k-1} − Z^{k-1}‖, taken when W^{k-1} was live: no copy of W is needed.
        self._previous_lagrangian: float | None = None
        self._previous_residual = 0.0

    def plan_at(self, k: int) -> Plan:
        """Return S^k: what the plan prunes, or only a part of it while the sets still tighten, cubic in time."""
        tighten = self.updates * self.settings.tighten
        return self.plan.partly(cubic(k / tighten)) if k < tighten else self.plan

    def rho_at(self, time: float) -> float:
        """Return ρ, which grows over the run; no penalty is left once masks are in force."""
        return self.splitting.rho_at(time) if time < self.settings.hold else 0.0

    def add_penalty_gradient(self) -> None:
        """Add Λ + ρ(W − Z) to `.grad`; once masks are in force, clear the gradients of pruned weights."""
        if self.kept:
            super().add_penalty_gradient()
        else:
            self.splitting.add_gradient()

    def start(self, loss: Callable[[], float]) -> None:
        """Record f at the start W⁰; `update` does so itself if this was not called, and then accepts nothing once."""
        penalty = self.splitting.penalty(self.splitting.difference())
        self._previous_lagrangian = loss() + penalty.value
        self._previous_residual = penalty.residual

    def step_factor(self, k: int) -> float:
        """α_k = 1 − 1/(M k^p), p = 1 − 1/k^r (arXiv 2304.04120)."""
        p = 1.0 - 1.0 / k**self.settings.r
        return 1.0 - 1.0 / (self.settings.M * k**p)

    def update(self, loss: Callable[[], float]) -> Iteration:
        """Check, move the multipliers, tighten and project, check, move again; put masks in force when it is time.

        With masks in force W = Z: nothing is left to check or to move.
        """
        self.k += 1
        if self.kept:
            return self.record(loss())
        split = self.splitting
        alpha = self.step_factor(self.k)
        f = loss()

        old_difference = split.difference()
        penalty = split.penalty(old_difference)
        lagrangian = f + penalty.value
        accepted_loss = self._previous_lagrangian is not None and lagrangian < self._previous_lagrangian
        if accepted_loss:
            self.step_size = self._bounded(alpha * _ratio(self._previous_residual, penalty.residual))
            split.move_multipliers(self.step_size, old_difference)

        if self.k <= self.updates * self.settings.hold:
            self.reallocate(split.scored())
        if (plan := self.plan_at(self.k)) != split.plan:
            split.restrict(plan)
        copies = split.project()
        difference = split.difference(copies)
        old, new = split.penalties(split.difference(), difference)
        # A copy that follows is the minimiser for its support: with the same support it cannot become better.
        accepted_projection = new.value <= old.value if split.follows else new.value < old.value
        if accepted_projection:
            self.step_size = self._bounded(alpha * _ratio(penalty.residual, new.residual))
            split.move_multipliers(self.step_size, difference, copies)

        split.copies = copies
        split.go_on(self.k)
        self._previous_lagrangian = f + split.penalty(split.difference()).value
        self._previous_residual = new.residual
        record = Iteration(
            k=self.k,
            loss=f,
            lagrangian=lagrangian,
            accepted_loss=accepted_loss,
            accepted_projection=accepted_projection,
            step_size=self.step_size,
            residual=new.residual,
            multiplier_norm=split.norm(split.multipliers),
        )
        self.history.append(record)
        if self.settings.hold < 1 and self.k >= self.updates * self.settings.hold:
            self.prune(self.plan, split.scored())
        return record

    def _bounded(self, factor: float) -> float:
        """Return the next step size. With sets that tighten it is at most ρ, which maximises the dual function.

        The ratios make the move of the multipliers one of a length that only α shortens. Where the residual falls to
        almost nothing between two updates, that would be a step beyond the maximum.
        """
        longer = self.step_size * factor
        return min(longer, self.splitting.rho) if self.settings.tighten else longer

    def state(self) -> MethodState:
        """Z, Λ, s, k, masks in force, what the next acceptance compares with, and the history."""
        masked = super().state()
        numbers = {
            "step_size": self.step_size,
            "k": float(self.k),
            "previous_residual": self._previous_residual,
        }
        if self._previous_lagrangian is not None:
            numbers["previous_lagrangian"] = self._previous_lagrangian
        return MethodState({**self.splitting.tensors(), **masked.tensors}, numbers, tuple(self.history))

    def load_state(self, state: MethodState) -> None:
        """Go on from a checkpoint."""
        super().load_state(state)
        self.step_size = state.numbers["step_size"]
        self.splitting.plan = self.plan_at(self.k)
        self.splitting.load_tensors(state.tensors, self.k)
        self._previous_lagrangian = state.numbers.get("previous_lagrangian")
        self._previous_residual = state.numbers["previous_residual"]


def _ratio(before: float, after: float) -> float:
    """‖W − Z‖ before over after; 1 where either is zero, since a step size of zero could never grow again."""
    return before / after if before > 0 and after > 0 else 1.0
