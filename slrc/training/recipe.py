"""The recipe: how weights are trained, whatever the method.

SGD whose learning rate rises and falls once over the run (Smith & Topin, arXiv 1708.07120), with gradients of limited
norm, and, where asked for, an average of the last weights. Distillation is in `slrc.training.distillation`. What the
workload brings of its own wins.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from slrc.errors import WorkloadError
from slrc.options import RecipeSettings
from slrc.sparsity.shards import own, share
from slrc.workload import Workload, user_error

T = TypeVar("T")
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
LARGEST_SHARE = 0.5
"""Of a weight, which the penalty may take away in a step at the full speed of momentum; from 1 on it oscillates."""
START = 0.1
"""The first learning rate over its peak."""
AVERAGED = 0.1
"""The share of a run, at its end, over which weights are averaged."""
MOMENTS = 100
"""At which ρ and the learning rate are looked at."""


def make_optimizer(
    workload: Workload,
    parameters: Sequence[nn.Parameter],
    steps: int,
    settings: RecipeSettings,
    rho: Callable[[float], float],
) -> tuple[Optimizer, LRScheduler]:
    """Return the workload's optimiser and schedule, or those of the recipe.

    Args:
        workload: its own ones win.
        parameters: those that train.
        steps: how often the schedule will be stepped.
        settings: the recipe.
        rho: the penalty's strength at a share of the run, see `peak_learning_rate`.

    Raises:
        WorkloadError: there is nothing to train; the workload's functions failed, or made what does not fit.
    """
    if not parameters:
        raise WorkloadError(
            "the model has no parameters to train: none has `requires_grad`",
            hint="unfreeze it, or prune in one shot with `--method magnitude --epochs 0`",
        )
    own_optimizer, own_scheduler = workload.optimizer, workload.scheduler
    if own_optimizer is None:
        optimizer = sgd(parameters, peak_learning_rate(settings, rho))
    else:
        optimizer = _made("optimizer", Optimizer, lambda: own_optimizer(parameters))
    if own_scheduler is None:
        scheduler = schedule(optimizer, steps, settings)
    else:
        scheduler = _made("scheduler", LRScheduler, lambda: own_scheduler(optimizer, steps))
    if isinstance(scheduler, ReduceLROnPlateau):
        raise WorkloadError(
            "`Workload.scheduler` must return a schedule of its own, got ReduceLROnPlateau",
            hint="the schedule is stepped after every batch, without a metric: try OneCycleLR or CosineAnnealingLR",
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise WorkloadError(
            f"`Workload.optimizer` made a {type(optimizer).__name__}, whose steps need a closure",
            hint="give one that steps by the gradients there are, such as SGD or AdamW",
        )
    return optimizer, scheduler


def sgd(parameters: Iterable[nn.Parameter], peak_lr: float) -> Optimizer:
    """Return SGD with Nesterov momentum 0.9 and weight decay 5e-4, whose schedule reaches `peak_lr`."""
    return torch.optim.SGD(parameters, lr=peak_lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def schedule(optimizer: Optimizer, steps: int, settings: RecipeSettings) -> LRScheduler:
    """Return the schedule over `steps` steps, with the optimiser's own learning rates as the highest."""
    return LambdaLR(optimizer, lambda step: share_of_peak(step / max(1, steps), settings))


def share_of_peak(time: float, settings: RecipeSettings) -> float:
    """Return the learning rate over its peak at a share of the run, from 0 to 1: half waves of a cosine."""
    rise = settings.warmup if settings.one_cycle else 0.0
    if time < rise:
        return START + (1.0 - START) * (1.0 - math.cos(math.pi * time / rise)) / 2
    return (1.0 + math.cos(math.pi * (min(1.0, time) - rise) / (1.0 - rise))) / 2


def peak_learning_rate(settings: RecipeSettings, rho: Callable[[float], float]) -> float:
    """Return the highest learning rate with which the penalty stays stable: ρ·lr / (1 − momentum) ≤ 1/2 at all times.

    Args:
        settings: the recipe; its `peak_lr` is the most that is returned.
        rho: ρ at a share of the run, from 0 to 1; 0 without a penalty.
    """
    moments = (i / MOMENTS for i in range(MOMENTS + 1))
    strongest = max(rho(time) * share_of_peak(time, settings) for time in moments) / (1.0 - MOMENTUM)
    return settings.peak_lr if strongest == 0 else min(settings.peak_lr, LARGEST_SHARE / strongest)


class AveragedWeights:
    """An exponential average of parameters over the last part of a run (Polyak & Juditsky 1992).

    Args:
        parameters: the live ones, by name.
        decay: the share of the average that stays at a step.
        steps: of the whole run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, steps: int) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.first = steps - max(1, round(AVERAGED * steps))
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        if step < self.first:
            return
        if not self.average:
            self.average = {n: p.detach().clone() for n, p in self.parameters.items()}
            return
        average, live = [own(a) for a in self.average.values()], [own(p) for p in self.parameters.values()]
        torch._foreach_lerp_(average, live, 1.0 - self.decay)

    @torch.no_grad()
    def store(self) -> None:
        """Write the average over the live weights."""
        for name, value in self.average.items():
            own(self.parameters[name]).copy_(own(value))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            KeyError: the average is of other parameters.
        """
        if tensors:
            self.average = {n: share(tensors[n], p.detach()).clone() for n, p in self.parameters.items()}


def _made(name: str, kind: type[T], make: Callable[[], T]) -> T:
    """Return what the user's function makes; what it raises becomes an error that names the user's line."""
    try:
        made = make()
    except Exception as error:
        raise user_error(f"`Workload.{name}`", error) from error
    if not isinstance(made, kind):
        raise WorkloadError(f"`Workload.{name}` must return a {kind.__name__}, got {type(made).__name__}")
    return made
