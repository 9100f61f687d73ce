"""How a model that trains lies in the processes of a run: each has the whole one, or they share its parameters out.

The rest of training does not ask which. Copies that are evaluated lie as the model that they are of, see `Evaluation`.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from slrc.training import sharding
from slrc.training.evaluation import twin_of, unwrap


def placement_of(accelerator: Accelerator) -> Whole:
    """Return what the launcher, or the user, asked for; one process alone has all."""
    return Sharded(accelerator) if sharding.is_asked_for() and accelerator.num_processes > 1 else Whole(accelerator)


class Whole:
    """Each process has the whole model."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def teacher(self, copy: nn.Module) -> nn.Module:
        """Place a copy that is asked and does not train."""
        return copy

    def trained(self, model: nn.Module) -> nn.Module:
        """Return the model that trains for the user's, perhaps that itself."""
        return model

    def prepare(self, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> tuple[nn.Module, Any, Any]:
        """Return them as the accelerator steps them."""
        prepared: tuple[nn.Module, Any, Any] = self.accelerator.prepare(model, optimizer, scheduler)
        return prepared

    def follow_first(self, model: nn.Module) -> None:
        """Take over the first process's buffers. Whole copies do so at every step, without being told."""


class Sharded(Whole):
    """The processes share a copy's parameters out; the user's own model stays whole, in the main memory."""

    def teacher(self, copy: nn.Module) -> nn.Module:
        """Share the copy out."""
        return sharding.shard(copy, self.accelerator)

    def trained(self, model: nn.Module) -> nn.Module:
        """Return a copy that is shared out."""
        return sharding.shard(twin_of(model.cpu()), self.accelerator)

    def prepare(self, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> tuple[nn.Module, Any, Any]:
        """Return them as the accelerator steps them; the optimiser's state is saved whole."""
        sharding.gathers_state(optimizer)
        unwrap(model)
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)  # else one more copy in each
        return (prepared, *self.accelerator.prepare(optimizer, scheduler))

    def follow_first(self, model: nn.Module) -> None:
        """Take over the first process's buffers, which are of its share of samples."""
        sharding.follow_first(model)
