"""Networks and data of `convergence.py`: a dense start, training batches, a validation split and test images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slrc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import fashion_mnist

CACHE = Path(os.environ.get("SLRC_CACHE", "~/.cache/slrc")).expanduser()
Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What a row trains and measures on.

    `validation` is a part of the training images that no training sees; `test` only ever reports.
    """

    make: Callable[[], nn.Module]
    """Returns the dense start, the same each time."""
    example: Tensor
    batches: Iterable[Any]
    validation: Images
    test: Images
    accuracy: Callable[..., float]
    """`accuracy(model, pixels, labels)` of a model in evaluation mode."""


FASHION_TRAIN, FASHION_VALIDATION, FASHION_TEST, FASHION_DENSE_EPOCHS = 10_000, 2_000, 4_000, 40


@lru_cache(maxsize=1)
def load_task(network: str, train: int = FASHION_TRAIN) -> Task:
    """Return the task of a network: `fashion-resnet` or `fashion-mixer`."""
    name = network.removeprefix("fashion-")
    pixels, labels = fashion_mnist.load_images("train")
    test = fashion_mnist.load_images("test")
    batches = fashion_mnist.Batches(pixels[:train], labels[:train])
    dense = CACHE / f"convergence-{network}-{train}-{FASHION_DENSE_EPOCHS}epochs.safetensors"

    def make() -> nn.Module:
        torch.manual_seed(0)
        return slrc.cached_weights(
            fashion_mnist.NETWORKS[name](), dense, lambda m: fashion_mnist.train_dense(m, batches, FASHION_DENSE_EPOCHS)
        )

    return Task(
        make=make,
        example=fashion_mnist.normalize(test[0][:1]),
        batches=batches,
        validation=(pixels[-FASHION_VALIDATION:], labels[-FASHION_VALIDATION:]),
        test=(test[0][:FASHION_TEST], test[1][:FASHION_TEST]),
        accuracy=fashion_mnist.accuracy,
    )
