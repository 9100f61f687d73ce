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
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import get_tensor, insert_tensor, layer_bias, reads, replace_tensor, sibling

BATCH_NORMS = ("_native_batch_norm_legit_no_training", "batch_norm")


@dataclass(frozen=True)
class FoldBatchNorm(Transform):
    """Fold a batch norm in evaluation mode into the convolution or linear layer that alone feeds it.

    1. `batch_norm(conv(x, w, b), γ, β, μ, σ²)` becomes `conv(x, w·s, (b − μ)·s + β)` with `s = γ / √(σ² + ε)`,
       `s` of shape `(out,)`.
    2. A layer whose result has another user, or whose weight or bias is read elsewhere, is left alone.

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
        layer = norm.args[0]
        if not isinstance(layer, Node) or len(layer.users) > 1 or (weight := layer_weight(layer)) is None:
            continue
        constants = [a for a in norm.args[1:5] if isinstance(a, Node)]
        has_statistics = isinstance(norm.args[3], Node) and isinstance(norm.args[4], Node)
        bias = layer_bias(layer)
        constants += [bias] if bias is not None else []
        own = [weight] if bias is None else [weight, str(bias.target)]
        one_use = all(reads(module, name) == 1 for name in own)
        # Linear layers on tokens have their features last, batch norm its channels second.
        aligned = layer.meta["val"].dim() == get_tensor(module, weight).dim()
        if all(a.op == "get_attr" for a in constants) and has_statistics and one_use and aligned:
            yield layer, norm


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
    for user in list(norm.users) if op_name(norm) != "batch_norm" else [norm]:
        user.replace_all_uses_with(layer)
