"""A transposed convolution equals its phases, put between each other."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.nn import functional

from slrc.passes.forms.unroll_transposed import axes_of, interleave, unroll_weight, why_not_unrolled
from slrc.passes.graph_edits import call_before

aten = torch.ops.aten


def both_ways(x: Tensor, weight: Tensor, window: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, the result by way of the phases, and the phases' weight."""
    graph = Graph()
    *nodes, made = [graph.placeholder(name) for name in ("x", "weight", "unrolled")]
    layer = graph.call_function(aten.conv_transpose2d.input, (*nodes, None, *window))
    result = functional.conv_transpose2d(x, weight, None, *window)
    for node, value in zip([*nodes, layer], [x, weight, result], strict=True):
        node.meta["val"] = value
    assert why_not_unrolled(layer, weight.shape[1]) == ""
    axes = axes_of(layer)
    unrolled = unroll_weight(weight, axes)
    phases = call_before(layer, aten.conv2d.default, nodes[0], made, None, [1, 1], [axis.pads for axis in axes])
    graph.output(interleave(layer, phases, axes))
    module = GraphModule({}, graph)
    return result, module(x, weight, unrolled), unrolled


def test_random_windows() -> None:
    draw = random.Random(0)
    for _ in range(300):
        stride, kernel = ([draw.randint(1, 4) for _ in range(2)] for _ in range(2))
        sizes = [draw.randint(1, 5) for _ in range(2)]
        beyond = [draw.randint(0, s - 1) for s in stride]
        fits = [(n - 1) * s + k + b - 1 for n, s, k, b in zip(sizes, stride, kernel, beyond, strict=True)]
        padding = [draw.randint(0, fit // 2) for fit in fits]
        x, weight = torch.randn(2, 3, *sizes).double(), torch.randn(3, 4, *kernel).double()
        expected, found, _ = both_ways(x, weight, [stride, padding, beyond])
        torch.testing.assert_close(found, expected)


def test_a_kernel_as_large_as_the_stride_is_a_1x1_convolution() -> None:
    unrolled = both_ways(torch.randn(1, 3, 4, 4), torch.randn(3, 8, 2, 2), [[2, 2], [0, 0], [0, 0]])[2]
    assert unrolled.shape == (32, 3, 1, 1)


def test_blocks_of_outputs_stay_blocks() -> None:
    weight = torch.randn(3, 16, 3, 3)
    kept = torch.rand(3, 2, 3, 3) < 0.3
    weight *= kept.repeat_interleave(8, dim=1)
    unrolled = both_ways(torch.randn(1, 3, 4, 4), weight, [[2, 2], [1, 1], [1, 1]])[2]
    blocks = unrolled.reshape(-1, 8, unrolled[0].numel())
    assert int((blocks != 0).any(dim=1).sum()) == int(kept.sum())
