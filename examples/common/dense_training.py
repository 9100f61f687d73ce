"""The loop that trains an example's dense network."""

import math
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from slrc.machine.processor import processor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

WARM_UP = 0.1
"""The share of the steps in which a learning rate rises."""


def device_of(model: Callable[..., Any]) -> torch.device:
    """Return the device of a model's parameters; the CPU where it has none, as what a runtime computes."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(parameters, torch.empty(0)).device


def has_bfloat16() -> bool:
    """Tell whether `DEVICE` has instructions for bfloat16; without them autocast only costs time."""
    return DEVICE.type == "cuda" or not processor().features.isdisjoint({"avx512_bf16", "amx_bf16"})


def rise_and_fall(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return the schedule of a learning rate that rises linearly, then falls as a cosine, in so many steps."""
    steps = max(1, steps)
    rise = max(1, round(WARM_UP * steps))
    return LambdaLR(optimizer, lambda step: min((step + 1) / rise, (1 + math.cos(math.pi * step / steps)) / 2))


def train_epochs(
    model: nn.Module,
    batches: Collection[Any],
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    epochs: int,
    name: str,
    *,
    clip: float | None = None,
    in_bfloat16: bool = False,
) -> None:
    """Train in place on `DEVICE`, a step of the optimiser and of the schedule for each batch; say each epoch's loss.

    Args:
        model: a network on `DEVICE`, in training mode; it is on the CPU afterwards.
        batches: tuples of tensors, read anew each epoch.
        loss: of the model on a batch that is on `DEVICE`.
        optimizer: of the model's parameters.
        schedule: of the learning rate.
        epochs: how often the batches are read.
        name: what the network is called on the way.
        clip: the most that the gradient's norm may be.
        in_bfloat16: whether the loss is computed in it where torch can.
    """
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for batch in batches:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=in_bfloat16):
                value = loss(model, tuple(part.to(DEVICE) for part in batch))
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            total += value.item()
        seconds = time.perf_counter() - start
        line = f"dense {name}: epoch {epoch + 1}/{epochs}, loss {total / len(batches):.3f}, {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)
    model.to("cpu", memory_format=torch.contiguous_format)
