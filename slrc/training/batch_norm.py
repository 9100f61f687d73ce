"""Batch-norm statistics taken anew: those of the unpruned network do not fit the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate_batch_norm(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any], count: int
) -> None:
    """Replace running means and variances by their averages over the first `count` batches. Weights stay.

    All else is in evaluation mode meanwhile. A model without running statistics is left alone.

    Args:
        model: changed in place; its mode and momenta are as before afterwards.
        forward: runs the model on a batch, such as a workload's loss.
        batches: training batches.
        count: how many of them; none leaves the model alone.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or not count:
        return
    training = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.momentum = None  # a plain average over all batches
        norm.train()
    try:
        with torch.no_grad():
            for i, batch in enumerate(islice(batches, count)):
                if i == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                forward(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, was in training.items():
            module.training = was
