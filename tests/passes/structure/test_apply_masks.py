"""Zeros written where the masks prune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slrc.ir.program import capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import NM, Block, Channel, Columns, Unstructured
from slrc.verify import compare, outputs_of


def model_of(net: Any, randomized: Any, *, tie: bool = False) -> nn.Module:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    if tie:
        b.weight = a.weight
    return randomized(
        net(lambda m, x: m.o(m.b(torch.relu(m.a(m.i(x))))), i=nn.Linear(8, 8), a=a, b=b, o=nn.Linear(8, 2))
    )


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1), Columns(2), NM(2, 4), Channel()])
def test_the_program_computes_what_the_masked_model_does(
    pattern: Any, tie: bool, net: Any, randomized: Any, masked_outputs: Any
) -> None:
    model = model_of(net, randomized, tie=tie)
    program = capture(model, (torch.ones(3, 8, dtype=torch.float64),))
    plan = allocate_sparsity(program, pattern)
    masks = Masks.project(plan, program.tensors)
    dense = outputs_of(program.module(), program.example_inputs)[0]
    masked, modified = ApplyMasks(masks)(program)
    assert modified
    compare(
        "eager = program",
        masked_outputs(model, program, masks),
        outputs_of(masked.module(), program.example_inputs),
        1e-12,
    )
    assert not torch.equal(dense, outputs_of(masked.module(), program.example_inputs)[0])
    assert torch.equal(dense, outputs_of(program.module(), program.example_inputs)[0])
    again = ApplyMasks(masks)(masked)
    assert not again.modified
    assert again.program is masked


def test_masks_that_keep_everything_are_left_alone(net: Any, randomized: Any) -> None:
    program = capture(model_of(net, randomized), (torch.ones(3, 8, dtype=torch.float64),))
    plan = allocate_sparsity(program, Unstructured(), 0.0)
    result = ApplyMasks(Masks.project(plan, program.tensors))(program)
    assert not result.modified
    assert result.program is program
