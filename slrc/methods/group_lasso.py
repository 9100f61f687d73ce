"""Group lasso by proximal steps (Yuan & Lin 2006; Parikh & Boyd, "Proximal Algorithms", section 6.5.4).

After each step of the optimiser every group shrinks by the same amount and vanishes at zero:

    w_g ← w_g · max(0, 1 − τ / ‖w_g‖)

How strong a lasso leads to a given sparsity is not known beforehand. So τ follows a schedule of the sparsity: over the
steps between two updates it adds up to the norm of the largest group that the schedule drops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from slrc.errors import TrainingError
from slrc.methods.base import Iteration, Method, MethodState, dense_residual
from slrc.methods.gradual import cubic
from slrc.methods.settings import GroupLassoSettings
from slrc.sparsity.constraints import with_whole_members
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import is_shared, own, own_of


class GroupLasso(Method):
    """Shrinks from the first update on, once it knows how many steps there are between two."""

    name: ClassVar[str] = "group-lasso"

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        updates: int,
        settings: GroupLassoSettings | None = None,
    ) -> None:
        super().__init__(parameters, plan)
        self.settings, self.updates = settings or GroupLassoSettings(), updates
        self.k, self.steps = 0, 0
        self.shrink: list[Tensor] = []
        """τ for each constraint: one value for each row of the pattern's view, `(rows, 1)`."""

    def add_penalty_gradient(self) -> None:
        """Nothing to add: the lasso is not smooth."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Shrink all groups. Weights that are shared out are gathered for it, at every step."""
        self.steps += 1
        constraints = self.plan if self.shrink else ()
        for shrink, (c, live) in zip(self.shrink, with_whole_members(constraints, self.parameters), strict=True):
            norms = c.energies(live).sqrt()
            c.scale_(live, (1.0 - shrink / norms.clamp(min=1e-12)).clamp(min=0.0))
            for name in {s.tensor for s in c.members}:
                if is_shared(parameter := self.parameters[name]):
                    own(parameter).copy_(own_of(live[name], parameter))

    @torch.no_grad()
    def update(self, loss: Callable[[], float]) -> Iteration:
        """Choose τ anew.

        Raises:
            TrainingError: `after_step` has not been called since the last update, so that τ cannot be known.
        """
        if not self.steps:
            raise TrainingError(
                f"group-lasso: update {self.k + 1} came before any step of the optimiser",
                hint="call `after_step()` after every step, and `update()` after some steps",
            )
        self.k += 1
        self.reallocate()
        partly = self.plan.partly(cubic(self.k / (self.updates * self.settings.until)))
        members = with_whole_members(partly, self.parameters)
        self.shrink = [self._threshold(c.energies(live).sqrt(), c.keep) / self.steps for c, live in members]
        self.steps = 0
        f = loss()
        record = Iteration.unpenalised(self.k, f, dense_residual(self))
        self.history.append(record)
        return record

    @staticmethod
    def _threshold(norms: Tensor, keep: int) -> Tensor:
        """Return the norm of the largest group that is not among the first `keep` of its row, `(rows, 1)`."""
        if keep == norms.shape[1]:
            return norms.new_zeros((len(norms), 1))
        return norms.topk(keep + 1, dim=1).values[:, -1:]

    def state(self) -> MethodState:
        """τ, k and the history."""
        tensors = {f"shrink.{i}": t.cpu() for i, t in enumerate(self.shrink)}
        return MethodState(tensors, {"k": float(self.k)}, tuple(self.history))

    def load_state(self, state: MethodState) -> None:
        """Go on from a checkpoint, which stands at an update."""
        device = self.weights[0].device if self.names else None
        self.shrink = [state.tensors[f"shrink.{i}"].to(device) for i in range(len(state.tensors))]
        self.k, self.history = int(state.numbers["k"]), list(state.history)
