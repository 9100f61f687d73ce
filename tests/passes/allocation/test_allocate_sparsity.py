"""From an asked sparsity to how many groups every layer keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from slrc.errors import PatternError, PlanError
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity, what_last_layer_holds
from slrc.sparsity.choices import Allocation
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import NM, AnyPattern, Block, Channel, Columns, Unstructured
from slrc.sparsity.plans import Plan


def mlp(*widths: int) -> Program:
    torch.manual_seed(0)
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return capture(nn.Sequential(*layers), (torch.randn(2, widths[0]),), "mlp")


def reached(program: Program, plan: Plan) -> float:
    return Masks.project(plan, program.tensors).sparsity(plan)


def kept(plan: Plan) -> dict[str, tuple[int, int]]:
    return {c.name: (c.keep, c.groups) for c in plan}


def left_out(plan: Plan) -> dict[str, str]:
    return {x.name: x.reason for x in plan.left_out}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.sampled_from([2, 4, 8, 12, 20]), min_size=3, max_size=5),
    pattern=st.sampled_from([Unstructured(), Block(2, 1), Block(1, 2), Columns(2), Channel()]),
    sparsity=st.floats(0, 0.99),
    allocation=st.sampled_from([Allocation.UNIFORM, Allocation.GLOBAL]),
)
def test_the_asked_sparsity_is_met_to_within_one_group(
    widths: list[int], pattern: AnyPattern, sparsity: float, allocation: Allocation
) -> None:
    program = mlp(*widths)
    plan = allocate_sparsity(program, pattern, sparsity, allocation=allocation, keep_ends=False)
    plan.check(program.tensors, {})
    assert all(1 <= c.keep <= c.groups for c in plan)
    weights = np.array([c.num_weights(program.tensors) for c in plan])
    one_group = max(w / c.groups for w, c in zip(weights, plan, strict=True)) / weights.sum()
    if plan.shortfall:
        assert plan.sparsity < sparsity
        assert any(c.keep == 1 for c in plan)
    else:
        assert abs(plan.sparsity - sparsity) <= one_group + 1e-9
    assert reached(program, plan) == pytest.approx(plan.sparsity, abs=1e-9)


@pytest.mark.parametrize("allocation", [Allocation.UNIFORM, Allocation.GLOBAL])
def test_a_share_that_comes_out_even_is_met_exactly(allocation: Allocation) -> None:
    program = mlp(10, 4, 5)
    plan = allocate_sparsity(program, Unstructured(), 0.5, allocation=allocation, keep_ends=False)
    assert sum(c.keep for c in plan) == 30
    assert plan.sparsity == 0.5
    assert plan.shortfall == ""


def test_uniform_takes_the_same_share_of_every_layer() -> None:
    plan = allocate_sparsity(mlp(8, 16, 4), Unstructured(), 0.75, keep_ends=False)
    assert kept(plan) == {"0": (32, 128), "1": (16, 64)}


def test_global_prunes_where_the_mean_energy_is_least() -> None:
    program = mlp(4, 4, 4, 4)
    values = {"0.weight": 3.0, "1.weight": 1.0, "2.weight": 2.0}
    program = program.with_tensors({name: torch.full((4, 4), v) for name, v in values.items()})
    plan = allocate_sparsity(program, Block(2, 1), 0.5, allocation=Allocation.GLOBAL, keep_ends=False)
    assert kept(plan) == {"0": (8, 8), "1": (1, 8), "2": (3, 8)}


def test_global_compares_by_element_and_not_by_group() -> None:
    """A row of 16 small weights has more energy than a row of 2 larger ones, but less for each weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16, bias=False), nn.Linear(16, 4, bias=False))
    program = capture(model, (torch.randn(2, 2),))
    program = program.with_tensors({"0.weight": torch.full((16, 2), 1.0), "1.weight": torch.full((4, 16), 0.5)})
    plan = allocate_sparsity(program, Columns(1), 0.5, allocation=Allocation.GLOBAL, keep_ends=False)
    assert kept(plan) == {"0": (2, 2), "1": (4, 16)}


def test_global_keeps_one_group_of_every_layer_and_says_so() -> None:
    plan = allocate_sparsity(mlp(4, 4, 4), Columns(1), 0.95, allocation=Allocation.GLOBAL, keep_ends=False)
    assert kept(plan) == {"0": (1, 4), "1": (1, 4)}
    assert plan.shortfall == "asked 95.0%, reached 75.0%: 2 of 2 layers or groups are down to their last group"


