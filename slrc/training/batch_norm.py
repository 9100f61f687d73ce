"""Batch-norm statistics taken anew: those of the unpruned network do not fit the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MOST_NAMED = 8
"""Channels that a warning names."""


def recalibrate_batch_norm(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any], count: int
) -> None:
    """Replace running means and variances by their averages over the first `count` batches. Weights stay.

    All else is in evaluation mode meanwhile. A model without running statistics is left alone, and so are norms that
    stay in evaluation mode while the model trains.

    Args:
        model: changed in place; its mode and momenta are as before afterwards.
        forward: runs the model on a batch, such as a workload's loss.
        batches: training batches.
        count: how many of them; none leaves the model alone.
    """
    norms = [m for m in _trained_norms(model) if m.track_running_stats] if count else []
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    with _evaluating(model):
        for norm in norms:
            norm.momentum = None  # a plain average over all batches
            norm.train()
        try:
            for i, batch in enumerate(islice(batches, count)):
                if i == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                forward(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def adopt_statistics(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any], count: int
) -> None:
    """Replace running means and variances by those of the first `count` batches, so that the model computes the same.

    Scales and shifts make up for it. A model that was refitted for other statistics than its own would else be another
    one as soon as it trains, where batches are normalised by their own.

    Args:
        model: changed in place. Norms without scales and shifts, or without running statistics, are left alone, and so
            are those that stay in evaluation mode while the model trains.
        forward: runs the model on a batch, such as a workload's loss.
        batches: training batches.
        count: how many of them; none leaves the model alone.
    """
    norms = [m for m in _trained_norms(model) if m.track_running_stats and m.affine] if count else []
    if not norms:
        return
    sums: dict[nn.Module, list[Tensor]] = {}

    def add(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().double().transpose(0, 1).flatten(1)
        own = sums.setdefault(norm, [x.new_zeros(len(x)), x.new_zeros(len(x)), x.new_zeros(())])
        for total, part in zip(own, (x.sum(1), x.square().sum(1), x.new_tensor(x.shape[1])), strict=True):
            total += part

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        with _evaluating(model):
            for batch in islice(batches, count):
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for norm, (total, squares, samples) in sums.items():
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean = total / samples
            variance = (squares / samples - mean.square()).clamp_min(0)
            before, after = (norm.running_var.double() + norm.eps).sqrt(), (variance + norm.eps).sqrt()
            norm.bias.add_(norm.weight * (mean - norm.running_mean.double()) / before)
            norm.weight.mul_(after / before)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def _trained_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the norms that are in training mode when the model is: its `train` may leave some out."""
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return []
    with _own_modes(model):
        model.train()
        return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients, and each module back in its own mode afterwards."""
    with _own_modes(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def _own_modes(model: nn.Module) -> Iterator[None]:
    """Put each module back in its own mode afterwards."""
    training = {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def constant_channels(model: nn.Module) -> list[str]:
    """Return, for each batch norm with channels that do not vary, its name and how many they are.

    Their statistics say so: a variance of nothing beside the mean's rounding. Such a channel passes on rounding errors
    alone, many times enlarged. Channels whose scale and shift are zero too, as of pruned ones, are not counted.
    """
    found = []
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or norm.running_var is None or norm.running_mean is None:
            continue
        rounding = (norm.running_mean.double() * 1e-6).square() + 1e-30
        constant = norm.running_var.double() <= rounding
        if norm.weight is not None:
            constant &= (norm.weight != 0) | (norm.bias != 0)
        if count := int(constant.sum()):
            first = ", ".join(map(str, constant.nonzero().flatten().tolist()[:MOST_NAMED]))
            found.append(f"{name} ({count} of {len(constant)}: {first}{', …' if count > MOST_NAMED else ''})")
    return found
