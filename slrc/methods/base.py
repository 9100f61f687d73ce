"""What every method does: add its penalty's gradient after `loss.backward()`, and update once an outer iteration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slrc.errors import PlanError
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import own, share, total, whole


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

    def reallocate(self, scored: Mapping[str, Tensor] | None = None) -> None:
        """Share the plan's budget out anew, for the weights as they are, or for what is `scored` instead."""
        self.plan = self.plan.reallocated(scored or {n: p.detach() for n, p in self.parameters.items()})

    def masks(self) -> Masks:
        """Return the masks with which the weights, as they are now, would be hard-pruned: their projection."""
        return Masks.project(self.plan, {n: p.detach() for n, p in self.parameters.items()})

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

    `kept` are the masks in force by tensor, followers' included; none while all is dense. Gradients of pruned weights
    are cleared too, so that no momentum of theirs builds up.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        super().__init__(parameters, plan)
        self.k = 0
        self.kept: dict[str, Tensor] = {}

    def prune(self, plan: Plan, scored: Mapping[str, Tensor] | None = None) -> None:
        """Put the masks of a projection on `plan` in force: that of the weights, or of what is `scored` instead."""
        live = {n: p.detach() for n, p in self.parameters.items()}
        masks = Masks.project(plan, scored or live).tensors
        self.kept = {n: share(m.to(live[n].dtype), live[n]) for n, m in masks.items()}
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
                own(gradient).mul_(own(mask))

    @torch.no_grad()
    def after_step(self) -> None:
        """Clear pruned weights."""
        for name, mask in self.kept.items():
            own(self.parameters[name]).mul_(own(mask))

    def record(self, loss: float) -> Iteration:
        """Return what an update saw, and keep it."""
        record = Iteration.unpenalised(self.k, loss, dense_residual(self))
        self.history.append(record)
        return record

    def state(self) -> MethodState:
        """The masks in force, k and the history."""
        tensors = {f"kept.{n}": whole(m).bool().cpu() for n, m in self.kept.items()}
        return MethodState(tensors, {"k": float(self.k)}, tuple(self.history))

    def load_state(self, state: MethodState) -> None:
        """Go on from a checkpoint."""
        kept = {n.removeprefix("kept."): m for n, m in state.tensors.items() if n.startswith("kept.")}
        self.kept = {n: share(m.to(p.dtype), p) for n, m in kept.items() for p in [self.parameters[n]]}
        self.k, self.history = int(state.numbers["k"]), list(state.history)


class Copies(NamedTuple):
    """Z for each constrained weight, and where it may be other than zero: all groups that its projection kept."""

    values: list[Tensor]
    support: list[Tensor]


