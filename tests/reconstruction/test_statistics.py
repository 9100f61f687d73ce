"""Moments, and samples of every kind of layer against torch's own unfolding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.nodes import layer_weight, output_dim
from slrc.ir.program import Program, capture
from slrc.reconstruction.statistics import Sampler, Statistics


def layer_of(program: Program) -> Any:
    return next(n for n in program.nodes if layer_weight(n) is not None)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, bias=False), (3, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", bias=False), (3, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=2, bias=False), (3, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), (3, 4, 7, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 9)),
    (nn.Conv3d(2, 3, 2, padding=1, bias=False), (2, 2, 4, 3, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (3, 4, 4, 3)),
    (nn.ConvTranspose2d(4, 6, (4, 3), (2, 3), (1, 0), output_padding=(1, 2), bias=False), (3, 4, 4, 3)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False), (3, 4, 4, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=4, bias=False), (3, 4, 5)),
    (nn.ConvTranspose3d(2, 3, 3, bias=False), (2, 2, 4, 3, 2)),
    (nn.Linear(5, 3, bias=False), (4, 5)),
    (nn.Linear(5, 3, bias=False), (2, 6, 5)),
]


@pytest.mark.parametrize("positions", [7, 1000])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_samples_are_what_the_layer_multiplies(layer: nn.Module, shape: tuple[int, ...], positions: int) -> None:
    x = torch.randn(shape)
    program = capture(layer, (x,))
    node = layer_of(program)
    weight: Tensor = layer.weight.transpose(0, output_dim(node))
    sample = Sampler(node, tuple(weight.shape[2:]), positions)
    assert not sample.why_not(weight, x)
    y = layer(x).detach()
    inputs, outputs = sample(x, y, torch.Generator().manual_seed(0))
    assert len(inputs) == len(outputs) == min(y.numel() // weight.shape[0], positions * len(x))
    groups = inputs.shape[1]
    by_group = weight.detach().flatten(1).reshape(groups, -1, inputs.shape[2])
    found = torch.einsum("sgk,gok->sgo", inputs, by_group).flatten(1)
    torch.testing.assert_close(found, outputs, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_unfolded_is_told() -> None:
    x = torch.randn(1, 4, 5, 5)
    layer = nn.ConvTranspose2d(4, 2, 3, groups=2)
    sample = Sampler(layer_of(capture(layer, (x,))), (3, 3), 8)
    assert "transposed" in sample.why_not(layer.weight, x)
    unbatched = nn.Conv2d(4, 2, 3)
    sample = Sampler(layer_of(capture(unbatched, (x[0],))), (3, 3), 8)
    assert "no batch" in sample.why_not(unbatched.weight, x[0])


def test_moments_are_those_of_all_samples_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 2, 3, generator=generator) + 1e3  # means that would drown the rest in float32
    y = torch.randn(90, 4, generator=generator) - 500
    statistics = Statistics()
    for part in zip(x.split(20), y.split(20), strict=True):
        statistics.add(*part)
    moments = statistics.moments()
    both = torch.cat([x.double().flatten(1), y.double()], dim=1)
    expected = torch.cov(both.T, correction=0)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for group in range(2):
        columns = slice(3 * group, 3 * group + 3)
        torch.testing.assert_close(moments.hessian[group], expected[columns, columns], **close)
        rows = slice(6 + 2 * group, 8 + 2 * group)
        torch.testing.assert_close(moments.cross[2 * group : 2 * group + 2], expected[rows, columns], **close)
    torch.testing.assert_close(moments.energy, expected.diagonal()[6:], **close)
    torch.testing.assert_close(moments.inputs, x.double().mean(dim=0), **close)
    zero = moments.about_zero()
    torch.testing.assert_close(zero.hessian[1], x.double()[:, 1].T @ x.double()[:, 1] / 90, **close)
    torch.testing.assert_close(zero.cross[2:], y.double()[:, 2:].T @ x.double()[:, 1] / 90, **close)
    torch.testing.assert_close(zero.energy, y.double().square().mean(dim=0), **close)
