"""Fold batch norm into the layer before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slrc.ir.nodes import is_transposed, layer_weight, op_name
from slrc.ir.program import Program
from slrc.passes.analysis.index_rules.shape import numeric, segments
from slrc.passes.analysis.index_rules.table import shape_of
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import get_tensor, insert_tensor, layer_bias, reads, replace_tensor, sibling

_VIEWS = ("permute", "transpose", "view", "reshape", "_unsafe_view", "contiguous", "clone")
BATCH_NORMS = ("_native_batch_norm_legit_no_training", "batch_norm")


@dataclass(frozen=True)
class FoldBatchNorm(Transform):
    """Fold a batch norm in evaluation mode into the convolution or linear layer that alone feeds it.

    1. `batch_norm(conv(x, w, b), γ, β, μ, σ²)` becomes `conv(x, w·s, (b − μ)·s + β)` with `s = γ / √(σ² + ε)`,
       `s` of shape `(out,)`.
    2. Views, permutations and copies may stand between, as in a network on point clouds, which has its features last:
       `batch_norm(permute(linear(x, w), 0, 2, 1), …)`. They stay, and must leave the layer's outputs whole.
    3. A layer whose result has another user, or whose weight or bias is read elsewhere, is left alone.

    Rows of zeros stay rows of zeros, so masks hold as before.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with batch norms folded."""
        return PassResult(*program.rewrite(_fold_all))


def _fold_all(module: GraphModule) -> bool:
    pairs = list(_foldable(module))
    for layer, norm in pairs:
        _fold(module, layer, norm)
    return bool(pairs)


def _foldable(module: GraphModule) -> Iterator[tuple[Node, Node]]:
    for norm in module.graph.nodes:
        if op_name(norm) not in BATCH_NORMS or (op_name(norm) == "batch_norm" and norm.args[5]):
            continue
        before = _layer_before(norm)
        if before is None or (weight := layer_weight(layer := before[0])) is None:
            continue
        constants = [a for a in norm.args[1:5] if isinstance(a, Node)]
        has_statistics = isinstance(norm.args[3], Node) and isinstance(norm.args[4], Node)
        bias = layer_bias(layer)
        constants += [bias] if bias is not None else []
        own = [weight] if bias is None else [weight, str(bias.target)]
        one_use = all(reads(module, name) == 1 for name in own)
        # Linear layers on tokens have their features last, batch norm its channels second.
        rank = layer.meta["val"].dim()
        outputs = rank - 1 if op_name(layer) == "linear" else rank - get_tensor(module, weight).dim() + 1
        aligned = before[1] == outputs
        if all(a.op == "get_attr" for a in constants) and has_statistics and one_use and aligned:
            yield layer, norm


def _layer_before(norm: Node) -> tuple[Node, int] | None:
    """Return what a batch norm normalises, through views that it alone reads, and where that has its channels."""
    value, channels = norm.args[0], 1
    while isinstance(value, Node) and len(value.users) == 1:
        if op_name(value) not in _VIEWS:
            return value, channels
        source = value.args[0]
        assert isinstance(source, Node)
        found = _before_view(value, source, channels)
        if found is None:
            return None
        value, channels = source, found
    return None


def _before_view(view: Node, source: Node, dim: int) -> int | None:
    """Return which dimension of a view's source is its dimension `dim`; `None` if that is merged or split."""
    rank = view.meta["val"].dim()
    match op_name(view):
        case "permute":
            order = view.args[1]
            assert isinstance(order, (list, tuple))
            return int(order[dim]) % rank  # type: ignore[arg-type]
        case "transpose":
            first, second = (int(a) % rank for a in view.args[1:3])  # type: ignore[arg-type]
            return {first: second, second: first}.get(dim, dim)
        case "view" | "reshape" | "_unsafe_view":
            before, after = ([numeric(n) for n in shape_of(node)] for node in (source, view))
            return next((ins[0] for ins, outs in segments(before, after) if outs == [dim] and len(ins) == 1), None)
    return dim


def _fold(module: GraphModule, layer: Node, norm: Node) -> None:
    def constant(argument: object) -> Tensor | None:
        return get_tensor(module, str(argument.target)) if isinstance(argument, Node) else None

    weight_node = layer.args[1]
    assert isinstance(weight_node, Node)
    bias_node = layer_bias(layer)
    weight, bias = constant(weight_node), constant(bias_node)
    scale, shift, mean, variance = (constant(a) for a in norm.args[1:5])
    assert weight is not None
    assert mean is not None
    assert variance is not None
    eps = norm.args[-1] if op_name(norm) != "batch_norm" else norm.args[7]
    factor = torch.rsqrt(variance + float(eps))  # type: ignore[arg-type]
    factor = factor if scale is None else factor * scale
    folded_bias = (-mean if bias is None else bias - mean) * factor
    folded_bias = folded_bias if shift is None else folded_bias + shift
    out_dim = 1 if is_transposed(layer) else 0
    spread = factor.reshape([-1 if d == out_dim else 1 for d in range(weight.dim())])
    if is_transposed(layer) and weight.shape[1] != len(factor):
        groups = len(factor) // weight.shape[1]
        spread = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        spread = spread.expand(groups, weight.shape[0] // groups, *spread.shape[2:]).flatten(0, 1)
    name = str(weight_node.target)
    new_weight = replace_tensor(module, layer, name, nn.Parameter(weight * spread, requires_grad=False))
    new_bias = nn.Parameter(folded_bias, requires_grad=False)
    if bias_node is None:
        bias_node = insert_tensor(module, layer, sibling(name, "bias"), new_bias)
    else:
        bias_node = replace_tensor(module, layer, str(bias_node.target), new_bias)
    layer.args = (layer.args[0], new_weight, bias_node, *layer.args[3:])
    normed = norm.args[0]
    assert isinstance(normed, Node)
    for user in list(norm.users) if op_name(norm) != "batch_norm" else [norm]:
        user.replace_all_uses_with(normed)
