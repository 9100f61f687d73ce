"""Targets that move where an activation clips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.config import make_config
from slrc.reconstruction.clipping import Clipped
from slrc.reconstruction.observe import first_uses, observe
from slrc.reconstruction.reconstruct import reconstruct
from slrc.reconstruction.side_by_side import SideBySide


def clipped(x: Tensor, y: Tensor, high: float = math.inf) -> Clipped:
    out = y.shape[1]
    return Clipped(x.T.unsqueeze(0), y.T, torch.zeros_like(y.T), torch.ones(out, 1), 0.0, high)


def test_nothing_moves_where_the_fit_is_exact() -> None:
    x, weight = torch.randn(50, 4), torch.randn(3, 4)
    y = (x - x.mean(0)) @ weight.T
    cross, mean = clipped(x, y).shift(weight.double(), x.mean(0, keepdim=True), torch.zeros(3))
    torch.testing.assert_close(cross, torch.zeros(3, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_targets_move_only_where_both_are_clipped_and_else_to_the_bound() -> None:
    y = torch.tensor([[-1.0], [-1.0], [2.0], [2.0], [7.0], [7.0]])
    fitted = torch.tensor([[-5.0], [3.0], [-5.0], [1.0], [9.0], [5.0]])
    target = torch.tensor([[-5.0], [0.0], [2.0], [2.0], [9.0], [6.0]])
    cross, mean = clipped(fitted, y, high=6.0).shift(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1))
    moved = (target - y).double()
    assert float(mean) == pytest.approx(float(moved.mean()))
    assert float(cross) == pytest.approx(float(((moved - moved.mean()) * fitted).mean()))


class Block(nn.Module):
    """Two layers, a batch norm that may flip signs, a residual and a rectifier."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(16, 16, 1)
        self.conv2 = nn.Conv2d(16, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.norm(self.conv2(self.activation(self.conv1(x)))))


ACTIVATIONS: list[tuple[nn.Module, tuple[float, float]]] = [
    (nn.ReLU(), (0.0, math.inf)),
    (nn.ReLU6(), (0.0, 6.0)),
    (nn.Hardtanh(-0.5, 0.5), (-0.5, 0.5)),
]


@pytest.mark.parametrize(("activation", "bounds"), ACTIVATIONS)
def test_the_activation_is_found_and_its_inputs_are_those_of_the_network(
    activation: nn.Module, bounds: tuple[float, float]
) -> None:
    x, model = torch.randn(20, 16, 3, 3), Block(activation).eval()
    program = slrc.capture(slrc.Workload(model=model, example_inputs=(x[:1],)))
    both = SideBySide(program, [[x]], list(first_uses(program).values()))
    seen = [observe(both, number, 100, torch.Generator().manual_seed(0)) for number in range(2)]
    with torch.no_grad():
        expected = [model.conv1(x), x + model.norm(model.conv2(model.activation(model.conv1(x))))]
    for one, value in zip(seen, expected, strict=True):
        found = one.clipped
        assert found is not None
        assert (found.low, found.high) == bounds
        before = (found.outputs * found.scale + found.offset).sort(dim=1).values
        torch.testing.assert_close(before, value.transpose(0, 1).flatten(1).sort(dim=1).values, atol=1e-4, rtol=1e-4)


def test_an_activation_that_does_not_clip_has_no_samples() -> None:
    x, model = torch.randn(4, 16, 3, 3), Block(nn.SiLU()).eval()
    program = slrc.capture(slrc.Workload(model=model, example_inputs=(x[:1],)))
    both = SideBySide(program, [[x]], list(first_uses(program).values()))
    assert all(observe(both, k, 100, torch.Generator()).clipped is None for k in range(2))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_moving_targets_brings_what_is_let_through_nearer(activation: nn.Module) -> None:
    x = torch.randn(400, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    errors = []
    for rounds in (0, 2, 8):
        model, dense = Block(activation).eval(), Block(activation).eval()
        workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
        program = slrc.capture(workload)
        plan = slrc.plan(program, "block:8x1", 0.5, keep_ends=False)
        settings: dict[str, Any] = {"clipping": rounds, "damping": 1e-6}
        reconstruct(program, workload, plan, make_config({"method": "reconstruct", "reconstruct": settings}))
        with torch.no_grad():
            errors.append(float((model(x) - dense(x)).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_targets_move_alike_when_a_layer_is_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    fitted = []
    for at_once in (2**26, 1):
        monkeypatch.setattr("slrc.reconstruction.solve.FACTOR_NUMBERS", at_once)
        model = Block(nn.ReLU()).eval()
        workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
        plan = slrc.plan(slrc.capture(workload), "block:8x1", 0.5, keep_ends=False)
        slrc.train(workload, plan, method="reconstruct", reconstruct={"clipping": 3})
        fitted.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*fitted)
