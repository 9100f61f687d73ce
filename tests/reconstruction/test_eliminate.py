"""Elimination in one layer, against least squares and all supports."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from layer_moments import correlated, least_squares, moments_of, undamped

from slrc.reconstruction.eliminate import Removal, eliminate, keep_in_each, share_out
from slrc.reconstruction.solve import LEAST_DAMPING, damp, error, refit


@pytest.mark.parametrize("size", [1, 2])
def test_what_each_removal_adds_is_what_least_squares_loses(size: int) -> None:
    x, y = correlated(60, 8), correlated(60, 3, seed=1)
    rows = torch.arange(3).unsqueeze(0)
    removal = eliminate(undamped(moments_of(x.unsqueeze(1), y)), rows, size, 0.3)
    before = least_squares(x, y, torch.arange(8))[1]
    for count in range(1, 8 // size):
        left = removal.order[0, count:].sort().values
        columns = (left.unsqueeze(1) * size + torch.arange(size)).flatten()
        after = least_squares(x, y, columns)[1]
        assert float(removal.errors[0, :count].sum()) == pytest.approx(after - before, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_one_at_a_time_the_first_to_go_is_the_best_of_all(seed: int) -> None:
    x, y = correlated(60, 7, seed), correlated(60, 4, seed + 10)
    rows = torch.arange(4).unsqueeze(0)
    removal = eliminate(undamped(moments_of(x.unsqueeze(1), y)), rows, 1, 0.01)
    gone: list[int] = []
    for column in removal.order[0].tolist()[:-1]:  # the best support that is one smaller than the one before
        left = [i for i in range(7) if i not in gone]
        errors = {i: least_squares(x, y, torch.tensor([j for j in left if j != i]))[1] for i in left}
        assert column == min(errors, key=errors.__getitem__)
        gone.append(column)


def test_elimination_comes_near_the_best_of_all_supports() -> None:
    ratios = []
    for seed in range(8):
        x, y = correlated(60, 8, seed), correlated(60, 4, seed + 10)
        moments = moments_of(x.unsqueeze(1), y)
        rows = torch.arange(4).unsqueeze(0)
        removal = eliminate(undamped(moments), rows, 1, 0.1)
        mask = keep_in_each(removal, 4).expand(4, -1)
        found = float(error(moments, refit(undamped(moments), mask)).sum())
        ratios.append(found / min(least_squares(x, y, torch.tensor(s))[1] for s in combinations(range(8), 4)))
    assert sum(r < 1 + 1e-9 for r in ratios) >= 3, ratios
    assert max(ratios) < 1.02, ratios


def test_float64_where_float32_does_not_do() -> None:
    x = correlated(64, 6)
    x[:, 5] = x[:, 4]
    y = correlated(64, 4, seed=1)
    damped = damp(moments_of(x.unsqueeze(1), y), torch.zeros(4, 6, dtype=torch.float64), LEAST_DAMPING)
    removal = eliminate(damped, torch.arange(4).unsqueeze(0), 1, 0.2)
    assert sorted(removal.order[0].tolist()) == list(range(6))
    assert int(removal.order[0, 0]) in (4, 5)
    losses = removal.errors[0].cumsum(dim=0)
    for count, loss in enumerate(losses.tolist()[:-1], start=1):
        left = removal.order[0, count:]
        assert loss == pytest.approx(least_squares(x, y, left)[1] - least_squares(x, y, torch.arange(5))[1], abs=1e-5)


def test_sharing_out_keeps_what_is_missed_most() -> None:
    order = torch.tensor([[0, 1, 2], [2, 1, 0]])
    removal = Removal(order, torch.tensor([[1.0, 2.0, 3.0], [10.0, 5.0, 30.0]]))
    assert share_out(removal, 4).tolist() == [[False, False, True], [True, True, True]]
    assert share_out(removal, 2).tolist() == [[False, False, True], [True, False, False]]  # each keeps one
    assert share_out(removal, 1).tolist() == [[False, False, False], [True, False, False]]
    assert share_out(removal, 6).all()
    assert keep_in_each(removal, 1).tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize("size", [1, 3])
def test_blocks_are_removed_from_as_if_each_were_alone(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = correlated(90, 36), correlated(90, 12, seed=1)
    damped = undamped(moments_of(x.reshape(90, 2, 18), y))
    rows = torch.arange(12).reshape(4, 3)  # two of each of two convolution groups
    together = eliminate(damped, rows, size, 0.2)
    monkeypatch.setattr("slrc.reconstruction.eliminate.CHUNK_NUMBERS", 1)
    alone = eliminate(damped, rows, size, 0.2)
    assert torch.equal(together.order, alone.order)
    torch.testing.assert_close(together.errors, alone.errors, rtol=1e-4, atol=1e-4)
    assert len({tuple(order) for order in together.order.tolist()}) == 4


def test_threads_change_nothing() -> None:
    x, y = correlated(90, 18), correlated(90, 20, seed=1)
    damped, rows = undamped(moments_of(x.unsqueeze(1), y)), torch.arange(20).reshape(5, 4)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(eliminate(damped, rows, 1, 0.1))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].order, found[1].order)
    torch.testing.assert_close(found[0].errors, found[1].errors, rtol=1e-4, atol=1e-5)
