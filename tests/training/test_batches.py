"""Sharing out the user's batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from slrc.training.batches import count_steps, seed_epoch, share_of_first, share_out, update_steps


def accelerator(index: int, processes: int) -> Any:
    return SimpleNamespace(process_index=index, num_processes=processes)


@pytest.mark.parametrize("count", [6, 7, 8])
def test_processes_share_an_iterable_evenly_and_without_overlap(count: int) -> None:
    batches = list(range(count))
    shares = [list(share_out(batches, accelerator(i, 2))) for i in range(2)]
    assert len(shares[0]) == len(shares[1]) == count_steps(batches, 2, seed=0) == count // 2
    assert sorted(shares[0] + shares[1]) == batches[: count // 2 * 2]


def test_one_process_reads_the_iterable_itself() -> None:
    batches = [1, 2]
    assert share_out(batches, accelerator(0, 1)) is batches


class Detections(IterableDataset):
    """Batches of their own making: 4 images, 20 boxes."""

    def __iter__(self) -> Any:
        return iter([(torch.zeros(4, 3), torch.arange(20))] * 3)


class Flipping(DataLoader):
    def __iter__(self) -> Any:
        return ((-x,) for (x,) in super().__iter__())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loader_that_makes_its_batches_is_read_as_it_is(processes: int) -> None:
    loader = DataLoader(Detections(), batch_size=None)
    for images, boxes in share_out(loader, accelerator(0, processes)):
        assert (len(images), len(boxes)) == (4, 20)
    flipping = Flipping(TensorDataset(torch.ones(8)), batch_size=2)
    shares = [list(share_out(flipping, accelerator(i, processes))) for i in range(processes)]
    assert [len(share) for share in shares] == [count_steps(flipping, processes, seed=0)] * processes
    assert all(bool((x == -1).all()) for share in shares for (x,) in share)


def test_an_iterable_without_a_length_is_counted() -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(range(5))

    assert count_steps(Endless(), 1, seed=0) == 5


def test_updates_are_spread_and_end_with_the_epoch() -> None:
    assert update_steps(10, 2) == {5, 10}
    assert update_steps(3, 8) == {1, 2, 3}


class Noise(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(())


def test_workers_that_persist_start_each_epoch_from_its_seed() -> None:
    loader = DataLoader(Noise(), batch_size=4, num_workers=1, persistent_workers=True)

    def drawn(epoch: int) -> list[float]:
        seed_epoch(loader, 0, "slr", epoch)
        return next(iter(list(loader))).tolist()

    first, second = drawn(1), drawn(2)
    assert first != second
    assert (drawn(2), drawn(1)) == (second, first)


def test_an_epoch_is_a_function_of_seed_phase_and_number() -> None:
    loader = DataLoader(TensorDataset(torch.arange(64)), batch_size=64, shuffle=True, generator=torch.Generator())

    def order(seed: int, phase: str, epoch: int) -> list[int]:
        seed_epoch(loader, seed, phase, epoch)
        return next(iter(loader))[0].tolist()

    assert order(0, "slr", 1) == order(0, "slr", 1)
    different = [order(0, "slr", 1), order(1, "slr", 1), order(0, "retrain", 1), order(0, "slr", 2)]
    assert len({tuple(o) for o in different}) == 4


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_probe_together_what_one_does_with_larger_batches(processes: int) -> None:
    batches = [[2 * i, 2 * i + 1] for i in range(20)]
    shares = [share_of_first(batches, 2, i, processes) for i in range(processes)]
    assert all(len(share) == 2 for share in shares)
    assert sorted(x for share in shares for batch in share for x in batch) == [*range(4 * processes)]
    assert [share_of_first(batches[:1], 2, i, processes) for i in range(processes)] == [batches[:1]] * processes
    assert share_of_first([], 2, 0, processes) == []
