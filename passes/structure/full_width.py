"""Statistics over a dimension's full width, computed from the indices of it that are kept.

Removed indices hold zeros in the masked program, and it counts them: of C values k are kept. Their sum is the same,
the mean is k/C of theirs. All rewrites are exact. All but that of a layer norm may be made again on their own result;
the dimension of a layer norm stays from then on.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from slrc.ir.nodes import argument
from slrc.passes.graph_edits import call_before, wrap_result

aten = torch.ops.aten


def widen_mean(node: Node, kept: int, full: int) -> None:
    """`mean(x) -> mean(x) · k/C`."""
    wrap_result(node, aten.mul.Tensor, kept / full)


def widen_extreme(node: Node, is_greatest: bool) -> None:
    """`amax(x) -> max(amax(x), 0)`, `amin(x) -> min(amin(x), 0)`: a removed zero is among the values."""
    wrap_result(node, aten.clamp_min.default if is_greatest else aten.clamp_max.default, 0)


def widen_layer_norm(node: Node, kept: int, full: int) -> None:
    """`layer_norm(x)` over C of which k are kept, as operators.

        m = mean(x) · k/C        d = x − m        v = mean(d²) · k/C + m² · (1 − k/C)        y = d / √(v + ε)

    The squares of removed places are those of the mean. Statistics have no last dimension until they meet `x`: runtimes
    are slow with a last dimension of size 1.
    """
    x, share = node.args[0], kept / full
    scale, shift, eps = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    mean = call_before(node, aten.mul.Tensor, call_before(node, aten.mean.dim, x, [-1]), share)
    apart = call_before(node, aten.sub.Tensor, x, call_before(node, aten.unsqueeze.default, mean, -1))
    squares = call_before(node, aten.mean.dim, call_before(node, aten.mul.Tensor, apart, apart), [-1])
    removed = call_before(node, aten.mul.Tensor, call_before(node, aten.mul.Tensor, mean, mean), (full - kept) / full)
    variance = call_before(node, aten.add.Tensor, call_before(node, aten.mul.Tensor, squares, share), removed)
    inverse = call_before(node, aten.rsqrt.default, call_before(node, aten.add.Tensor, variance, eps))
    result = call_before(node, aten.mul.Tensor, apart, call_before(node, aten.unsqueeze.default, inverse, -1))
    if scale is not None:
        result = call_before(node, aten.mul.Tensor, result, scale)
    if shift is not None:
        result = call_before(node, aten.add.Tensor, result, shift)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def widen_rms_norm(node: Node, kept: int, full: int) -> None:
    """`rms_norm(x, ε, scale) -> rms_norm(x, ε · C/k, scale · √(C/k))`.

    That is x / √(Σx²/C + ε) = √(C/k) · x / √(Σx²/k + ε · C/k).
    """
    x, scale, eps = node.args[0], argument(node, 2, "weight"), argument(node, 3, "eps")
    assert isinstance(x, Node)
    eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    factor = math.sqrt(full / kept)
    wider = call_before(node, aten.mul.Tensor, scale, factor) if scale is not None else None
    node.args, node.kwargs = (x, [kept], wider, eps * full / kept), {}
    if scale is None:
        wrap_result(node, aten.mul.Tensor, factor)
