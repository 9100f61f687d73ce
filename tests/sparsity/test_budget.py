"""The knapsack against all choices, and budgets of plans that are shared out for the weights as they are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from slrc.errors import PlanError
from slrc.sparsity.budget import TICKS, Budget, Menu, Option, choose_options
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Block, Channel
from slrc.sparsity.plans import Plan
from slrc.sparsity.slices import Slice
from slrc.sparsity.windows import Window


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_loses_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=4)
    # Times in whole ticks, so that nothing is rounded.
    ms = [rng.integers(0, TICKS // 3, size=n).astype(float) for n in sizes]
    losses = [rng.choice([0.0, *rng.random(3)], size=n) for n in sizes]
    found = choose_options(losses, ms, float(TICKS))
    within = [
        (sum(loss[k] for loss, k in zip(losses, ks, strict=True)), ks)
        for ks in product(*(range(n) for n in sizes))
        if sum(t[k] for t, k in zip(ms, ks, strict=True)) <= TICKS
    ]
    if not within:
        assert found is None
        return
    assert found is not None
    assert sum(t[k] for t, k in zip(ms, found, strict=True)) <= TICKS
    assert sum(loss[k] for loss, k in zip(losses, found, strict=True)) == pytest.approx(min(within)[0])


def test_a_budget_that_only_the_fastest_keep_to() -> None:
    ms = [np.array([3.0, 1.0 / 3]), np.array([1.0 / 3, 5.0])]
    losses = [np.array([0.0, 1.0]), np.array([1.0, 0.0])]
    assert choose_options(losses, ms, 2.0 / 3) == [1, 0]
    assert choose_options(losses, ms, 0.6) is None


def test_times_are_never_rounded_below_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ms = [rng.random(8) for _ in range(30)]
        losses = [np.sort(rng.random(8))[::-1][np.argsort(np.argsort(t))] for t in ms]
        budget = sum(t.min() for t in ms) * 1.5
        found = choose_options(losses, ms, budget)
        assert found is not None
        assert sum(t[k] for t, k in zip(ms, found, strict=True)) <= budget * (1 + 1e-9)


def plan_of(ms: float, **tensors: torch.Tensor) -> Plan:
    """Two layers of 8 outputs and 8 columns: dense takes 2 ms, each of the eight blocks that is dropped saves 0.25."""
    menus = [
        Menu(
            name=name,
            options=tuple(Option(pattern=Block(8, 1), groups=8, keep=k, ms=k / 4) for k in range(8, 0, -1)),
        )
        for name in tensors
    ]
    constraints = [
        Constraint(name=n, pattern=Block(8, 1), groups=8, keep=8, members=(Slice(tensor=n),)) for n in tensors
    ]
    return Plan(sparsity_asked=0, sparsity=0, constraints=tuple(constraints), budget=Budget(ms=ms, menus=tuple(menus)))


def test_a_budget_goes_where_energy_is() -> None:
    flat = torch.ones(8, 8)
    peaked = torch.full((8, 8), 0.01)
    peaked[:, :2] = 1.0
    plan = plan_of(2.5, flat=flat, peaked=peaked)
    kept = {c.name: c.keep for c in plan.reallocated({"flat": flat, "peaked": peaked})}
    assert kept == {"flat": 8, "peaked": 2}
    turned = {c.name: c.keep for c in plan.reallocated({"flat": peaked, "peaked": flat})}
    assert turned == {"flat": 2, "peaked": 8}


def test_options_go_there_and_back() -> None:
    tensors = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}
    plan = plan_of(2.0, **tensors)
    moved = plan.reallocated(tensors)
    assert moved != plan
    assert plan.with_options(moved.options()) == moved
    assert Plan.model_validate_json(moved.model_dump_json()) == moved
    assert plan.model_copy(update={"budget": None}).options() == {}


def test_what_an_option_counts() -> None:
    tensors = {"a": torch.ones(8, 8), "b": torch.ones(8, 8)}
    plan = plan_of(3.0, **tensors)
    assert plan.budget is not None
    heavy = plan.budget.menus[0].model_copy(
        update={"options": tuple(o.model_copy(update={"weight": 10.0}) for o in plan.budget.menus[0].options)}
    )
    weighed = plan.model_copy(update={"budget": Budget(ms=3.0, menus=(heavy, plan.budget.menus[1]))})
    assert {c.name: c.keep for c in weighed.reallocated(tensors)} == {"a": 8, "b": 4}


def test_a_budget_out_of_reach_says_what_is_least() -> None:
    tensors = {"a": torch.ones(8, 8), "b": torch.ones(8, 8)}
    with pytest.raises(PlanError, match=r"0\.100 ms cannot be met: .* take 0\.500 ms"):
        plan_of(0.1, **tensors).reallocated(tensors)


def test_a_pattern_sees_what_channels_leave() -> None:
    """Blocks are chosen among the outputs and inputs that are left, four at a time, and none is half gone."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(16, 8, 3, 3), "bias": torch.randn(16), "b": torch.randn(8, 16, 1, 1)}
    channels = Constraint(
        name="channels",
        pattern=Channel(),
        groups=16,
        keep=10,
        members=(Slice(tensor="a"), Slice(tensor="bias")),
        followers=(Slice(tensor="b", dim=1),),
    )
    blocks = [
        Constraint(name="a", pattern=Block(4, 1), groups=4 * 72, keep=2 * 72, members=(Slice(tensor="a"),)),
        Constraint(name="b", pattern=Block(4, 1), groups=2 * 16, keep=8, members=(Slice(tensor="b"),)),
    ]
    plan = Plan(sparsity_asked=0.5, sparsity=0.5, constraints=(channels, *blocks))
    masks = Masks.project(plan, tensors)
    masks.check(plan, tensors)
    rows = masks.tensors["bias"]
    assert int(rows.sum()) == 10
    slim = {"a": masks.tensors["a"][rows], "b": masks.tensors["b"][:, rows]}
    assert not masks.tensors["a"][~rows].any()
    assert not masks.tensors["b"][:, ~rows].any()
    full = torch.cat([slim["a"], slim["a"][-2:]])  # the last block has two outputs alone
    for mask, share in ((full, 0.5), (slim["b"], 0.25)):
        view = Block(4, 1).group_view(mask)
        assert bool((view == view[..., :1]).all())
        assert int(view[..., 0].sum()) == round(view.shape[1] * share)
    broken = {**masks.tensors, "a": masks.tensors["a"].clone()}
    broken["a"][rows.nonzero()[0], 0, 0, 0] ^= True
    with pytest.raises(PlanError, match="the mask of `a` does not obey block:4x1"):
        Masks(broken).check(plan)


def test_without_channels_a_weight_is_seen_whole() -> None:
    weight = torch.randn(8, 4, 3, 3)
    left = torch.ones(8, 4, 3, 3, dtype=torch.bool)
    assert Window.of(Block(4, 1), weight, None).is_whole
    assert Window.of(Block(4, 1), weight, left).is_whole
    left[0, 0, 0, 0] = False  # no rectangle: a grouped layer
    assert Window.of(Block(4, 1), weight, left).is_whole
