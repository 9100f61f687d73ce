"""What SLR and ADMM share: the copy Z of the constrained weights W, the multipliers Λ, and the penalty between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slrc.methods.base import Method, norm, square_sum, summed
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import of_own, own, own_of, totals, whole_in_turn


class Copies(NamedTuple):
    """Z for each constrained weight, and where it may be other than zero: all groups that its projection kept."""

    values: list[Tensor]
    support: list[Tensor]


class Penalty(NamedTuple):
    """<Λ, W − Z> + ρ/2 ‖W − Z‖², and ‖W − Z‖ over all constrained weights together."""

    value: float
    residual: float


class Splitting:
    """The copy Z of the constrained weights W, the multipliers Λ, and the penalty between them.

    The penalty's gradient is Λ + ρ(W − Z). Its constant part is kept ready, so that a training step pays for two fused
    additions and nothing enters the autograd graph. Elements of a tensor that no constraint owns stay out of all sums.

    If Z `follows`, then between two projections Z is minimised exactly on its support, at every step: Z = W + Λ/ρ
    there. Weights that survive then feel no pull, W − Z is −Λ/ρ for them, and the dual function is −‖Λ‖²/2ρ in their
    multipliers: a step of ρ brings those to its maximum, zero, and no step goes past it.

    Where processes share the weights out, all tensors here are of this process's rows alone. Processes talk where
    something is projected, which gathers W + Λ/ρ, and where sums are taken.

    Args:
        method: whose weights and plan.
        rho: ρ at first.
        growth: by how much ρ has grown at the last update.
        updates: how many there will be.
        follows: whether Z follows W on its support.
        plan: the sets at first; the method's unless given.
    """

    def __init__(
        self,
        method: Method,
        rho: float,
        growth: float,
        updates: int,
        *,
        follows: bool = False,
        plan: Plan | None = None,
    ) -> None:
        self.method, self.rho, self.follows, self.plan = method, rho, follows, plan or method.plan
        self._first_rho, self._growth, self._updates = rho, growth, updates
        self.multipliers = [torch.zeros_like(w) for w in self._weights]
        self.owned = self._owned()
        self.copies = self.project()
        self._offsets: list[Tensor] = []
        self._pulls: list[Tensor] = []
        self.refresh()

    @property
    def _weights(self) -> list[Tensor]:
        return [own(w).detach() for w in self.method.weights]

    def go_on(self, k: int) -> None:
        """Let ρ grow to what it is after the k-th update, and make the penalty ready for the steps after it."""
        self.rho = self.rho_at(k / max(1, self._updates))
        self.refresh()

    def rho_at(self, time: float) -> float:
        """Return ρ at a share of the run."""
        return self._first_rho * self._growth ** min(1.0, time)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the penalty's constant parts anew, after Z, Λ or ρ changed."""
        if self.follows:
            pulled = [o * ~kept for o, kept in zip(self.owned, self.copies.support, strict=True)]
            self._offsets = [m * p for m, p in zip(self.multipliers, pulled, strict=True)]
        else:
            pulled = self.owned
            self._offsets = [m - self.rho * z for m, z in zip(self.multipliers, self.copies.values, strict=True)]
        self._pulls = [p * self.rho for p in pulled]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add Λ + ρ(W − Z) to `.grad`."""
        weights = self.method.weights
        for w in weights:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        gradients = [own(w.grad) for w in weights if w.grad is not None]
        if gradients:
            torch._foreach_add_(gradients, self._offsets)
            torch._foreach_addcmul_(gradients, self._weights, self._pulls)

    @torch.no_grad()
    def scored(self) -> dict[str, Tensor]:
        """Return what is projected: W + Λ/ρ, and the parameters that are not constrained as they are."""
        pairs = zip(self._weights, self.multipliers, strict=True)
        return self._shared([w + m / self.rho for w, m in pairs])

    def project(self) -> Copies:
        """Return the projection of W + Λ/ρ on the sets; elements nobody owns are zero."""
        return self._projected(self.scored())

    @torch.no_grad()
    def restrict(self, plan: Plan) -> None:
        """Go over to smaller sets: Z is projected on them, so that what it is compared with lies in the same ones."""
        self.plan = plan
        values = self.copies.values
        if self.follows:
            scored = self.scored()
            pairs = zip(self.method.names, self.copies.support, strict=True)
            values = [own(scored[n]) * kept for n, kept in pairs]
        self.copies = self._projected(self._shared(values))

    @torch.no_grad()
    def _projected(self, live: Mapping[str, Tensor]) -> Copies:
        masks = Masks.of(self.plan, live, self.plan.project(live), followers=False).tensors
        support = [own_of(masks[n], live[n]) for n in self.method.names]
        rows = [own(live[n]) for n in self.method.names]
        return Copies([r * kept * o for r, kept, o in zip(rows, support, self.owned, strict=True)], support)

    @torch.no_grad()
    def difference(self, copies: Copies | None = None) -> list[Tensor]:
        """Return W − Z."""
        z = copies or self.copies
        if self.follows:
            pairs = zip(self._weights, self.multipliers, z.support, strict=True)
            difference = [torch.where(kept, -m / self.rho, w) for w, m, kept in pairs]
        else:
            difference = [w - value for w, value in zip(self._weights, z.values, strict=True)]
        return [d * o for d, o in zip(difference, self.owned, strict=True)]

    def penalty(self, difference: list[Tensor]) -> Penalty:
        """Return the penalty of W − Z."""
        return self.penalties(difference)[0]

    @torch.no_grad()
    def penalties(self, *differences: list[Tensor]) -> list[Penalty]:
        """Return the penalty of each of several W − Z, summed in float64."""
        squares = [square_sum(d) for d in differences]
        linear = [
            summed([(m.double() * d.double()).sum() for m, d in zip(self.multipliers, one, strict=True)])
            for one in differences
        ]
        found = totals([*linear, *squares], self.method.weights)
        residuals = [math.sqrt(square) for square in found[len(differences) :]]
        pairs = zip(found, residuals, strict=False)
        return [Penalty(first + 0.5 * self.rho * residual**2, residual) for first, residual in pairs]

    def norm(self, tensors: list[Tensor]) -> float:
        """Return the Euclidean norm over tensors of the constrained weights together."""
        return norm(tensors, self.method.weights)

    @torch.no_grad()
    def move_multipliers(self, step: float, difference: list[Tensor], copies: Copies | None = None) -> None:
        """Λ ← Λ + step · (W − Z)."""
        if step == 0:
            return
        if self.follows:
            support = (copies or self.copies).support
            scaled = [torch.where(k, min(1.0, self.rho / step), 1.0) for k in support]
            difference = [d * scale for d, scale in zip(difference, scaled, strict=True)]
        if difference:
            torch._foreach_add_(self.multipliers, difference, alpha=step)

    def tensors(self) -> dict[str, Tensor]:
        """Return Z and Λ by name, for a checkpoint."""
        state = {
            f"{saved}.{n}": of_own(t, w)
            for saved, tensors in self._saved()
            for n, t, w in zip(self.method.names, tensors, self.method.weights, strict=True)
        }
        return {n: t.detach().cpu().contiguous() for n, t in whole_in_turn(state)}

    def load_tensors(self, tensors: Mapping[str, Tensor], k: int) -> None:
        """Go on with Z and Λ from a checkpoint that was made after k updates."""
        with torch.no_grad():
            for saved, ours in self._saved():
                for n, t, w in zip(self.method.names, ours, self.method.weights, strict=True):
                    t.copy_(own_of(tensors[f"{saved}.{n}"], w))
        self.go_on(k)

    def _saved(self) -> tuple[tuple[str, list[Tensor]], ...]:
        return ("copy", self.copies.values), ("support", self.copies.support), ("multiplier", self.multipliers)

    def _shared(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """Return all parameters by name, with these rows in place of the constrained ones'."""
        constrained = zip(self.method.names, rows, self.method.weights, strict=True)
        return {**self.method.parameters, **{n: of_own(r, w) for n, r, w in constrained}}

    def _owned(self) -> list[Tensor]:
        """1 where some constraint owns the element, else 0."""
        weights = dict(zip(self.method.names, self.method.weights, strict=True))
        free = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in weights.items()}
        for c in self.method.plan:
            c.scatter(torch.zeros_like(c.gather(free)), free, followers=False)
        return [own_of(~free[n], w).to(w.dtype) for n, w in weights.items()]
