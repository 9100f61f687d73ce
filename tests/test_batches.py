"""Sharing out the user's batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from slrc.batches import count_steps, seed_epoch, share_out, update_steps


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


def test_an_iterable_without_a_length_is_counted() -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(range(5))

    assert count_steps(Endless(), 1, seed=0) == 5


def test_updates_are_spread_and_end_with_the_epoch() -> None:
    assert update_steps(10, 2) == {5, 10}
    assert update_steps(3, 8) == {1, 2, 3}


def test_an_epoch_is_a_function_of_seed_phase_and_number() -> None:
    loader = DataLoader(TensorDataset(torch.arange(64)), batch_size=64, shuffle=True, generator=torch.Generator())

    def order(seed: int, phase: str, epoch: int) -> list[int]:
        seed_epoch(loader, seed, phase, epoch)
        return next(iter(loader))[0].tolist()

    assert order(0, "slr", 1) == order(0, "slr", 1)
    different = [order(0, "slr", 1), order(1, "slr", 1), order(0, "retrain", 1), order(0, "slr", 2)]
    assert len({tuple(o) for o in different}) == 4
