"""What the tests of passes share: small models, random statistics, and the comparison of slim with masked."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis.internal.conjecture import providers
from torch import Tensor, nn

from slrc.ir.program import Program, capture
from slrc.passes.structure.shrink_channels import ShrinkChannels
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.verify import compare, outputs_of

sys.path.insert(0, str(Path(__file__).parent))

TOLERANCE = 1e-9
"""The programs compared are in double precision."""


class Net(nn.Module):
    """A model from its layers and its forward: `Net(lambda m, x: m.fc(m.conv(x)), conv=…, fc=…)`."""

    def __init__(self, run: Callable[..., object], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


@pytest.fixture(autouse=True)
def same_graphs_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis also draws constants that it reads in the modules loaded so far: those depend on earlier tests."""
    if hasattr(providers, "_get_local_constants"):
        monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
        monkeypatch.setattr(providers, "CONSTANTS_CACHE", type(providers.CONSTANTS_CACHE)(1024))


@pytest.fixture(scope="session")
def net() -> type[Net]:
    return Net


@pytest.fixture(scope="session")
def randomized() -> Callable[..., nn.Module]:
    """Give every parameter and batch norm statistic a random value, in double precision."""

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
def masked_outputs() -> Callable[[nn.Module, Program, Masks], list[Tensor]]:
    """Run a masked copy of the user's own eager model on a program's example inputs."""

    def run(model: nn.Module, program: Program, masks: Masks) -> list[Tensor]:
        masked = copy.deepcopy(model)
        masks.apply_(dict(masked.named_parameters(remove_duplicate=False)))
        return outputs_of(masked, program.example_inputs)

    return run


@pytest.fixture(scope="session")
def slim_equals_masked(masked_outputs: Callable[..., list[Tensor]]) -> Callable[..., Program]:
    """Shrink a program, compare it with the masked eager model and shrink it again; return the slim program."""

    def check(model: nn.Module, program: Program, plan: Plan) -> Program:
        masks = Masks.project(plan, program.tensors)
        masks.check(plan)
        reference = masked_outputs(model, program, masks)
        slim, modified = ShrinkChannels(plan, masks)(program)
        pruned = any(c.keep < c.groups for c in plan)
        assert modified == pruned
        assert not ShrinkChannels(plan, masks)(slim).modified
        compare("masked = slim", reference, outputs_of(slim.module(), program.example_inputs), TOLERANCE)
        assert slim.batch_is_dynamic == program.batch_is_dynamic
        if pruned:
            assert slim.num_parameters < program.num_parameters
        return slim

    return check


@pytest.fixture
def captured(randomized: Callable[[nn.Module], nn.Module]) -> Callable[..., tuple[nn.Module, Program]]:
    """Captures a case `(run, layers, shape)`, a `Net` on two samples of a shape; returns the model too."""

    def of(case: tuple[Callable[..., object], dict[str, Any], tuple[int, ...]]) -> tuple[nn.Module, Program]:
        run, layers, shape = case
        torch.manual_seed(0)
        model = randomized(Net(run, **layers))
        return model, capture(model, (torch.randn(2, *shape, dtype=torch.float64),))

    return of
