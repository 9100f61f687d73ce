"""Turn a `columns:R` mask into R smaller dense layers, for any runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import call_before, get_tensor, insert_tensor, layer_bias, sibling
from slrc.patterns import Columns
from slrc.plans import Constraint, Masks, Plan
from slrc.program import Program, layer_weight, op_name

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitColumns(Transform):
    """Split a layer whose row groups keep input channels of their own.

    1. `conv(x, w (o, c, kh, kw), b)` with `columns:R` becomes `cat_r conv(index_select(x, 1, i_r), w_r, b_r)`, where
       row group `r` keeps the `l` channels `i_r` and `w_r` is `(o/R, l, kh, kw)`; `linear` likewise on its last
       dimension.
    2. Row groups that keep the same channels stay one layer.
    3. A layer that keeps all its channels, or whose bias is computed, is left alone.

        x ─▶ conv        x ─▶ gather i₀ ─▶ conv w₀ ─┐
                           └▶ gather i₁ ─▶ conv w₁ ─┴▶ cat
    """

    name: ClassVar[str] = "split-columns"

    def __call__(self, program: Program, plan: Plan, masks: Masks) -> PassResult:
        """Return the program with its column-pruned layers split."""
        columns = {c.members[0].tensor: c for c in plan if isinstance(c.pattern, Columns) and c.keep < c.groups}
        return PassResult(*program.rewrite(lambda module: _split_all(module, columns, masks)))


def _split_all(module: GraphModule, columns: dict[str, Constraint], masks: Masks) -> bool:
    layers = [n for n in module.graph.nodes if layer_weight(n) in columns and _has_plain_bias(n)]
    for layer in layers:
        weight = str(layer_weight(layer))
        pattern = columns[weight].pattern
        _split(module, layer, weight, pattern.group_view(masks.tensors[weight])[..., 0])
    return bool(layers)


def _has_plain_bias(layer: Node) -> bool:
    bias = layer_bias(layer)
    return bias is None or bias.op == "get_attr"


def _split(module: GraphModule, layer: Node, name: str, kept: Tensor) -> None:
    """`kept` is `(R, in)`: the input channels of each row group."""
    weight = get_tensor(module, name)
    bias_name = None if (bias_node := layer_bias(layer)) is None else str(bias_node.target)
    channel_dim = -1 if op_name(layer) == "linear" else 1
    if bool((kept == kept[:1]).all()):
        kept = kept[:1]
    rows = weight.shape[0] // len(kept)
    parts = []
    for r, channels in enumerate(kept):
        index = channels.nonzero().flatten()
        own = weight[r * rows : (r + 1) * rows].index_select(1, index)
        index_node = insert_tensor(module, layer, sibling(name, f"index_{r}"), index)
        weight_node = insert_tensor(module, layer, sibling(name, f"weight_{r}"), nn.Parameter(own, requires_grad=False))
        bias_part: Node | None = None
        if bias_name is not None:
            # Tied weights may have a bias each: its parts go by the bias's own name.
            own_bias = get_tensor(module, bias_name)[r * rows : (r + 1) * rows].clone()
            bias_part = insert_tensor(module, layer, f"{bias_name}_{r}", nn.Parameter(own_bias, requires_grad=False))
        gathered = call_before(layer, aten.index_select.default, layer.args[0], channel_dim, index_node)
        assert isinstance(layer.target, torch._ops.OpOverload)
        parts.append(call_before(layer, layer.target, gathered, weight_node, bias_part, *layer.args[3:]))
    whole = parts[0] if len(parts) == 1 else call_before(layer, aten.cat.default, parts, channel_dim)
    layer.replace_all_uses_with(whole)