class Splitting:
    """The copy Z of the constrained weights W, the multipliers Λ, and the penalty between them.

    The penalty's gradient is Λ + ρ(W − Z). Its constant part is kept ready, so that a training step pays for two fused
    additions and nothing enters the autograd graph. Elements of a tensor that no constraint owns stay out of all sums.

    If Z `follows`, then between two projections Z is minimised exactly on its support, at every step: Z = W + Λ/ρ
    there. Weights that survive then feel no pull, W − Z is −Λ/ρ for them, and the dual function is −‖Λ‖²/2ρ in their
    multipliers: a step of ρ brings those to its maximum, zero, and no step goes past it.

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
        self.multipliers = [torch.zeros_like(w) for w in method.weights]
        self.owned = self._owned()
        self.copies = self.project()
        self._offsets: list[Tensor] = []
        self._pulls: list[Tensor] = []
        self.refresh()

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
            offsets = [m * p for m, p in zip(self.multipliers, pulled, strict=True)]
        else:
            pulled = self.owned
            offsets = [m - self.rho * z for m, z in zip(self.multipliers, self.copies.values, strict=True)]
        self._offsets, self._pulls = [own(x) for x in offsets], [own(p * self.rho) for p in pulled]

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
            torch._foreach_addcmul_(gradients, [own(w) for w in weights], self._pulls)

    @torch.no_grad()
    def scored(self) -> dict[str, Tensor]:
        """Return what is projected: W + Λ/ρ, and the parameters that are not constrained as they are."""
        live = {n: p.detach() for n, p in self.method.parameters.items()}
        for n, w, m in zip(self.method.names, self.method.weights, self.multipliers, strict=True):
            live[n] = w.detach() + m / self.rho
        return live

    def project(self) -> Copies:
        """Return the projection of W + Λ/ρ on the sets; elements nobody owns are zero."""
        return self._projected(self.scored())

    @torch.no_grad()
    def restrict(self, plan: Plan) -> None:
        """Go over to smaller sets: Z is projected on them, so that what it is compared with lies in the same ones."""
        self.plan = plan
        live, scored = {n: p.detach() for n, p in self.method.parameters.items()}, self.scored()
        for n, value, kept in zip(self.method.names, self.copies.values, self.copies.support, strict=True):
            live[n] = scored[n] * kept if self.follows else value
        self.copies = self._projected(live)

    @torch.no_grad()
    def _projected(self, live: Mapping[str, Tensor]) -> Copies:
        masks = Masks.of(self.plan, live, self.plan.project(live), followers=False).tensors
        support = [share(masks[n], live[n]) for n in self.method.names]
        values = [live[n] * kept * o for n, kept, o in zip(self.method.names, support, self.owned, strict=True)]
        return Copies(values, support)

    @torch.no_grad()
    def difference(self, copies: Copies | None = None) -> list[Tensor]:
        """Return W − Z."""
        z = copies or self.copies
        if self.follows:
            pairs = zip(self.method.weights, self.multipliers, z.support, strict=True)
            difference = [torch.where(kept, -m / self.rho, w) for w, m, kept in pairs]
        else:
            difference = [w - value for w, value in zip(self.method.weights, z.values, strict=True)]
        return [d * o for d, o in zip(difference, self.owned, strict=True)]

    @torch.no_grad()
    def penalty(self, difference: list[Tensor]) -> float:
        """Return <Λ, W − Z> + ρ/2 ‖W − Z‖², summed in float64."""
        pairs = zip(self.multipliers, difference, strict=True)
        linear = sum(float((own(m).double() * own(d).double()).sum()) for m, d in pairs)
        return total(linear, difference) + 0.5 * self.rho * norm(difference) ** 2

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
            torch._foreach_add_([own(m) for m in self.multipliers], [own(d) for d in difference], alpha=step)

    def tensors(self) -> dict[str, Tensor]:
        """Return Z and Λ by name, for a checkpoint."""
        state = {f"copy.{n}": z for n, z in zip(self.method.names, self.copies.values, strict=True)}
        state |= {f"support.{n}": kept for n, kept in zip(self.method.names, self.copies.support, strict=True)}
        state |= {f"multiplier.{n}": m for n, m in zip(self.method.names, self.multipliers, strict=True)}
        return {n: whole(t).detach().cpu().contiguous() for n, t in state.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], k: int) -> None:
        """Go on with Z and Λ from a checkpoint that was made after k updates."""
        with torch.no_grad():
            for i, n in enumerate(self.method.names):
                z, support, multiplier = self.copies.values[i], self.copies.support[i], self.multipliers[i]
                for tensor, saved in ((z, "copy"), (support, "support"), (multiplier, "multiplier")):
                    own(tensor).copy_(own(share(tensors[f"{saved}.{n}"], tensor)))
        self.go_on(k)

    def _owned(self) -> list[Tensor]:
        """1 where some constraint owns the element, else 0."""
        free = {
            n: torch.ones(p.shape, dtype=torch.bool)
            for n, p in zip(self.method.names, self.method.weights, strict=True)
        }
        for c in self.method.plan:
            gathered = c.gather(self.method.parameters)
            c.scatter(torch.zeros(gathered.shape, dtype=torch.bool), free, followers=False)
        pairs = zip(self.method.names, self.method.weights, strict=True)
        return [share((~free[n]).to(w.dtype), w) for n, w in pairs]


def norm(tensors: list[Tensor]) -> float:
    """Return the Euclidean norm over all tensors together, summed in float64."""
    return math.sqrt(total(sum(float(own(t).double().square().sum()) for t in tensors), tensors))


def dense_residual(method: Method) -> float:
    """Return the norm of what hard-pruning the weights, as they are now, would remove."""
    masks = method.masks().tensors
    return norm([p.detach() * share(~masks[n], p) for n, p in zip(method.names, method.weights, strict=True)])
