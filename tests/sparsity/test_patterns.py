"""Patterns: their text, their views and the projection on their sets."""

from __future__ import annotations

import re
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slrc.errors import PatternError
from slrc.sparsity.patterns import NM, AnyPattern, Block, Channel, Columns, Unstructured, parse_pattern
from slrc.sparsity.projection import obeys, project

TEXTS = {
    "unstructured": Unstructured(),
    "block:8x1": Block(8, 1),
    "block:4x16": Block(4, 16),
    "columns:2": Columns(2),
    "channel": Channel(),
    "2:4": NM(2, 4),
    "1:16": NM(1, 16),
}
SMALL: list[tuple[AnyPattern, tuple[int, ...]]] = [
    (Unstructured(), (2, 3)),
    (Unstructured(), (2, 1, 2, 2)),
    (Block(2, 1), (4, 3)),
    (Block(2, 3), (4, 3, 1, 2)),
    (Block(1, 2), (2, 2, 1, 2)),
    (Block(2, 2), (2, 4)),
    (Columns(1), (2, 4)),
    (Columns(2), (4, 3)),
    (Columns(2), (2, 4, 2, 1)),
    (Channel(), (5, 3)),
    (NM(2, 4), (1, 8)),
    (NM(1, 2), (1, 4, 2, 1)),
    (NM(2, 3), (2, 3)),
]
"""Weights small enough to try every admissible mask."""


def ids(case: tuple[AnyPattern, tuple[int, ...]]) -> str:
    return f"{case[0]}-{'x'.join(map(str, case[1]))}"


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_value_round_trip(text: str) -> None:
    assert parse_pattern(text) == TEXTS[text]
    assert str(TEXTS[text]) == text


def test_space_around_the_text_is_allowed() -> None:
    assert parse_pattern(" 2:4\n") == NM(2, 4)


@pytest.mark.parametrize("text", ["", "block", "block:8", "block:8x1x1", "block:-1x2", "columns:", "2:4:8", "Channel"])
def test_unknown_text_names_the_forms(text: str) -> None:
    with pytest.raises(
        PatternError, match="expected auto, unstructured, block:RxC, columns:R, channel or N:M"
    ) as caught:
        parse_pattern(text)
    assert f"`{text}`" in caught.value.message
    assert caught.value.hint is not None


@pytest.mark.parametrize("text", ["block:0x1", "block:8x0", "columns:0", "0:4", "4:4", "5:4"])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match="must be at least 1, and N below M"):
        parse_pattern(text)


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_from_group_view_inverts_group_view(case: tuple[AnyPattern, tuple[int, ...]]) -> None:
    pattern, shape = case
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = pattern.group_view(weight)
    assert view.dim() == 3
    assert torch.equal(pattern.from_group_view(view, shape), weight)


def test_a_block_is_of_input_channels_at_one_kernel_position() -> None:
    weight = torch.zeros(4, 4, 3, 3)
    weight[2:, :2, 1, 2] = 1  # one block
    weight[:2, 2, 0, :2] = 2  # parts of two
    energies = Block(2, 2).group_view(weight).square().sum(dim=2).flatten()
    assert sorted(energies[energies > 0].tolist()) == [4.0, 8.0, 8.0]
    assert obeys(Block(2, 2), weight[2:] != 0, 1)


def admissible_masks(pattern: AnyPattern, shape: tuple[int, ...], keep: int) -> list[Tensor]:
    """Every mask with `keep` groups in each row of the view."""
    rows, groups, size = pattern.group_view(torch.zeros(shape)).shape
    masks = []
    for chosen in product(combinations(range(groups), keep), repeat=rows):
        view = torch.zeros(rows, groups, size, dtype=torch.bool)
        for row, kept in enumerate(chosen):
            view[row, list(kept)] = True
        masks.append(pattern.from_group_view(view, shape))
    return masks


