"""New tensors of a graph never take the place of a user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.program import Program, capture
from slrc.passes.graph_edits import get_tensor, insert_tensor


class Owner(nn.Module):
    """A convolution that has a parameter beside its weight, which a transform could call by the same name."""

    def __init__(self, taken: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        owner = self.conv
        *path, leaf = taken.split(".")
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.full((4, 1, 1), 3.0)))
        self.taken = f"conv.{taken}"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.get_parameter(self.taken)


def program_of(taken: str) -> Program:
    torch.manual_seed(0)
    return capture(Owner(taken).eval(), (torch.randn(2, 3, 4, 4),))


@pytest.mark.parametrize("taken", ["values", "values.part", "0.weight", "weight_0"])
def test_a_taken_name_is_left_to_its_owner(taken: str) -> None:
    module = program_of(taken).graph_module
    own = get_tensor(module, f"conv.{taken}").clone()
    for name in (f"conv.{taken}", "conv.values", f"conv.{taken}.deeper"):
        new = insert_tensor(module, module.graph.output_node(), name, torch.arange(5))
        assert torch.equal(get_tensor(module, str(new.target)), torch.arange(5))
        assert torch.equal(get_tensor(module, f"conv.{taken}"), own)


def test_a_new_tensor_hides_no_attribute_of_the_module() -> None:
    module = program_of("values").graph_module
    assert str(insert_tensor(module, module.graph.output_node(), "graph", torch.ones(1)).target) == "graph_1"
    assert str(insert_tensor(module, module.graph.output_node(), "training.x", torch.ones(1)).target) == "training_x_1"


def test_an_equal_tensor_is_shared_and_one_of_another_kind_is_not() -> None:
    module = program_of("bias_").graph_module
    output = module.graph.output_node()
    tensors: list[Any] = [torch.ones(3), torch.ones(3), torch.ones(3).long(), nn.Parameter(torch.ones(3))]
    names = [str(insert_tensor(module, output, "conv.values", tensor).target) for tensor in tensors]
    assert names == ["conv.values", "conv.values", "conv_values_1", "conv_values_2"]
