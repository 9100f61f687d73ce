"""What every method does: add its penalty's gradient after `loss.backward()`, and update once an outer iteration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slrc.errors import PlanError
from slrc.plans import Masks, Plan


class Iteration(BaseModel):
    """One outer iteration: what the method saw and did.

    `lagrangian` is L_ρ(W^k, Z^{k-1}, Λ^k); `residual` is ‖W^k − Z^k‖ over all constrained weights together;
    `accepted_loss` and `accepted_projection` are the two acceptance conditions (true for methods that have none).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int
    loss: float
    lagrangian: float
    accepted_loss: bool
    accepted_projection: bool
    step_size: float
    residual: float
    multiplier_norm: float


@dataclass(frozen=True)
class MethodState:
    """What a method needs to go on after a restart: tensors by name, numbers by name, and the history."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float]
    history: tuple[Iteration, ...]


class Method(ABC):
    """Trains live parameters towards a plan's constraints.

        loss.backward()
        method.add_penalty_gradient()      # after every backward pass
        optimizer.step()
        ...
        method.update(lambda: f())         # once an outer iteration, f on fixed data

    Args:
        parameters: live parameters by qualified name; all that the plan constrains must be there.
        plan: what is constrained.

    Raises:
        PlanError: a constrained parameter is missing.
    """

    name: ClassVar[str]

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        names = sorted({s.tensor for c in plan for s in c.members})
        if missing := [n for n in names if n not in parameters]:
            raise PlanError(
                f"the plan constrains `{missing[0]}`, which the model does not have as a parameter",
                hint="capture the model that you train, and keep its parameters' names",
            )
        self.plan = plan
        self.parameters = dict(parameters)
        self.names = names
        self.history: list[Iteration] = []

    @property
    def weights(self) -> list[nn.Parameter]:
        """The constrained parameters, in the order of `names`."""
        return [self.parameters[n] for n in self.names]

    def masks(self) -> Masks:
        """Return the masks with which the weights, as they are now, would be hard-pruned: their projection."""
        return Masks.project(self.plan, {n: p.detach() for n, p in self.parameters.items()})

    def start(self, loss: Callable[[], float]) -> None:  # noqa: B027
        """See f(W⁰) before the first step, for methods that compare with it."""

    @abstractmethod
    def add_penalty_gradient(self) -> None:
        """Add the gradient of the method's penalty to the constrained parameters' `.grad`."""

    @abstractmethod
    def update(self, loss: Callable[[], float]) -> Iteration | None:
        """Do one outer iteration.

        `loss` returns f(W) on the same data each time, without a gradient and without changing the model's state
        (batch norm in evaluation mode).
        """

    @abstractmethod
    def state(self) -> MethodState:
        """Return what is needed to go on after a restart."""

    @abstractmethod
    def load_state(self, state: MethodState) -> None:
        """Go on from a state that `state` returned."""


class Splitting:
    """The copy Z of the constrained weights W, the multipliers Λ, and the penalty between them.

    The penalty's gradient is Λ + ρ(W − Z). Λ − ρZ is kept ready, so that a training step pays for two fused additions
    and nothing enters the autograd graph. Elements of a tensor that no constraint owns stay out of all sums.
    """

    def __init__(self, method: Method, rho: float) -> None:
        self.method, self.rho = method, rho
        self.multipliers = [torch.zeros_like(w) for w in method.weights]
        self.owned = self._owned()
        self.copies = self.project()
        self._offsets: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Make the penalty's constant part anew, after Z or Λ changed."""
        with torch.no_grad():
            self._offsets = [m - self.rho * z for m, z in zip(self.multipliers, self.copies, strict=True)]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add Λ + ρ(W − Z) to `.grad`."""
        weights = self.method.weights
        for w in weights:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        gradients = [w.grad for w in weights if w.grad is not None]
        if gradients:
            torch._foreach_add_(gradients, self._offsets)
        whole = [i for i, owned in enumerate(self.owned) if owned is None]
        if whole:
            torch._foreach_add_([gradients[i] for i in whole], [weights[i].data for i in whole], alpha=self.rho)
        for i, owned in enumerate(self.owned):
            if owned is not None:
                gradients[i].addcmul_(weights[i], owned, value=self.rho)

    @torch.no_grad()
    def project(self) -> list[Tensor]:
        """Return the projection of W + Λ/ρ on the constraint sets; elements nobody owns are zero."""
        live = {n: p.detach() for n, p in self.method.parameters.items()}
        for n, w, m in zip(self.method.names, self.method.weights, self.multipliers, strict=True):
            live[n] = w.detach() + m / self.rho
        masks = {n: torch.ones(live[n].shape, dtype=torch.bool) for n in self.method.names}
        for c in self.method.plan:
            c.scatter(c.project(live), masks, followers=False)
        kept = [live[n] * masks[n].to(live[n].device) for n in self.method.names]
        return [z if o is None else z * o for z, o in zip(kept, self.owned, strict=True)]

    @torch.no_grad()
    def difference(self, copies: list[Tensor] | None = None) -> list[Tensor]:
        """Return W − Z."""
        pairs = zip(self.method.weights, copies or self.copies, self.owned, strict=True)
        return [(w - z) if o is None else (w - z) * o for w, z, o in pairs]

    @torch.no_grad()
    def penalty(self, difference: list[Tensor]) -> float:
        """Return <Λ, W − Z> + ρ/2 ‖W − Z‖², summed in float64."""
        linear = sum(float((m.double() * d.double()).sum()) for m, d in zip(self.multipliers, difference, strict=True))
        return linear + 0.5 * self.rho * norm(difference) ** 2

    @torch.no_grad()
    def move_multipliers(self, step: float, difference: list[Tensor]) -> None:
        """Λ ← Λ + step · (W − Z)."""
        torch._foreach_add_(self.multipliers, difference, alpha=step)

    def tensors(self) -> dict[str, Tensor]:
        """Return Z and Λ by name, for a checkpoint."""
        state = {f"copy.{n}": z for n, z in zip(self.method.names, self.copies, strict=True)}
        state |= {f"multiplier.{n}": m for n, m in zip(self.method.names, self.multipliers, strict=True)}
        return {n: t.detach().cpu().contiguous() for n, t in state.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with Z and Λ from a checkpoint."""
        with torch.no_grad():
            for i, n in enumerate(self.method.names):
                self.copies[i] = self.copies[i].copy_(tensors[f"copy.{n}"])
                self.multipliers[i].copy_(tensors[f"multiplier.{n}"])
        self.refresh()

    def _owned(self) -> list[Tensor | None]:
        """For tensors that are constrained in part, 1 where some constraint owns the element."""
        free = {
            n: torch.ones(p.shape, dtype=torch.bool)
            for n, p in zip(self.method.names, self.method.weights, strict=True)
        }
        for c in self.method.plan:
            gathered = c.gather(self.method.parameters)
            c.scatter(torch.zeros(gathered.shape, dtype=torch.bool), free, followers=False)
        return [
            (~free[n]).to(w) if bool(free[n].any()) else None
            for n, w in zip(self.method.names, self.method.weights, strict=True)
        ]


def norm(tensors: list[Tensor]) -> float:
    """Return the Euclidean norm over all tensors together, summed in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
