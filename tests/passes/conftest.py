"""What the tests of passes share: models with statistics worth folding, and the comparison of slim with masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slrc.passes.shrink_channels import ShrinkChannels
from slrc.plans import Masks, Plan
from slrc.program import Program
from slrc.verify import compare, outputs_of

TOLERANCE = 1e-9
"""The programs compared are in double precision."""


@pytest.fixture(scope="session")
def randomized() -> Callable[..., nn.Module]:
    """Return a function that gives every parameter and batch norm statistic a random value, in double precision."""

    def apply(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        model.double().eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 2.0, generator=generator)
                elif tensor.is_floating_point():
                    tensor.normal_(generator=generator)
        return model

    return apply


@pytest.fixture(scope="session")
def slim_equals_masked() -> Callable[[nn.Module, Program, Plan], Program]:
    """Return a function that shrinks a program and compares it with the masked eager model; it returns the slim one."""

    def check(model: nn.Module, program: Program, plan: Plan) -> Program:
        masks = Masks.project(plan, program.tensors)
        masks.check(plan)
        masked = copy.deepcopy(model)
        masks.apply_(dict(masked.named_parameters(remove_duplicate=False)))
        reference = outputs_of(masked, program.example_inputs)
        slim, modified = ShrinkChannels()(program, plan, masks)
        pruned = any(c.keep < c.groups for c in plan)
        assert modified == pruned
        assert not ShrinkChannels()(slim, plan, masks).modified
        compare("masked = slim", reference, outputs_of(slim.module(), program.example_inputs), TOLERANCE)
        assert slim.batch_is_dynamic == program.batch_is_dynamic
        if pruned:
            assert slim.num_parameters < program.num_parameters
        return slim

    return check
