"""Transforms in order, each checked against the masked module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from slrc.errors import VerificationError
from slrc.forms.form import Form, FormKind, candidate_forms
from slrc.forms.packed_weight import block_density
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.base import PassResult, Transform
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.pipeline import apply_forms, baseline, run_passes, structure
from slrc.probes import make_probes
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import AnyPattern, Block, Channel, Columns
from slrc.sparsity.plans import Plan
from slrc.verify import Checker, compare, outputs_of


@dataclass(frozen=True)
class AddToBias(Transform):
    """A wrong pass: it adds to a bias, or only says that it did."""

    amount: float = 1.0
    honest: bool = True
    name: ClassVar[str] = "add-to-bias"

    def __call__(self, program: Program) -> PassResult:
        bias = program.tensors["3.bias"]
        return PassResult(program.with_tensors({"3.bias": bias + self.amount}), self.honest)


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    nn.init.normal_(model[2].running_mean)
    nn.init.uniform_(model[2].running_var, 0.5, 2)
    return capture(model, (torch.randn(2, 3, 6, 6),))


def planned(program: Program, pattern: AnyPattern) -> tuple[Plan, Masks, Checker]:
    plan = allocate_sparsity(program, pattern, 0.5)
    masks = Masks.project(plan, program.tensors)
    return plan, masks, checker(program, masks)


def checker(program: Program, masks: Masks) -> Checker:
    masked = program.with_tensors(masks.apply(program.tensors))
    return Checker(masked.module(), make_probes(program))


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        (Channel(), ["apply-masks", "shrink-channels", "fold-batch-norm"]),
        (Columns(2), ["apply-masks", "fold-batch-norm"]),
        (Block(4, 1), ["apply-masks", "fold-batch-norm"]),
    ],
)
def test_every_pass_that_modified_is_checked(program: Program, pattern: AnyPattern, steps: list[str]) -> None:
    plan, masks, check = planned(program, pattern)
    result = structure(program, plan, masks, check.program)
    assert [found.step for found in check.checks] == [f"masked module = {step}" for step in steps]
    for found in check.checks:
        assert found.inputs == ("example", "random", "random, batch 3")
        assert 0 < found.max_rel_error < 1e-5
    assert result.macs < program.macs or not isinstance(pattern, Channel)


def test_permuted_blocks_are_packed(program: Program) -> None:
    program = program.with_tensors({"1.weight": alike_rows(8, 8, 3, 3)})
    plan = allocate_sparsity(program, Block(4, 1), 0.5, permute=True)
    masks = Masks.project(plan, program.tensors)
    check = checker(program, masks)
    slim = structure(program, plan, masks, check.program)
    steps = ["apply-masks", "permute-channels", "fold-batch-norm"]
    assert [found.step for found in check.checks] == [f"masked module = {step}" for step in steps]
    assert block_density(slim.tensors["1.weight"], 4) <= 0.5 < block_density(masks.tensors["1.weight"], 4)
    packed = apply_forms(slim, {"1.weight": Form(FormKind.PACKED, 4)}, check.program)
    assert check.checks[-1].step == "masked module = pack-blocks"
    assert packed.macs < slim.macs


def alike_rows(*shape: int) -> torch.Tensor:
    """Return a weight whose even rows have the same large columns, and whose odd rows have the others."""
    large = torch.rand(shape[1:]) < 0.5
    return torch.stack([torch.where(large ^ bool(i % 2), 1.0, 0.01) * torch.randn(shape[1:]) for i in range(shape[0])])


@pytest.mark.parametrize("kind", ["split", "grouped", "packed"])
def test_forms_follow_structure(program: Program, kind: str) -> None:
    plan, masks, check = planned(program, Columns(2))
    slim = structure(program, plan, masks)
    pruned = {m.tensor for constraint in plan for m in constraint.members}
    candidates = {w: candidate_forms(slim.tensors[w], x.op) for w, x in slim.layers.items() if w in pruned}
    forms = {w: f for w, found in candidates.items() for f in found if f.kind == kind and f.size < 8}
    assert list(forms) == ["1.weight", "3.weight"]
    result = apply_forms(slim, forms, check.program)
    assert [found.step for found in check.checks] == [
        "masked module = " + ("pack-blocks" if kind == "packed" else "split-columns")
    ]
    assert result.macs < program.macs


def test_the_dense_model_is_folded_too(program: Program) -> None:
    dense = outputs_of(program.module(), program.example_inputs)
    result = baseline(program)
    compare("dense = baseline", dense, outputs_of(result.module(), program.example_inputs), 1e-5)
    assert result.num_parameters == program.num_parameters - 16


def test_a_wrong_pass_is_reported_by_name(program: Program) -> None:
    _, masks, check = planned(program, Channel())
    with pytest.raises(VerificationError, match="masked module = add-to-bias") as caught:
        run_passes((ApplyMasks(masks), AddToBias()), program, check.program)
    assert "tolerance 1e-05" in caught.value.message


def test_a_difference_within_the_tolerance_passes(program: Program) -> None:
    _, masks, check = planned(program, Channel())
    run_passes((ApplyMasks(masks), AddToBias(amount=1e-7)), program, check.program)
    assert [found.step for found in check.checks] == ["masked module = apply-masks", "masked module = add-to-bias"]
    assert 0 < check.checks[-1].max_rel_error < 1e-5


def test_without_a_checker_nothing_is_checked(program: Program) -> None:
    result = run_passes((AddToBias(),), program)
    assert torch.equal(result.tensors["3.bias"], program.tensors["3.bias"] + 1)


def test_a_pass_that_modified_nothing_is_not_checked(program: Program) -> None:
    _, _, check = planned(program, Channel())
    run_passes((AddToBias(amount=0, honest=False),), program, check.program)
    assert check.checks == []