@pytest.mark.parametrize("case", SMALL, ids=ids)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_projection_keeps_the_most_energy_of_all_masks(
    case: tuple[AnyPattern, tuple[int, ...]], data: st.DataObject
) -> None:
    pattern, shape = case
    numel = torch.Size(shape).numel()
    values = data.draw(
        st.lists(st.integers(-3, 3), min_size=numel, max_size=numel), "values, ties and zeros among them"
    )
    keep = data.draw(st.integers(1, pattern.group_view(torch.zeros(shape)).shape[1]), "keep")
    weight = torch.tensor(values, dtype=torch.float32).reshape(shape)
    mask = project(pattern, weight, keep)
    others = admissible_masks(pattern, shape, keep)
    assert any(torch.equal(mask, other) for other in others)
    assert (weight * mask).square().sum() == max((weight * other).square().sum() for other in others)


@pytest.mark.parametrize("case", SMALL, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_exactly_keep_survive_where_all_are_equal(
    case: tuple[AnyPattern, tuple[int, ...]], dtype: torch.dtype, value: float
) -> None:
    pattern, shape = case
    groups = pattern.group_view(torch.zeros(shape)).shape[1]
    for keep in range(1, groups + 1):
        mask = project(pattern, torch.full(shape, value, dtype=dtype), keep)
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        view = pattern.group_view(mask)
        assert torch.equal(view.all(dim=2), view.any(dim=2))
        assert (view.all(dim=2).sum(dim=1) == keep).all()


def test_energies_of_half_precision_do_not_overflow() -> None:
    weight = torch.tensor([[300.0, 400.0, 500.0]], dtype=torch.float16)
    assert project(Unstructured(), weight, 1).tolist() == [[False, False, True]]


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_obeys_counts_whole_groups(case: tuple[AnyPattern, tuple[int, ...]]) -> None:
    pattern, shape = case
    rows, groups, size = pattern.group_view(torch.zeros(shape)).shape
    mask = project(pattern, torch.randn(shape, generator=torch.Generator().manual_seed(0)), 1)
    assert obeys(pattern, mask, 1)
    assert obeys(pattern, torch.zeros_like(mask), 1)
    assert obeys(pattern, torch.ones_like(mask), groups)
    assert not obeys(pattern, torch.ones_like(mask), groups - 1)
    if size > 1:
        partial = torch.zeros(rows, groups, size, dtype=torch.bool)
        partial[0, 0, 0] = True
        assert not obeys(pattern, pattern.from_group_view(partial, shape), groups)


@pytest.mark.parametrize(
    ("pattern", "shape", "conv_groups", "reason"),
    [
        (Unstructured(), (3, 1, 3, 3), 3, None),
        (Block(8, 1), (16, 3, 3, 3), 1, None),
        (Block(8, 1), (12, 3, 3, 3), 1, "outputs must be a multiple of 8, got 12"),
        (Block(8, 1), (16, 4, 3, 3), 4, "outputs must be a multiple of 8, got 4"),
        (Block(1, 4), (8, 3, 3, 3), 1, "input channels must be a multiple of 4, got 3"),
        (Block(2, 3), (8, 1, 3, 3), 8, "a depthwise weight has one input channel per output"),
        (Columns(2), (6, 5), 1, None),
        (Columns(2), (5, 5), 1, "outputs must be a multiple of 2, got 5"),
        (Columns(2), (8, 2, 1, 1), 4, r"a grouped convolution \(4 groups\) cannot be split"),
        (Columns(2), (8,), 1, "it has no input channels"),
        (Channel(), (7, 3), 1, None),
        (NM(2, 4), (3, 8, 3, 3), 1, None),
        (NM(2, 4), (3, 59, 3, 3), 1, "input channels must be a multiple of 4, got 59"),
        (NM(2, 4), (8, 1, 3, 3), 8, "input channels must be a multiple of 4, got 1"),
        (NM(2, 4), (8,), 1, "it has no input channels"),
    ],
)
def test_why_not_gives_the_reason(
    pattern: AnyPattern, shape: tuple[int, ...], conv_groups: int, reason: str | None
) -> None:
    given = pattern.why_not(shape, conv_groups)
    if reason is None:
        assert given is None
    else:
        assert given is not None
        assert re.search(reason, given)


def test_only_n_of_m_prescribes_its_sparsity() -> None:
    assert NM(1, 4).fixed_sparsity == 0.75
    assert [p.fixed_sparsity for p in (Unstructured(), Block(8, 1), Columns(2), Channel())] == [None] * 4


def test_only_channel_constrains_coupled_tensors() -> None:
    assert [p for p in TEXTS.values() if p.coupled] == [Channel()]
