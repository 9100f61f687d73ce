"""Batch norm folded into the layer before it, and where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.passes.structure.fold_batch_norm import FoldBatchNorm
from slrc.verify import compare, outputs_of

F = nn.functional
IMAGE, TOKENS, FLAT = (4, 5, 5), (5, 4), (4,)
Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], tuple[int, ...]]


def fold(case: Case, net: Any, randomized: Any) -> tuple[Program, Program, bool]:
    """Fold, compare with the eager model, and fold again."""
    run, layers, shape = case
    model = randomized(net(run, **layers))
    torch.manual_seed(0)
    program = capture(model, (torch.randn(2, *shape, dtype=torch.float64),))
    folded, modified = FoldBatchNorm()(program)
    reference = outputs_of(model, program.example_inputs)
    compare("eager = folded", reference, outputs_of(folded.module(), program.example_inputs), 1e-10)
    assert not FoldBatchNorm()(folded).modified
    return program, folded, modified


def norms(program: Program) -> int:
    return sum("batch_norm" in op_name(node) for node in program.nodes)


def after(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...] = IMAGE) -> Case:
    return lambda m, x: m.n(m.a(x)), {"a": layer, "n": norm}, shape


FOLDED: dict[str, Case] = {
    "bias": after(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)),
    "no bias": after(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "no scale": after(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)),
    "large epsilon": after(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=0.5)),
    "depthwise": after(nn.Conv2d(4, 4, 3, groups=4, dilation=2), nn.BatchNorm2d(4)),
    "grouped": after(nn.Conv2d(4, 6, 3, groups=2, padding="same"), nn.BatchNorm2d(6)),
    "one dimension": after(nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6), TOKENS),
    "transposed": after(nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6)),
    "transposed, grouped": after(nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False), nn.BatchNorm2d(6)),
    "linear": after(nn.Linear(4, 6), nn.BatchNorm1d(6), FLAT),
    "linear on points, permuted": (
        lambda m, x: m.n(m.a(x).permute(0, 2, 1)).permute(0, 2, 1),
        {"a": nn.Linear(4, 6, bias=False), "n": nn.BatchNorm1d(6)},
        TOKENS,
    ),
    "linear on points, transposed and copied": (
        lambda m, x: m.n(m.a(x).transpose(1, 2).contiguous()),
        {"a": nn.Linear(4, 6), "n": nn.BatchNorm1d(6)},
        TOKENS,
    ),
    "linear on points, as one row": (
        lambda m, x: m.n(m.a(x).view(-1, 6)).view(-1, 5, 6),
        {"a": nn.Linear(4, 6), "n": nn.BatchNorm1d(6)},
        TOKENS,
    ),
    "convolution, flattened": (
        lambda m, x: m.n(m.a(x).flatten(2)),
        {"a": nn.Conv2d(4, 6, 1), "n": nn.BatchNorm1d(6)},
        IMAGE,
    ),
    "functional weight": (
        lambda m, x: m.n(F.conv2d(x, m.kernel)),
        {"kernel": nn.Parameter(torch.zeros(6, 4, 1, 1)), "n": nn.BatchNorm2d(6)},
        IMAGE,
    ),
    "a parameter called bias that is not the layer's": (
        lambda m, x: m.n(F.conv2d(x, m.a.weight)) * m.a.bias[:, None, None],
        {"a": nn.Conv2d(4, 6, 1), "n": nn.BatchNorm2d(6)},
        IMAGE,
    ),
    "norm serves two layers": (
        lambda m, x: m.n(m.a(x)) + m.n(m.b(x)),
        {"a": nn.Conv2d(4, 6, 1), "b": nn.Conv2d(4, 6, 1), "n": nn.BatchNorm2d(6)},
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_it_rewrites(name: str, net: Any, randomized: Any) -> None:
    program, folded, modified = fold(FOLDED[name], net, randomized)
    assert modified
    assert norms(program) >= 1
    assert norms(folded) == 0
    assert folded.batch_is_dynamic
    assert not {n for n in folded.tensors if n.startswith("n.")}


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(y) + y


def tied() -> dict[str, Any]:
    layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1), "n": nn.BatchNorm2d(4)}
    layers["b"].weight = layers["a"].weight
    return layers


def shared_bias() -> dict[str, Any]:
    layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1), "n": nn.BatchNorm2d(4)}
    layers["b"].bias = layers["a"].bias
    return layers


ONE = {"a": nn.Conv2d(4, 4, 1), "n": nn.BatchNorm2d(4)}
LEFT_ALONE: dict[str, Case] = {
    "value used twice": (used_twice, ONE, IMAGE),
    "tied weights": (lambda m, x: m.b(m.n(m.a(x))), tied(), IMAGE),
    "module called twice": (lambda m, x: m.a(m.n(m.a(x))), ONE, IMAGE),
    "weight read elsewhere": (lambda m, x: m.n(m.a(x)) + m.a.weight.sum(), ONE, IMAGE),
    "bias serves another layer": (lambda m, x: m.b(m.n(m.a(x))), shared_bias(), IMAGE),
    "bias computed": (lambda m, x: m.n(F.conv2d(x, m.a.weight, m.a.bias * 2)), ONE, IMAGE),
    "activation between": (lambda m, x: m.n(torch.relu(m.a(x))), ONE, IMAGE),
    "norm before the layer, as in DenseNet": (lambda m, x: m.a(torch.relu(m.n(x))), ONE, IMAGE),
    "another dimension in front": (
        lambda m, x: m.n(m.a(x).permute(0, 2, 3, 1)),
        {"a": nn.Conv2d(4, 5, 1), "n": nn.BatchNorm2d(5)},
        IMAGE,
    ),
    "outputs taken apart": (
        lambda m, x: m.n(m.a(x).view(-1, 4, 2, 5, 5)),
        {"a": nn.Conv2d(4, 8, 1), "n": nn.BatchNorm3d(4)},
        IMAGE,
    ),
    "view used twice": (
        lambda m, x: m.n(y := m.a(x).transpose(1, 2)) + y,
        {"a": nn.Linear(4, 6), "n": nn.BatchNorm1d(6)},
        TOKENS,
    ),
    "linear on tokens": after(nn.Linear(4, 5), nn.BatchNorm1d(5), TOKENS),
    "batch statistics": after(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_it_leaves_alone(name: str, net: Any, randomized: Any) -> None:
    program, folded, modified = fold(LEFT_ALONE[name], net, randomized)
    assert not modified
    assert folded is program


def test_a_chain_is_folded_whole(net: Any, randomized: Any) -> None:
    layers = {"a": nn.Conv2d(4, 6, 1), "n": nn.BatchNorm2d(6), "b": nn.Conv2d(6, 3, 1), "p": nn.BatchNorm2d(3)}
    case: Case = (lambda m, x: m.p(m.b(torch.relu(m.n(m.a(x))))), layers, IMAGE)
    _, folded, modified = fold(case, net, randomized)
    assert modified
    assert [op_name(node) for node in folded.nodes] == ["conv2d", "relu", "conv2d"]


def test_masked_rows_stay_zero(net: Any, randomized: Any) -> None:
    run, layers, shape = FOLDED["bias"]
    model = randomized(net(run, **layers))
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.weight[:, 1] = 0
    program = capture(model, (torch.randn(1, *shape, dtype=torch.float64),))
    weight = FoldBatchNorm()(program).program.tensors["a.weight"]
    assert (weight[2] == 0).all()
    assert (weight[:, 1] == 0).all()
    assert (weight != 0).sum() == 5 * 3 * 9
