"""What `convergence.py` compares: the package's methods with their settings, and Torch-Pruning's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

import slrc
from slrc.methods.registry import make_method
from slrc.methods.settings import ADMMSettings, MethodName, MethodSettings, SLRSettings
from slrc.sparsity.masks import Masks


@dataclass(frozen=True)
class Settings:
    """A method, how it is set, and how often it updates."""

    method: MethodName | None
    values: MethodSettings = field(default_factory=MethodSettings)
    updates_per_epoch: int = 2


def slr(**values: Any) -> Settings:
    """Return SLR with something changed."""
    return Settings(MethodName.SLR, MethodSettings(slr=SLRSettings(**values)))


CONTENDERS: Mapping[str, Settings] = {
    "slr": Settings(MethodName.SLR),
    "admm": Settings(MethodName.ADMM),
    "admm-rising": Settings(MethodName.ADMM, MethodSettings(admm=ADMMSettings(rho=0.1, rho_growth=100))),
    "magnitude": Settings(MethodName.MAGNITUDE),
    "gradual": Settings(MethodName.GRADUAL),
    "ac-dc": Settings(MethodName.AC_DC),
    "group-lasso": Settings(MethodName.GROUP_LASSO),
    "torch-pruning": Settings(None),
    "slr: the paper's": slr(rho=0.1, rho_growth=1.0, follow=False),
    "slr: Z stays": slr(follow=False),
    "slr: ρ constant": slr(rho_growth=1.0),
    "slr: ρ to 10 ρ from 0.3": slr(rho=0.3),
    "slr: ρ to 10 ρ from 3": slr(rho=3.0),
    "slr: s0 = 0.001": slr(s0=0.001),
    "slr: s0 = 0.1": slr(s0=0.1),
    "slr: M = 10": slr(M=10.0),
    "slr: r = 0.5": slr(r=0.5),
    "slr: 6 updates an epoch": Settings(MethodName.SLR, updates_per_epoch=6),
}
"""Those after Torch-Pruning leave out or change a part of SLR's default."""


class Contender(Protocol):
    """What the loop asks of a method."""

    def start(self, loss: Callable[[], float]) -> None:
        """See f before the first step."""

    def add_penalty_gradient(self) -> None:
        """After every backward pass."""

    def after_step(self) -> None:
        """After every step of the optimiser."""

    def update(self, loss: Callable[[], float]) -> object:
        """Some times an epoch."""

    def prune(self, twin: nn.Module) -> tuple[nn.Module, Masks]:
        """Prune a copy of the model hard; return it and the masks for retraining."""

    def summary(self) -> list[dict[str, float]]:
        """Return what is kept of the history."""

    def state_bytes(self) -> int:
        """Return the memory that the method needs between steps."""


def make_contender(settings: Settings, model: nn.Module, plan: slrc.Plan, updates: int, example: Tensor) -> Contender:
    """Return a contender that constrains `model` as `plan` says."""
    if settings.method is None:
        return TorchPruning(model, plan, example)
    return Own(settings, model, plan, updates)


class Own:
    """A method of this package."""

    def __init__(self, settings: Settings, model: nn.Module, plan: slrc.Plan, updates: int) -> None:
        assert settings.method is not None
        parameters = dict(model.named_parameters())
        self.method = make_method(settings.method, parameters, plan, updates, settings.values)
        self.start = self.method.start
        self.add_penalty_gradient = self.method.add_penalty_gradient
        self.after_step = self.method.after_step
        self.update = self.method.update

    def prune(self, twin: nn.Module) -> tuple[nn.Module, Masks]:
        """Project the copy's weights."""
        masks = self.method.masks()
        masks.apply_(dict(twin.named_parameters()))
        return twin, masks

    def summary(self) -> list[dict[str, float]]:
        """Loss, residual, step size and acceptance of every update."""
        return [
            {
                "loss": round(r.loss, 4),
                "residual": float(f"{r.residual:.4g}"),
                "step_size": float(f"{r.step_size:.4g}"),
                "accepted": r.accepted_loss + r.accepted_projection,
            }
            for r in self.method.history
        ]

    def state_bytes(self) -> int:
        """The tensors of a checkpoint."""
        return sum(t.numel() * t.element_size() for t in self.method.state().tensors.values())


class TorchPruning:
    """Torch-Pruning's group-norm pruner (DepGraph, Fang et al., CVPR 2023), by its own interface, for `channel`.

    Its regularisation goes on all the time; pruning makes a copy narrower, by the same share of each group. What it
    keeps the plan leaves alone too: the first layer's inputs and the classifier's outputs, and no rounding of widths.
    """

    def __init__(self, model: nn.Module, plan: slrc.Plan, example: Tensor) -> None:
        self.model, self.plan, self.example = model, plan, example
        self.pruner = self._pruner(model)

    def _pruner(self, model: nn.Module) -> Any:
        import torch_pruning as tp

        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        example = self.example.to(next(model.parameters()).device)
        return tp.pruner.GroupNormPruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=self.plan.sparsity_asked,
            ignored_layers=[last],
        )

    def start(self, loss: Callable[[], float]) -> None:
        """Make the regulariser ready."""
        self.pruner.update_regularizer()

    def add_penalty_gradient(self) -> None:
        """Add the regulariser's gradient."""
        self.pruner.regularize(self.model)

    def after_step(self) -> None:
        """Nothing."""

    def update(self, loss: Callable[[], float]) -> object:
        """Nothing."""

    def prune(self, twin: nn.Module) -> tuple[nn.Module, Masks]:
        """Make the copy narrower; there are no masks."""
        for p in twin.parameters():
            p.grad = None
        self._pruner(twin).step()
        return twin, Masks()

    def summary(self) -> list[dict[str, float]]:
        """Nothing is kept."""
        return []

    def state_bytes(self) -> int:
        """Nothing beside its groups of indices."""
        return 0
