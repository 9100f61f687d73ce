"""The refit of one layer against least squares, and what the patterns select."""

from __future__ import annotations

import pytest
import torch
from layer_moments import correlated, least_squares, moments_of, undamped
from torch import Tensor

from slrc.reconstruction.select import select
from slrc.reconstruction.solve import damp, error, refit, supports
from slrc.reconstruction.statistics import Statistics
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.patterns import NM, Block, Columns, Pattern, Unstructured
from slrc.sparsity.projection import obeys, project
from slrc.sparsity.slices import Slice


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


def test_a_refit_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = correlated(50, 8), correlated(50, 6, seed=1)
    damped = undamped(moments_of(x.unsqueeze(1), y))
    mask = (torch.arange(8) + torch.arange(6).unsqueeze(1) // 2) % 3 > 0  # two rows share a support
    whole = refit(damped, mask)
    monkeypatch.setattr("slrc.reconstruction.solve.FACTOR_NUMBERS", 60)
    parts = [part.rows.tolist() for part in supports(damped, mask)]
    assert len(parts) > 1
    assert sorted(row for part in parts for row in part) == list(range(6))
    torch.testing.assert_close(refit(damped, mask), whole)


def test_a_refit_of_convolution_groups_takes_each_groups_inputs() -> None:
    x, y = correlated(40, 6), correlated(40, 4, seed=1)
    weight = refit(undamped(moments_of(x.reshape(40, 2, 3), y)), torch.ones(4, 3, dtype=torch.bool))
    torch.testing.assert_close(weight[:2], least_squares(x, y[:, :2], torch.arange(3))[0])
    torch.testing.assert_close(weight[2:], least_squares(x, y[:, 2:], torch.arange(3, 6))[0])


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
