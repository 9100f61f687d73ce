"""Plans and masks: as data on disk, and on tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slrc.errors import OutputError, PlanError
from slrc.sparsity.choices import LayerNorm
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import NM, Block, Channel, Columns, Unstructured
from slrc.sparsity.plans import PLAN_SCHEMA_VERSION, LeftOut, Plan
from slrc.sparsity.slices import Slice

SHUFFLED = (5, 0, 3, 6, 1, 7, 2, 4)


def plan_of(*constraints: Constraint) -> Plan:
    return Plan(sparsity_asked=0.5, sparsity=0.5, constraints=constraints)


COUPLED = Constraint(
    name="conv",
    pattern=Channel(),
    groups=4,
    keep=3,
    members=(
        Slice(tensor="conv.weight"),
        Slice(tensor="bias", index=(6, 0, 7, 1)),
    ),
    followers=(Slice(tensor="head.weight", dim=1, index=(0, 1, 4, 5, 2, 3, 6, 7)),),
)
"""Four units: one row each of `conv.weight`, one place each in `bias`, two columns each of `head.weight`."""


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2),
        "bias": torch.randn(8),
        "head.weight": torch.randn(5, 8),
        "w": torch.randn(8, 8),
    }


@pytest.fixture
def plan() -> Plan:
    return Plan(
        sparsity_asked=0.5,
        sparsity=0.49,
        shortfall="because",
        constraints=(
            COUPLED,
            Constraint(name="w", pattern=Block(4, 1), groups=16, keep=5, members=(Slice(tensor="w"),)),
            Constraint(name="v", pattern=NM(2, 4), groups=4, keep=2, members=(Slice(tensor="v"),)),
        ),
        left_out=(LeftOut(name="head", reason="the final classifier"),),
    )


def test_json_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_an_older_plan_keeps_what_norms_see(plan: Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json")
    del data["layer_norm"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.load(tmp_path / "plan.json").layer_norm is LayerNorm.KEEP
    narrow = plan.model_copy(update={"layer_norm": LayerNorm.NARROW})
    narrow.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == narrow


def test_json_is_readable(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["schema_version"] == PLAN_SCHEMA_VERSION
    first = data["constraints"][0]
    assert first["pattern"] == "channel"
    assert first["members"] == [
        {"tensor": "conv.weight", "dim": 0, "index": None},
        {"tensor": "bias", "dim": 0, "index": "6:7,0:1,7:8,1:2"},
    ]
    assert first["followers"][0]["index"] == "0:2,4:6,2:4,6:8"


@given(st.lists(st.integers(0, 40), min_size=1))
def test_index_ranges_round_trip(index: list[int]) -> None:
    where = Slice(tensor="w", index=tuple(index))
    assert Slice.model_validate_json(where.model_dump_json()) == where


def test_an_order_is_read_and_written_as_places(plan: Plan, tmp_path: Path) -> None:
    ordered = edited(plan.constraints[1], order=SHUFFLED)
    plan = plan.model_copy(update={"constraints": (plan.constraints[0], ordered)})
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert [c["order"] for c in data["constraints"]] == [None, "5,0,3,6,1,7,2,4"]
    assert Plan.load(tmp_path / "plan.json") == plan
    del data["constraints"][1]["order"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.load(tmp_path / "plan.json").constraints[1].order is None


Edit = Callable[[dict[str, Any]], Any]


def constraint(**fields: Any) -> Edit:
    return lambda data: data["constraints"][1].update(fields)


def member(**fields: Any) -> Edit:
    return lambda data: data["constraints"][0]["members"][1].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(schema_version=2), "has schema version 2, expected 1"),
        (lambda data: data.pop("schema_version"), "has schema version None"),
        (lambda data: data.pop("sparsity"), "field `sparsity`: Field required"),
        (lambda data: data.update(extra=1), "field `extra`: Extra inputs are not permitted"),
        (constraint(pattern="blok:8x1"), "plan.json`: unknown pattern `blok:8x1`"),
        (constraint(pattern=3), "plan.json`: unknown pattern `3`"),
        (constraint(keep=0), "field `constraints.1.keep`: Input should be greater than or equal to 1"),
        (constraint(members=[]), r"field `constraints.1.members`: .* at least 1 item"),
        (constraint(order="3;1"), r"field `constraints.1.order`: .*expected places like `3,0,1,2`, got `3;1`"),
        (constraint(order=""), "expected places like"),
        (constraint(order="0:8"), "expected places like"),
        (member(index="5"), r"field `constraints.0.members.1.index`: .*expected ranges like `0:64,128:192`, got `5`"),
        (member(index="a:b"), "expected ranges like"),
        (member(index=""), "expected ranges like"),
        (member(index="8:0"), "expected ranges like"),
    ],
)
def test_a_broken_plan_is_refused(plan: Plan, tmp_path: Path, edit: Edit, message: str) -> None:
    data = json.loads(plan.model_dump_json())
    edit(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)


W = Constraint(name="w", pattern=Unstructured(), groups=64, keep=9, members=(Slice(tensor="w"),))


def edited(of: Constraint, **fields: Any) -> Constraint:
    return of.model_copy(update=fields)


def edited_dim(of: Constraint) -> Slice:
    return of.members[0].model_copy(update={"dim": 7})


def elsewhere(**fields: Any) -> Constraint:
    """`COUPLED` with another slice of its bias."""
    return edited(COUPLED, members=(COUPLED.members[0], COUPLED.members[1].model_copy(update=fields)))


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ([edited(W, members=(Slice(tensor="gone"),))], "the model has no tensor `gone`"),
        ([edited(W, members=(edited_dim(W),))], "has no dimension 7"),
        ([edited(W, groups=63)], "constraint `w`: expected 64 groups, got 63"),
        ([edited(W, keep=65)], "cannot keep 65 of 64 groups"),
        ([edited(W, pattern=Block(3, 1))], "cannot apply block:3x1 to `w`: outputs must be a multiple of 3, got 4"),
        ([edited(W, pattern=Block(8, 1), groups=8)], "cannot apply block:8x1 to `w`.*got 4"),
        ([edited(W, pattern=NM(2, 4), groups=4, keep=3)], "2:4 keeps 2 of 4, got 3"),
        ([edited(W, pattern=NM(2, 4), members=(Slice(tensor="bias"),))], "2:4 to `bias`: it has no input channels"),
        ([edited(W, pattern=Columns(2), members=(Slice(tensor="bias"),))], "to `bias`: it has no input channels"),
        ([W, W], "constraint `w` appears twice"),
        ([edited(W, order=SHUFFLED[:7])], r"`order` does not name every output of `w` of shape \(8, 8\) once"),
        ([edited(W, order=(0, *SHUFFLED[:7]))], "`order` does not name every output of `w`"),
        ([edited(W, order=(8, *SHUFFLED[1:]))], "`order` does not name every output of `w`"),
        ([edited(COUPLED, order=(1, 0, 2, 3))], "constraint `conv`: channel has no order of outputs"),
        ([edited(COUPLED, groups=3)], r"`conv.weight` of shape \(4, 3, 2, 2\) does not have its units"),
        ([edited(COUPLED, keep=5)], "cannot keep 5 of 4 groups"),
        ([elsewhere(index=(0, 1, 2))], r"`bias` of shape \(8,\) does not have its units"),
        ([elsewhere(index=(0, 1, 2, 8))], r"`bias` of shape \(8,\) does not have its units"),
        ([elsewhere(index=(0, 1, 2, 2))], r"`bias` of shape \(8,\) does not have its units"),
        ([elsewhere(index=())], r"`bias` of shape \(8,\) does not have its units"),
        ([elsewhere(dim=1)], r"`bias` of shape \(8,\) does not have its units"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    tensors: dict[str, Tensor], constraints: list[Constraint], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(*constraints).check(tensors, {"w": 2})


def test_a_plan_that_fits_passes(tensors: dict[str, Tensor]) -> None:
    plan_of(COUPLED, W).check(tensors, {"w": 1})


def test_a_coupled_group_is_gathered_unit_by_unit(tensors: dict[str, Tensor]) -> None:
    seen = COUPLED.gather(tensors)
    assert seen.shape == (4, 3 * 2 * 2 + 1)
    assert torch.equal(seen[:, :12], tensors["conv.weight"].reshape(4, 12))
    assert torch.equal(seen[:, 12], tensors["bias"][[6, 0, 7, 1]])
    assert COUPLED.num_weights(tensors) == 52
    assert COUPLED.kept_weights(tensors) == 39


def test_pruning_a_unit_clears_members_and_followers_where_they_lie(tensors: dict[str, Tensor]) -> None:
    tensors["conv.weight"][2] = 0
    tensors["bias"][7] = 0
    masks = Masks.project(plan_of(COUPLED), tensors)
    assert masks.surviving_units(COUPLED).tolist() == [True, True, False, True]
    assert masks.tensors["conv.weight"].flatten(1).all(dim=1).tolist() == [True, True, False, True]
    assert (~masks.tensors["bias"]).nonzero().flatten().tolist() == [7]
    assert (~masks.tensors["head.weight"]).any(dim=0).nonzero().flatten().tolist() == [2, 3]
    assert masks.sparsity(plan_of(COUPLED)) == pytest.approx(1 / 4)


def test_a_unit_wider_than_one_row_of_a_member() -> None:
    pairs = Constraint(name="p", pattern=Channel(), groups=2, keep=1, members=(Slice(tensor="w", index=(0, 2, 1, 3)),))
    weight = torch.tensor([[1.0], [3.0], [1.0], [0.0]])
    masks = Masks.project(plan_of(pairs), {"w": weight})
    assert masks.tensors["w"].flatten().tolist() == [False, True, False, True]


def test_masks_of_several_constraints_on_one_tensor_meet(tensors: dict[str, Tensor]) -> None:
    left = Constraint(name="a", pattern=Channel(), groups=4, keep=2, members=(Slice(tensor="w", index=(0, 1, 2, 3)),))
    right = edited(left, name="b", keep=1, members=(Slice(tensor="w", index=(4, 5, 6, 7)),))
    plan = plan_of(left, right)
    masks = Masks.project(plan, tensors)
    kept = masks.tensors["w"].all(dim=1)
    assert [int(kept[:4].sum()), int(kept[4:].sum())] == [2, 1]
    masks.check(plan)


def test_weights_under_two_constraints_are_counted_once(tensors: dict[str, Tensor]) -> None:
    channels = edited(COUPLED, groups=8, keep=4, members=(Slice(tensor="w"), Slice(tensor="bias")), followers=())
    plan = plan_of(channels, edited(W, pattern=Unstructured(), groups=64, keep=32))
    # Half of the rows are left of `w` and of the bias, and half of what these rows of `w` hold.
    assert Masks.project(plan, tensors).sparsity(plan) == pytest.approx((48 + 4) / (64 + 8))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1), Columns(2), NM(2, 4)])
def test_projected_masks_pass_their_own_check(tensors: dict[str, Tensor], pattern: Any) -> None:
    groups = pattern.group_view(tensors["w"]).shape[1]
    plan = plan_of(edited(W, pattern=pattern, groups=groups, keep=groups // 2))
    masks = Masks.project(plan, tensors)
    masks.check(plan)
    assert masks.sparsity(plan) == 0.5
    everything = Masks({"w": torch.ones(8, 8, dtype=torch.bool)})
    with pytest.raises(PlanError, match="does not obey"):
        everything.check(plan)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1), Columns(2), NM(2, 4)])
def test_an_order_is_that_of_the_pattern_not_of_the_weight(tensors: dict[str, Tensor], pattern: Any) -> None:
    groups = pattern.group_view(tensors["w"]).shape[1]
    plain = edited(W, pattern=pattern, groups=groups, keep=groups // 2)
    ordered = edited(plain, order=SHUFFLED)
    plan = plan_of(ordered)
    plan.check(tensors, {})
    masks = Masks.project(plan, tensors)
    masks.check(plan, tensors)
    moved = Masks.project(plan_of(plain), {"w": tensors["w"][list(SHUFFLED)]})
    assert torch.equal(masks.tensors["w"][list(SHUFFLED)], moved.tensors["w"])
    assert masks.sparsity(plan) == 0.5
    with pytest.raises(PlanError, match="does not name every output"):
        Masks({"w": torch.ones(4, 16, dtype=torch.bool)}).check(plan)


def test_blocks_of_an_order_are_not_those_of_another(tensors: dict[str, Tensor]) -> None:
    plain = edited(W, pattern=Block(4, 1), groups=16, keep=8)
    masks = Masks.project(plan_of(edited(plain, order=SHUFFLED)), tensors)
    with pytest.raises(PlanError, match="does not obey"):
        masks.check(plan_of(plain))


def test_check_wants_every_mask_and_counts_channels() -> None:
    with pytest.raises(PlanError, match=r"no mask for `conv\.weight`"):
        Masks({}).check(plan_of(COUPLED))
    shapes = {"conv.weight": (4, 3, 2, 2), "bias": (8,)}
    everything = Masks({n: torch.ones(s, dtype=torch.bool) for n, s in shapes.items()})
    with pytest.raises(PlanError, match="keep more than 3 of 4 channels"):
        everything.check(plan_of(COUPLED))


@pytest.mark.parametrize("shape", [(3, 3, 2, 2), (4,), (4, 3, 4), (4, 3, 1, 1), (4, 3, 2, 2, 1)])
def test_check_compares_shapes_with_the_tensors(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    masks = Masks({**Masks.project(plan_of(COUPLED), tensors).tensors})
    masks.check(plan_of(COUPLED), tensors)
    other = Masks({**masks.tensors, "conv.weight": torch.zeros(shape, dtype=torch.bool)})
    with pytest.raises(PlanError, match=r"the mask of `conv\.weight` has shape \(.*\), expected \(4, 3, 2, 2\)"):
        other.check(plan_of(COUPLED), tensors)


@pytest.mark.parametrize(
    ("constraint", "name", "shape", "message"),
    [
        (COUPLED, "conv.weight", (3, 3, 2, 2), r"`conv\.weight` of shape \(3, 3, 2, 2\) does not have its units"),
        (COUPLED, "bias", (6,), r"`bias` of shape \(6,\) does not have its units"),
        (COUPLED, "head.weight", (5,), r"`head\.weight` of shape \(5,\) does not have its units"),
        (W, "w", (8, 7), "the mask of `w` of shape .* does not fit unstructured: expected 64 groups, got 56"),
        (edited(W, pattern=Block(4, 1), groups=16), "w", (6, 8), "fit block:4x1: outputs must be a multiple of 4"),
        (edited(W, pattern=NM(2, 4), groups=4, keep=2), "w", (8,), "fit 2:4: it has no input channels"),
    ],
)
def test_check_tells_a_mask_of_another_shape_without_the_tensors(
    tensors: dict[str, Tensor], constraint: Constraint, name: str, shape: tuple[int, ...], message: str
) -> None:
    masks = Masks.project(plan_of(constraint), tensors)
    masks.check(plan_of(constraint))
    with pytest.raises(PlanError, match=message):
        Masks({**masks.tensors, name: torch.zeros(shape, dtype=torch.bool)}).check(plan_of(constraint))


def test_apply_copies_and_apply_in_place_prunes(tensors: dict[str, Tensor]) -> None:
    plan = plan_of(W)
    masks = Masks.project(plan, tensors)
    before = tensors["w"].clone()
    pruned = masks.apply(tensors)
    assert torch.equal(tensors["w"], before)
    assert torch.equal(pruned["w"], before * masks.tensors["w"])
    assert int((pruned["w"] != 0).sum()) == 9
    parameter = torch.nn.Parameter(before.clone())
    masks.apply_({"w": parameter})
    assert torch.equal(parameter, pruned["w"])


def test_masks_round_trip_on_disk(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    masks = Masks.project(plan_of(COUPLED, W), tensors)
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors").tensors
    assert loaded.keys() == masks.tensors.keys() == {"conv.weight", "bias", "head.weight", "w"}
    assert all(torch.equal(loaded[n], m) for n, m in masks.tensors.items())


def test_broken_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "masks.safetensors").write_bytes(b"nothing")
    for path in (tmp_path / "masks.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(OutputError, match="cannot be read"):
            Masks.load(path)


def test_no_constraints_have_no_sparsity() -> None:
    assert Masks({}).sparsity(plan_of()) == 0.0


def test_a_transposed_weight_is_seen_outputs_first() -> None:
    weight = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    member = Slice(tensor="up.weight", dim=1)
    c = Constraint(name="up", pattern=Block(4, 1), groups=24, keep=6, members=(member,))
    mask = c.project({"up.weight": weight})
    assert mask.shape == (8, 3, 2, 2)
    masks = {"up.weight": torch.ones(weight.shape, dtype=torch.bool)}
    c.scatter(mask, masks, followers=False)
    assert masks["up.weight"].float().mean() == 0.25
    assert torch.equal(c.gather(masks), mask)
    assert c.obeyed_by(c.gather(masks))
    factors, scaled = torch.rand(1, 24), {"up.weight": weight.clone()}
    c.scale_(scaled, factors)
    torch.testing.assert_close(c.energies(scaled), c.energies({"up.weight": weight}) * factors**2)
    assert Constraint.model_validate_json(c.model_dump_json()) == c