def test_a_shortfall_is_explained() -> None:
    plan = allocate_sparsity(mlp(2, 8, 2, 8, 2), Columns(2), 0.9, skip=["1", "3"], keep_ends=False)
    assert kept(plan) == {"0": (1, 2), "2": (1, 2)}
    assert plan.sparsity == 0.5
    assert plan.shortfall == "asked 90.0%, reached 50.0%: 2 of 2 layers or groups are down to their last group"


def test_half_is_the_default_and_nothing_may_be_pruned() -> None:
    assert allocate_sparsity(mlp(4, 4, 4), Unstructured(), keep_ends=False).sparsity == 0.5
    assert allocate_sparsity(mlp(4, 4, 4), Unstructured(), 0.0, keep_ends=False).sparsity == 0.0


def test_the_ends_are_left_alone_by_default() -> None:
    plan = allocate_sparsity(mlp(4, 4, 4, 4), Unstructured(), 0.5)
    assert [*kept(plan)] == ["1"]
    assert left_out(plan) == {
        "0": "the first layer is left alone by default",
        "2": "the final classifier is left alone by default",
    }


def test_a_last_layer_with_most_of_the_model_is_pruned() -> None:
    large = mlp(4, 4, 4, 20)
    layers = [nn.Conv2d(4, 8, 1, 4), nn.Conv2d(8, 8, 3, 1, 1), nn.Upsample(scale_factor=4), nn.Conv2d(8, 8, 1)]
    slow = capture(nn.Sequential(*layers), (torch.randn(2, 4, 16, 16),))
    for program, held in ((large, "57% of the parameters"), (slow, "63% of the multiply-accumulates")):
        first, *others = program.layers.values()
        plan = allocate_sparsity(program, Unstructured(), 0.5)
        assert [*kept(plan)] == [layer.name for layer in others]
        assert [*left_out(plan)] == [first.name]
        assert [what_last_layer_holds(program, layer) for layer in (first, *others)] == [
            "",
            "",
            f"a last layer with {held}",
        ]


def test_coupled_ends(net: Any) -> None:
    model = net(
        lambda m, x: m.o(m.b(m.d(m.a(x)))),
        a=nn.Conv2d(3, 8, 1),
        d=nn.Conv2d(8, 8, 3, groups=8),
        b=nn.Conv2d(8, 8, 1),
        o=nn.Conv2d(8, 2, 1),
    )
    program = capture(model, (torch.randn(1, 3, 4, 4),))
    plan = allocate_sparsity(program, Channel(), 0.5)
    assert kept(plan) == {"b": (4, 8)}
    assert left_out(plan) == {"a": "the first layer is left alone by default", "o": "an output of the model"}
    assert [*kept(allocate_sparsity(program, Channel(), 0.5, keep_ends=False))] == ["a", "b"]


def test_layers_are_skipped_by_glob_and_by_module() -> None:
    model = nn.Sequential()
    model.stem = nn.Linear(4, 4)
    model.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.head = nn.Linear(4, 4)
    program = capture(model, (torch.randn(2, 4),), "m")
    for skip in (["body"], ["body.*"], ["bo*"]):
        plan = allocate_sparsity(program, Unstructured(), 0.5, skip=skip, keep_ends=False)
        assert [*kept(plan)] == ["stem", "head"]
        assert left_out(plan) == {"body.0": "skipped by the user", "body.1": "skipped by the user"}
    coupled = allocate_sparsity(program, Channel(), 0.5, skip=["body.1"], keep_ends=False)
    assert left_out(coupled)["body.1"] == "`body.1` is skipped by the user"
    with pytest.raises(PlanError, match=r"`--skip tail\.\*` matches no layer of m"):
        allocate_sparsity(program, Unstructured(), 0.5, skip=["tail.*"])


def test_a_skip_for_a_model_without_layers() -> None:
    with pytest.raises(PlanError, match="matches no layer") as caught:
        allocate_sparsity(capture(nn.ReLU(), (torch.randn(2, 4),)), Unstructured(), 0.5, skip=["a"])
    assert caught.value.hint is None


