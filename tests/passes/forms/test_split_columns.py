"""Layers with `columns:R` masks as R smaller dense layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.forms.form import Form, FormKind, Forms
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.forms.split_columns import SplitColumns
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Columns
from slrc.sparsity.plans import Plan
from slrc.verify import compare, outputs_of

F = nn.functional
IMAGE, TOKENS, FLAT = (6, 5, 5), (5, 6), (6,)
Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], tuple[int, ...]]


def planned(case: Case, net: Any, randomized: Any, groups: int = 2) -> tuple[nn.Module, Program, Plan, Masks]:
    run, layers, shape = case
    model = randomized(net(run, **layers))
    torch.manual_seed(0)
    program = capture(model, (torch.randn(2, *shape, dtype=torch.float64),))
    plan = allocate_sparsity(program, Columns(groups), 0.5, keep_ends=False)
    return model, program, plan, Masks.project(plan, program.tensors)


def split(
    program: Program, plan: Plan, masks: Masks, groups: int = 2, kind: FormKind = FormKind.SPLIT
) -> tuple[Program, bool]:
    masked = ApplyMasks(masks)(program).program
    forms: Forms = dict.fromkeys(program.layers, Form(kind, groups))
    result, modified = SplitColumns(forms)(masked)
    assert not SplitColumns(forms)(result).modified
    return result, modified


def only(layer: nn.Module, shape: tuple[int, ...] = IMAGE) -> Case:
    return lambda m, x: m.a(x), {"a": layer}, shape


def tied() -> dict[str, Any]:
    a, b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
    b.weight = a.weight
    return {"a": a, "b": b}


CASES: dict[str, Case] = {
    "3x3": only(nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2)),
    "no bias": only(nn.Conv2d(6, 8, 3, bias=False)),
    "same padding": only(nn.Conv2d(6, 8, 3, padding="same")),
    "1x1": only(nn.Conv2d(6, 4, 1)),
    "one dimension": only(nn.Conv1d(6, 4, 3), (6, 5)),
    "linear": only(nn.Linear(6, 4), FLAT),
    "linear on tokens": only(nn.Linear(6, 4, bias=False), TOKENS),
    "module called twice": (lambda m, x: m.a(torch.relu(m.a(x))), {"a": nn.Conv2d(6, 6, 1)}, IMAGE),
    "tied weights, a bias each": (lambda m, x: m.b(torch.relu(m.a(x))), tied(), IMAGE),
    "without a batch": (lambda m, x: m.a(x[0])[None], {"a": nn.Conv2d(6, 4, 3)}, IMAGE),
    "a sequence without a batch": (lambda m, x: m.a(x[0])[None], {"a": nn.Conv1d(6, 4, 3)}, (6, 5)),
    "weight read elsewhere": (lambda m, x: m.a(x) + m.a.weight.sum(), {"a": nn.Conv2d(6, 4, 1)}, IMAGE),
    "input used twice": (
        lambda m, x: m.a(x) * m.b(x),
        {"a": nn.Conv2d(6, 4, 1), "b": nn.Conv2d(6, 4, 1)},
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("groups", [1, 2])
def test_it_rewrites(name: str, groups: int, net: Any, randomized: Any, masked_outputs: Any) -> None:
    model, program, plan, masks = planned(CASES[name], net, randomized, groups)
    result, modified = split(program, plan, masks, groups)
    assert modified
    assert result.batch_is_dynamic
    assert result.macs == sum(layer.macs for layer in program.layers.values()) // 2
    reference = masked_outputs(model, program, masks)
    compare("masked = split", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if isinstance(case[1]["a"], nn.Conv1d | nn.Conv2d)])
def test_it_groups(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    model, program, plan, masks = planned(CASES[name], net, randomized)
    result, modified = split(program, plan, masks, kind=FormKind.GROUPED)
    assert modified
    assert result.macs == sum(layer.macs for layer in program.layers.values()) // 2
    assert "cat" not in {op_name(n) for n in result.nodes}
    reference = masked_outputs(model, program, masks)
    compare("masked = grouped", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


def masks_of(rows: list[list[int]]) -> Masks:
    """A mask of a `(4, 6, 1, 1)` weight whose row groups keep these channels."""
    mask = torch.zeros(4, 6, 1, 1, dtype=torch.bool)
    for group, channels in enumerate(rows):
        mask[2 * group : 2 * group + 2, channels] = True
    return Masks({"a.weight": mask})


def test_every_row_group_gathers_its_own_channels(net: Any, randomized: Any) -> None:
    _, program, plan, _ = planned(CASES["1x1"], net, randomized)
    result, _ = split(program, plan, masks_of([[0, 2, 5], [1, 2, 3]]))
    assert [op_name(n) for n in result.nodes] == ["index_select", "conv2d", "index_select", "conv2d", "cat"]
    assert result.tensors["a.index_0"].tolist() == [0, 2, 5]
    assert result.tensors["a.index_1"].tolist() == [1, 2, 3]
    assert result.tensors["a.weight_1"].shape == (2, 3, 1, 1)
    assert torch.equal(result.tensors["a.weight_1"], program.tensors["a.weight"][2:, [1, 2, 3]])


def test_row_groups_with_the_same_channels_stay_one_layer(net: Any, randomized: Any) -> None:
    _, program, plan, _ = planned(CASES["1x1"], net, randomized)
    result, modified = split(program, plan, masks_of([[0, 2, 5], [0, 2, 5]]))
    assert modified
    assert [op_name(n) for n in result.nodes] == ["index_select", "conv2d"]
    assert result.tensors["a.weight_0"].shape == (4, 3, 1, 1)


@pytest.mark.parametrize(
    ("name", "groups", "kind", "empty"),
    [
        *[(name, 2, FormKind.SPLIT, [0]) for name in ("1x1", "3x3", "no bias", "one dimension", "linear")],
        *[(name, 2, FormKind.SPLIT, [1]) for name in ("1x1", "linear on tokens")],
        *[(name, 1, FormKind.SPLIT, [0]) for name in ("3x3", "no bias", "linear")],
        *[(name, 2, FormKind.GROUPED, [0, 1]) for name in ("1x1", "3x3", "no bias", "one dimension")],
    ],
)
def test_a_row_group_without_channels_gives_its_bias(
    name: str, groups: int, kind: FormKind, empty: list[int], net: Any, randomized: Any
) -> None:
    _, program, _, _ = planned(CASES[name], net, randomized)
    weight = program.tensors["a.weight"].clone()
    for group in empty:
        weight.chunk(groups)[group].zero_()
    program = program.with_tensors({"a.weight": weight})
    result, modified = SplitColumns({"a.weight": Form(kind, groups)})(program)
    assert modified
    reference, outputs = (outputs_of(p.module(), p.example_inputs) for p in (program, result))
    compare("dense = split", reference, outputs, 1e-10)


def test_a_layer_that_keeps_everything_is_left_alone(net: Any, randomized: Any) -> None:
    _, program, plan, _ = planned(CASES["1x1"], net, randomized)
    whole = plan.model_copy(update={"constraints": (plan.constraints[0].model_copy(update={"keep": 6}),)})
    assert not split(program, whole, Masks.project(whole, program.tensors))[1]


def test_a_computed_bias_is_left_alone(net: Any, randomized: Any) -> None:
    case: Case = (lambda m, x: F.conv2d(x, m.a.weight, m.a.bias * 2), {"a": nn.Conv2d(6, 4, 1)}, IMAGE)
    _, program, plan, masks = planned(case, net, randomized)
    assert not split(program, plan, masks)[1]


def test_other_forms_are_left_alone(net: Any, randomized: Any) -> None:
    _, program, plan, masks = planned(CASES["1x1"], net, randomized)
    assert not split(program, plan, masks, kind=FormKind.PACKED)[1]
    assert not SplitColumns()(program).modified
