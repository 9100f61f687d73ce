"""Elimination and refit of one layer, against least squares and all supports."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from slrc.reconstruction.select import select
from slrc.reconstruction.solve import Damped, Removal, damp, eliminate, error, keep_in_each, refit, share_out
from slrc.reconstruction.statistics import Moments, Statistics
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.patterns import NM, Block, Columns, Pattern, Unstructured
from slrc.sparsity.projection import obeys, project
from slrc.sparsity.slices import Slice


def correlated(samples: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)


def moments_of(x: Tensor, y: Tensor) -> Moments:
    """Of `(samples, g, K)` and `(samples, out)`, about zero."""
    statistics = Statistics()
    statistics.add(x, y)
    return statistics.moments().about_zero()


def undamped(moments: Moments) -> Damped:
    return Damped(moments.hessian, moments.cross)


def least_squares(x: Tensor, y: Tensor, columns: Tensor) -> tuple[Tensor, float]:
    weight = torch.linalg.lstsq(x[:, columns], y).solution
    return weight.T, float((x[:, columns] @ weight - y).square().sum()) / len(x)


def test_a_refit_is_least_squares_on_each_support() -> None:
    x, y = correlated(50, 8), correlated(50, 4, seed=1)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0, 1, 0], [0] * 8, [1] * 8], dtype=torch.bool)
    moments = moments_of(x.unsqueeze(1), y)
    weight = refit(undamped(moments), mask)
    for row in (0, 1, 3):
        columns = mask[row].nonzero().squeeze(1)
        expected, residual = least_squares(x, y[:, [row]], columns)
        torch.testing.assert_close(weight[row, columns], expected[0])
        assert float(error(moments, weight)[row]) == pytest.approx(residual)
    assert not weight[~mask].any()
    assert float(error(moments, weight)[2]) == pytest.approx(float(y[:, 2].square().mean()))


def test_a_refit_of_convolution_groups_takes_each_groups_inputs() -> None:
    x, y = correlated(40, 6), correlated(40, 4, seed=1)
    weight = refit(undamped(moments_of(x.reshape(40, 2, 3), y)), torch.ones(4, 3, dtype=torch.bool))
    torch.testing.assert_close(weight[:2], least_squares(x, y[:, :2], torch.arange(3))[0])
    torch.testing.assert_close(weight[2:], least_squares(x, y[:, 2:], torch.arange(3, 6))[0])


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
    x[:, 5] = x[:, 4] + 1e-5 * x[:, 3]
    y = correlated(64, 4, seed=1)
    rows = torch.arange(4).unsqueeze(0)
    removal = eliminate(undamped(moments_of(x.unsqueeze(1), y)), rows, 1, 0.2)
    assert bool(removal.errors.isfinite().all())
    assert sorted(removal.order[0].tolist()) == list(range(6))


def test_sharing_out_keeps_what_is_missed_most() -> None:
    order = torch.tensor([[0, 1, 2], [2, 1, 0]])
    removal = Removal(order, torch.tensor([[1.0, 2.0, 3.0], [10.0, 5.0, 30.0]]))
    assert share_out(removal, 4).tolist() == [[False, False, True], [True, True, True]]
    assert share_out(removal, 2).tolist() == [[False, False, True], [True, False, False]]  # each keeps one
    assert share_out(removal, 1).tolist() == [[False, False, False], [True, False, False]]
    assert share_out(removal, 6).all()
    assert keep_in_each(removal, 1).tolist() == [[False, False, True], [True, False, False]]


def constraint(pattern: Pattern, weight: Tensor, keep: float, order: tuple[int, ...] | None = None) -> Constraint:
    groups = pattern.group_view(weight).shape[1]
    kept = pattern.n if isinstance(pattern, NM) else max(1, round(groups * keep))
    return Constraint(name="w", pattern=pattern, groups=groups, keep=kept, members=(Slice(tensor="w"),), order=order)


CASES: list[tuple[Pattern, tuple[int, ...], int]] = [
    (Block(4, 1), (16, 8, 3, 3), 1),
    (Block(2, 4), (16, 32), 1),
    (Block(4, 1), (16, 8, 3), 2),
    (Columns(2), (8, 16, 3), 1),
    (NM(2, 4), (8, 4, 3, 3), 1),
    (Unstructured(), (8, 4, 3, 3), 1),
    (Unstructured(), (8, 1, 3, 3), 8),
]


@pytest.mark.parametrize(("pattern", "shape", "groups"), CASES, ids=lambda x: str(x))
def test_a_selection_obeys_its_pattern_and_errs_less_than_magnitude(
    pattern: Pattern, shape: tuple[int, ...], groups: int
) -> None:
    columns = torch.Size(shape[1:]).numel()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.stack([correlated(400, columns, seed) for seed in range(groups)], dim=1)
    y = torch.cat([x[:, i] @ part.flatten(1).T for i, part in enumerate(weight.chunk(groups))], dim=1)
    moments = moments_of(x, y)
    damped = damp(moments, weight.flatten(1), 0.001)
    constraints = [constraint(pattern, weight, keep) for keep in (0.75, 0.5, 0.25)]
    losses, before = [], []
    for c, mask in zip(constraints, select(constraints, damped, shape, 0.1), strict=True):
        assert obeys(pattern, mask.reshape(shape), c.keep)
        assert int(mask.sum()) * c.groups == mask.numel() * c.keep
        losses.append(float(error(moments, refit(damped, mask)).sum()))
        assert losses[-1] < 0.7 * float(error(moments, weight.flatten(1) * mask).sum())
        by_magnitude = project(pattern, weight, c.keep).flatten(1)
        before.append(float(error(moments, refit(damped, by_magnitude)).sum()))
    assert losses == sorted(losses)
    assert sum(losses) < 0.9 * sum(before)


def test_rows_of_a_block_are_those_of_the_order() -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    weight = torch.zeros(8, 4, dtype=torch.float64)
    weight[::2, :2], weight[1::2, 2:] = 1.0, 1.0
    x = correlated(50, 4)
    damped = damp(moments_of(x.unsqueeze(1), x @ weight.T), weight, 1e-6)
    c = constraint(Block(4, 1), weight, 0.5, order)
    (mask,) = select([c], damped, (8, 4), 0.1)
    assert torch.equal(mask, weight != 0)


def test_inputs_that_never_vary_leave_the_weights() -> None:
    weight = torch.randn(3, 2, dtype=torch.float64)
    statistics = Statistics()
    statistics.add(torch.ones(5, 1, 2, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64))
    damped = damp(statistics.moments(), weight, 0.01)
    torch.testing.assert_close(refit(damped, torch.ones(3, 2, dtype=torch.bool)), weight)
