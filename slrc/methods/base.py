"""What every method does: add its penalty's gradient after `loss.backward()`, and update once an outer iteration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slrc.errors import PlanError
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import of_own, own, own_of, totals, whole_in_turn


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

    @staticmethod
    def unpenalised(k: int, loss: float, residual: float) -> Iteration:
        """Return the record of a method that has no multipliers: its Lagrangian is the loss."""
        return Iteration(
            k=k,
            loss=loss,
            lagrangian=loss,
            accepted_loss=True,
            accepted_projection=True,
            step_size=0.0,
            residual=residual,
            multiplier_norm=0.0,
        )


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
        method.after_step()                # after every step
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

    @torch.no_grad()
    def reallocate(self, scored: Mapping[str, Tensor] | None = None) -> None:
        """Share the plan's budget out anew, for the weights as they are, or for what is `scored` instead."""
        self.plan = self.plan.reallocated(scored or self.parameters)

    @torch.no_grad()
    def masks(self) -> Masks:
        """Return the masks with which the weights, as they are now, would be hard-pruned: their projection."""
        return Masks.project(self.plan, self.parameters)

    def start(self, loss: Callable[[], float]) -> None:  # noqa: B027
        """See f(W⁰) before the first step, for methods that compare with it."""

    @abstractmethod
    def add_penalty_gradient(self) -> None:
        """Add the gradient of the method's penalty to the constrained parameters' `.grad`."""

    def rho_at(self, time: float) -> float:
        """Return the penalty ρ at a share of the run, from 0 to 1, for a learning rate that fits it; 0 without one."""
        return 0.0

    def after_step(self) -> None:  # noqa: B027
        """Change the parameters after a step of the optimiser, for methods that do more than penalise."""

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


class MaskedMethod(Method):
    """A method that trains the live weights under masks which it changes at updates.

    `kept` are the masks in force by tensor, followers' included, of this process's rows; none while all is dense.
    Gradients of pruned weights are cleared too, so that no momentum of theirs builds up.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        super().__init__(parameters, plan)
        self.k = 0
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def prune(self, plan: Plan, scored: Mapping[str, Tensor] | None = None) -> None:
        """Put the masks of a projection on `plan` in force: that of the weights, or of what is `scored` instead."""
        masks = Masks.project(plan, scored or self.parameters).tensors
        self.kept = {n: own_of(m, p).to(p.dtype) for n, m in masks.items() for p in [self.parameters[n]]}
        MaskedMethod.after_step(self)

    def release(self) -> None:
        """Go on dense; pruned weights start from zero."""
        self.kept = {}

    @torch.no_grad()
    def add_penalty_gradient(self) -> None:
        """Clear the gradients of pruned weights."""
        for name, mask in self.kept.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                own(gradient).mul_(mask)

    @torch.no_grad()
    def after_step(self) -> None:
        """Clear pruned weights."""
        for name, mask in self.kept.items():
            own(self.parameters[name]).mul_(mask)

    def record(self, loss: float) -> Iteration:
        """Return what an update saw, and keep it."""
        record = Iteration.unpenalised(self.k, loss, dense_residual(self))
        self.history.append(record)
        return record

    def state(self) -> MethodState:
        """The masks in force, k and the history."""
        kept = {f"kept.{n}": of_own(m.bool(), self.parameters[n]) for n, m in self.kept.items()}
        tensors = {n: m.cpu() for n, m in whole_in_turn(kept)}
        return MethodState(tensors, {"k": float(self.k)}, tuple(self.history))

    def load_state(self, state: MethodState) -> None:
        """Go on from a checkpoint."""
        kept = {n.removeprefix("kept."): m for n, m in state.tensors.items() if n.startswith("kept.")}
        self.kept = {n: own_of(m, p).to(p.dtype) for n, m in kept.items() for p in [self.parameters[n]]}
        self.k, self.history = int(state.numbers["k"]), list(state.history)


def norm(tensors: Sequence[Tensor], of: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all tensors together, summed in float64.

    Args:
        tensors: this process's rows.
        of: the tensors that they are rows of.
    """
    return math.sqrt(totals([square_sum(tensors)], of)[0])


def square_sum(tensors: Sequence[Tensor]) -> float:
    """Return the sum of all squares, in float64."""
    return summed([t.double().square().sum() for t in tensors])


def summed(numbers: Sequence[Tensor]) -> float:
    """Return the sum of tensors of one number each. The device is waited for once."""
    return sum(torch.stack(list(numbers)).tolist()) if numbers else 0.0


@torch.no_grad()
def dense_residual(method: Method) -> float:
    """Return the norm of what hard-pruning the weights, as they are now, would remove."""
    masks, weights = method.masks().tensors, method.weights
    return norm([own(w) * ~own_of(masks[n], w) for n, w in zip(method.names, weights, strict=True)], weights)