def test_n_of_m_prescribes_its_sparsity() -> None:
    plan = allocate_sparsity(mlp(8, 4, 4), NM(1, 4), keep_ends=False)
    assert kept(plan) == {"0": (1, 4), "1": (1, 4)}
    assert plan.sparsity == plan.sparsity_asked == 0.75
    assert allocate_sparsity(mlp(8, 4, 4), NM(1, 4), 0.75, keep_ends=False) == plan
    with pytest.raises(PatternError, match=r"pattern 1:4 prunes 75% of the weights, but sparsity 0\.5 was asked"):
        allocate_sparsity(mlp(8, 4, 4), NM(1, 4), 0.5)


def test_what_a_pattern_cannot_take_is_left_out_with_the_reason() -> None:
    plan = allocate_sparsity(mlp(6, 8, 4), NM(2, 4), keep_ends=False)
    assert left_out(plan) == {"0": "input channels must be a multiple of 4, got 6"}


def test_transposed_convolutions_take_blocks_of_their_outputs() -> None:
    layers = nn.ConvTranspose2d(4, 8, 2), nn.ConvTranspose2d(8, 6, 2), nn.ConvTranspose2d(6, 8, 2, groups=2)
    program = capture(nn.Sequential(*layers, nn.Conv2d(8, 8, 1)), (torch.randn(1, 4, 4, 4),))
    plan = allocate_sparsity(program, Block(8, 1), 0.5, keep_ends=False)
    assert kept(plan) == {"0": (8, 16), "3": (4, 8)}
    assert left_out(plan) == {
        "1": "outputs must be a multiple of 8, got 6",
        "2": "transposed convolutions in groups do not take block:8x1",
    }
    masks = Masks.project(plan, program.tensors)
    seen = masks.tensors["0.weight"].movedim(1, 0).flatten(1)
    assert (seen == seen[:1]).all()
    assert 0 < seen[0].float().mean() == 0.5
    masks.check(plan, program.tensors)
    plan.check(program.tensors, {name: layer.groups for name, layer in program.layers.items()})
    reasons = left_out(allocate_sparsity(program, NM(2, 4), keep_ends=False))
    assert reasons["0"] == "transposed convolutions do not take 2:4"
    assert [*kept(allocate_sparsity(program, Unstructured(), keep_ends=False))] == ["0", "1", "2", "3"]


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(PlanError, match=r"nothing in mlp can be pruned by 2:4: 0: input channels must .* got 6"):
        allocate_sparsity(mlp(6, 6), NM(2, 4), keep_ends=False)
    with pytest.raises(PlanError, match="it has no layers with weights"):
        allocate_sparsity(capture(nn.ReLU(), (torch.randn(2, 4),)), Unstructured())
    with pytest.raises(PlanError, match="0: an output of the model"):
        allocate_sparsity(mlp(4, 4), Channel())
    normed = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    expected = r"linear_1: its weight is computed, by \w+; 0: the first layer .*; 2: the final classifier"
    with pytest.raises(PlanError, match=expected):
        allocate_sparsity(capture(normed, (torch.randn(2, 4),)), Unstructured())


def test_a_group_of_one_unit_is_left_out(net: Any) -> None:
    model = net(
        lambda m, x: m.o(m.g(m.a(x))), a=nn.Conv2d(3, 4, 1), g=nn.Conv2d(4, 2, 1, groups=2), o=nn.Conv2d(2, 2, 1)
    )
    plan = allocate_sparsity(capture(model, (torch.randn(1, 3, 2, 2),)), Channel(), 0.5, keep_ends=False)
    assert kept(plan) == {"a": (1, 2)}
    assert left_out(plan)["g"] == "it has one channel only"


def test_widths_are_rounded_by_the_layers_of_a_group_not_by_its_small_parameters() -> None:
    class Gated(nn.Module):
        """Four heads of 4, each with a learned scalar."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.qkv, self.out = nn.Parameter(torch.ones(4)), nn.Linear(8, 48), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            a = nn.functional.scaled_dot_product_attention(q, k, v) * self.gate.view(1, 4, 1, 1)
            return self.out(a.transpose(1, 2).reshape(2, 5, 16))

    torch.manual_seed(0)
    program = capture(Gated(), (torch.randn(2, 5, 8),), "gated")
    plan = allocate_sparsity(program, Channel(), 0.5, round_to=8, keep_ends=False)
    assert {(c.keep, c.groups) for c in plan if "gate" in {s.tensor for s in c.members}} == {(2, 4)}
