"""Maxima moved before the bias and the activation of what they are taken of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.nodes import op_name
from slrc.ir.program import capture
from slrc.passes.structure.maximum_first import MaximumFirst
from slrc.verify import compare, outputs_of

F = nn.functional
WIDTH = 6
MOVED: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "a point network": (lambda m, x: m.fc(x).relu().amax(1), ["linear", "amax", "add", "relu"]),
    "the values of max": (lambda m, x: m.fc(x).relu().max(1).values, ["linear", "max", "add", "relu"]),
    "kept dimensions": (lambda m, x: m.fc(x).relu().amax((0, 1), True), ["linear", "amax", "add", "relu"]),
    "no activation": (lambda m, x: m.fc(x).amax(-2), ["linear", "amax", "add"]),
    "two bounds": (lambda m, x: F.relu6(m.fc(x)).clamp(1, 2).amax(1), ["linear", "amax", "add", "relu6", "clamp"]),
    "over features, whose biases differ": (lambda m, x: m.fc(x).relu().amax(2), ["linear", "amax", "relu"]),
    "of no layer": (lambda m, x: x.relu().amax(1), ["amax", "relu"]),
}
LEFT: dict[str, Callable[[Any, Tensor], Any]] = {
    "what falls somewhere": lambda m, x: F.silu(m.fc(x)).amax(1),
    "indices that are read": lambda m, x: m.fc(x).relu().max(1),
    "values that are read": lambda m, x: (y := m.fc(x).relu()).amax(1) + y.sum(1),
    "a bound that is computed": lambda m, x: m.fc(x).clamp(min=x.mean()).amax(1),
    "over features alone": lambda m, x: m.fc(x).amax(2),
    "of everything": lambda m, x: m.fc(x).relu().amax(),
}


class Points(nn.Module):
    """A layer on points, and what is made of it."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.run = nn.Linear(WIDTH, WIDTH), run

    def forward(self, x: Tensor) -> Any:
        """`(n, points, features)` to anything."""
        return self.run(self, x)


@pytest.mark.parametrize("name", MOVED)
def test_a_maximum_is_taken_first(name: str) -> None:
    run, expected = MOVED[name]
    torch.manual_seed(0)
    program = capture(Points(run), (torch.randn(3, 5, WIDTH),))
    result, modified = MaximumFirst()(program)
    assert modified
    assert [op_name(n) for n in result.nodes if not op_name(n).startswith(("sym_", "getitem"))] == expected
    compare("moved", *(outputs_of(p.module(), program.example_inputs) for p in (program, result)), 1e-6)
    assert not MaximumFirst()(result).modified


@pytest.mark.parametrize("name", LEFT)
def test_a_maximum_that_it_would_change_stays(name: str) -> None:
    program = capture(Points(LEFT[name]), (torch.randn(3, 5, WIDTH),))
    assert not MaximumFirst()(program).modified


def test_not_a_number_comes_through() -> None:
    x = torch.randn(3, 5, WIDTH)
    x[0, 0, 0] = torch.nan
    program = capture(Points(MOVED["a point network"][0]), (x,))
    result, _ = MaximumFirst()(program)
    before, after = (p.module()(x) for p in (program, result))
    assert torch.equal(before.isnan(), after.isnan())
    assert before.isnan().any()
