"""Reading the user's training batches: seeded, counted, shared out, and with errors that name the user's line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from slrc.config import CompileConfig
from slrc.workload import read

USUAL_EPOCHS, USUAL_STEPS = 10, 2000
"""Of sparse training, whichever is more, where nobody says how long."""
LOADER_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"),
    *("generator", "prefetch_factor", "pin_memory_device"),
)
"""How a `DataLoader` reads, besides what it reads and in which order."""


def sparse_steps(config: CompileConfig, steps: int) -> int:
    """Return the steps of sparse training that a configuration asks for, where an epoch has so many."""
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        return config.epochs * steps
    return steps * max(USUAL_EPOCHS, math.ceil(USUAL_STEPS / steps))


def seed_epoch(batches: Any, seed: int, phase: str, epoch: int) -> None:
    """Make an epoch a function of the run's seed, its phase and its number, so that a resumed run repeats it."""
    mixed = (seed * 1_000_003 + epoch * 101 + sum(map(ord, phase))) % 2**31
    set_seed(mixed)
    for source in (batches, getattr(batches, "sampler", None)):
        generator = getattr(source, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(mixed)
    if callable(getattr(batches, "set_epoch", None)):
        batches.set_epoch(epoch)
    if getattr(batches, "persistent_workers", False):
        batches._iterator = None  # else the workers go on from the random state of the epoch before


def count_steps(batches: Iterable[Any], processes: int, seed: int) -> int:
    """Return the steps of an epoch in each process."""
    try:
        steps = len(batches)  # type: ignore[arg-type]
    except TypeError:  # none, or a DataLoader over an iterable dataset
        seed_epoch(batches, seed, "count", 0)
        steps = sum(1 for _ in read(batches))
    even = math.ceil(steps / processes) if _is_plain_loader(batches) else steps // processes
    return max(1, even)


def share_out(batches: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    """Give each process its share of the batches; one process alone reads the user's own."""
    if accelerator.num_processes == 1:
        return batches
    if _is_plain_loader(batches):
        return _dealt_out(batches, accelerator)
    return _Shard(batches, accelerator.process_index, accelerator.num_processes)


def share_of_first(batches: Iterable[Any], count: int, index: int, processes: int) -> list[Any]:
    """Return `count` batches for each of the processes, those of the one with this index; as many as there are.

    Together they hold the samples that one process sees in `count` batches of all processes' size.
    """
    own, last = [], []
    for i, batch in enumerate(islice(read(batches), count * processes)):
        last = [batch]
        if i % processes == index:
            own.append(batch)
    return own or last


def _dealt_out(batches: Any, accelerator: Accelerator) -> Iterable[Any]:
    """Let `accelerate` deal out the samples, in the order in which one process alone would see them."""
    sampler = batches.sampler
    given = getattr(sampler, "generator", None)
    loader = accelerator.prepare(batches)
    if hasattr(sampler, "generator"):
        sampler.generator = given  # `accelerate` put one of its own there, which draws another order
    return loader


def _is_plain_loader(batches: Iterable[Any]) -> bool:
    """Whether `accelerate` may deal out the samples: it makes a loader of its own, and cuts batches it cannot index."""
    return (
        isinstance(batches, DataLoader)
        and type(batches).__iter__ is DataLoader.__iter__
        and not isinstance(batches.dataset, IterableDataset)
    )


class Dealt:
    """A process's share of batches: every n-th of them, so that each is in one share; it can be read again and again.

    Args:
        batches: a workload's `eval_batches`, all of them in every process, in the same order.
        index: of the process.
        processes: how many there are.
        even: make all shares equally long. Where batches are missing for that, another share's last one stands in, and
            `has_stand_in` says so afterwards.
    """

    def __init__(self, batches: Iterable[Any], index: int, processes: int, *, even: bool) -> None:
        self.batches, self.index, self.processes, self.even = batches, index, processes, even
        self.has_stand_in = False

    def __iter__(self) -> Iterator[Any]:
        source = self.batches
        if not isinstance(source, DataLoader) or not _is_plain_loader(source) or source.batch_sampler is None:
            return self._share(read(source, "eval_batches"))
        options = {name: getattr(source, name) for name in LOADER_OPTIONS}
        sampler = source.batch_sampler
        own = DataLoader(source.dataset, batch_sampler=_Again(lambda: self._share(sampler)), **options)
        return read(own, "eval_batches")

    def _share(self, items: Iterable[Any]) -> Iterator[Any]:
        self.has_stand_in, source = False, iter(items)
        while found := list(islice(source, self.processes)):
            is_missing = self.index >= len(found)
            self.has_stand_in = is_missing and self.even
            if not is_missing or self.even:
                yield found[-1 if is_missing else self.index]


@dataclass(frozen=True)
class _Again:
    """An iterable of what a function yields."""

    start: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.start()


def samples_in(batch: Any) -> int:
    """Return how many samples a batch has, by its first tensor; 1 where it has none."""
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
    return tensors[0].shape[0] if tensors else 1


def update_steps(steps: int, updates: int) -> set[int]:
    """Return the steps of an epoch after which the method updates, evenly spread, the last one among them."""
    updates = min(updates, steps)
    return {round((i + 1) * steps / updates) for i in range(updates)}


@dataclass(frozen=True)
class _Shard:
    """Every n-th batch of an iterable; an incomplete round at the end is left out, so that all have as many."""

    batches: Iterable[Any]
    index: int
    processes: int

    def __iter__(self) -> Iterator[Any]:
        own = None
        for i, batch in enumerate(self.batches):
            if i % self.processes == self.index:
                own = batch
            if i % self.processes == self.processes - 1:
                yield own
