"""Inputs on which a model and what is made of it are compared: the example, random ones, and a batch of real data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slrc.ir.program import Program

MOST_SAMPLES = 8
"""Of a batch of evaluation data."""
OTHER_BATCH = 3


@dataclass(frozen=True)
class Probe:
    """The arguments of one call of the model, by a name that reports show."""

    name: str
    inputs: tuple[Any, ...]


def make_probes(program: Program) -> list[Probe]:
    """Return inputs to compare on: the example, then random ones.

    Random inputs have the example's shapes and types, and its mean and deviation; integers lie in its range. Where the
    batch is dynamic there is one with a batch of 3 as well.
    """
    generator = torch.Generator().manual_seed(0)
    probes = [Probe("example", program.example_inputs), Probe("random", _random(program, None, generator))]
    if program.batch_is_dynamic:
        probes.append(Probe(f"random, batch {OTHER_BATCH}", _random(program, OTHER_BATCH, generator)))
    return probes


class FirstCall:
    """Keeps the arguments of the first call of a module while the context lasts: what an evaluation gives it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __enter__(self) -> FirstCall:
        self._handle = self._module.register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def probe(self, program: Program) -> list[Probe]:
        """Return the call as a probe, of a few samples; none where there was no call of the example's kind."""
        inputs = None if self._seen is None else _fitting(program, *self._seen)
        return [] if inputs is None else [Probe("evaluation data", inputs)]

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen is None:
            self._seen = (args, kwargs)


def _random(program: Program, batch: int | None, generator: torch.Generator) -> tuple[Any, ...]:
    def draw(x: Any, batch_is_free: bool) -> Any:
        if not isinstance(x, Tensor) or not x.numel() or x.dtype == torch.bool or x.is_complex():
            return x
        shape = list(x.shape)
        if batch is not None and batch_is_free:
            shape[0] = batch
        if not x.is_floating_point():
            return torch.randint(int(x.min()), int(x.max()) + 1, shape, generator=generator, dtype=x.dtype)
        values = x.double()
        deviation = float(values.std(correction=0)) or 1.0
        return (torch.randn(shape, generator=generator).double() * deviation + values.mean()).to(x.dtype)

    leaves, spec = pytree.tree_flatten(program.example_inputs)
    free = iter(program.free_batches)
    return pytree.tree_unflatten([draw(x, next(free)) if isinstance(x, Tensor) else x for x in leaves], spec)


def _fitting(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return a call's arguments by position, cut to a few samples; `None` if the program cannot take them."""
    try:
        given = program.arguments(args, kwargs)
        leaves, expected = program.flatten(given, {}), program.flat_inputs()
    except (TypeError, ValueError):
        return None
    few = []
    for x, example, is_free in zip(leaves, expected, program.free_batches, strict=True):
        x = x.detach().cpu()[:MOST_SAMPLES] if is_free else x.detach().cpu()
        if x.dtype != example.dtype or x.shape[int(is_free) :] != example.shape[int(is_free) :]:
            return None
        few.append(x)
    replaced, (flat, spec) = iter(few), pytree.tree_flatten(given)
    return pytree.tree_unflatten([next(replaced) if isinstance(x, Tensor) else x for x in flat], spec)
