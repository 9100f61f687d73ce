"""Turn a layer whose row groups keep input channels of their own into smaller dense layers, for any runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slrc.forms.form import Form, FormKind, Forms, kept_channels
from slrc.ir.nodes import layer_weight, node_shape, op_name
from slrc.ir.program import Program
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import call_before, get_tensor, insert_tensor, layer_bias, sibling

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitColumns(Transform):
    """Split each layer whose form is `split:R` or `grouped:R`: its R row groups keep input channels of their own.

    1. `split:R`: `conv(x, w (o, c, kh, kw), b)` becomes `cat_r conv(index_select(x, 1, i_r), w_r, b_r)`, where row
       group `r` keeps the `l` channels `i_r` and `w_r` is `(o/R, l, kh, kw)`; `linear` likewise on its last
       dimension. Row groups that keep the same channels stay one layer; one that keeps none has the first, and zeros.
    2. `grouped:R`, convolutions whose row groups keep as many channels each: one gather of `i_0 … i_R` and one
       convolution with R groups, its weight `(o, l, kh, kw)`.
    3. A layer that keeps all its channels, or whose bias is computed, is left alone.

        x ─▶ conv        x ─▶ gather i₀ ─▶ conv w₀ ─┐          x ─▶ gather i₀ i₁ ─▶ conv, 2 groups
                           └▶ gather i₁ ─▶ conv w₁ ─┴▶ cat
    """

    forms: Forms = field(default_factory=dict)
    name: ClassVar[str] = "split-columns"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with its column-pruned layers split."""
        return PassResult(*program.rewrite(self._split_all))

    def _split_all(self, module: GraphModule) -> bool:
        split = {FormKind.SPLIT: _split, FormKind.GROUPED: _group}
        modified = False
        for layer in list(module.graph.nodes):
            form = self.forms.get(layer_weight(layer) or "")
            if form is not None and form.kind in split and _has_plain_bias(layer):
                kept = kept_channels(get_tensor(module, str(layer_weight(layer))), form.size)
                if not bool(kept.all()):
                    split[form.kind](module, layer, kept)
                    modified = True
        return modified


def split_weights(forms: Forms) -> dict[str, str]:
    """Return of which layer's weight each weight is a part that comes of these forms, by name."""
    return {part: weight for weight, form in forms.items() for part in _parts(weight, form)}


def _parts(weight: str, form: Form) -> list[str]:
    if form.kind is FormKind.GROUPED:
        return [sibling(weight, "grouped_weight")]
    return [sibling(weight, f"weight_{r}") for r in range(form.size)] if form.kind is FormKind.SPLIT else []


def _has_plain_bias(layer: Node) -> bool:
    bias = layer_bias(layer)
    return bias is None or bias.op == "get_attr"


def _channel_dim(layer: Node) -> int:
    """Return where the channels lie, from the end: a convolution may also be given one sample without a batch."""
    weight = layer.args[1]
    assert isinstance(weight, Node)
    return -1 if op_name(layer) == "linear" else 1 - len(node_shape(weight))


def _split(module: GraphModule, layer: Node, kept: Tensor) -> None:
    """`kept` is `(R, in)`: the input channels of each row group."""
    name, bias = str(layer_weight(layer)), layer_bias(layer)
    channel_dim = _channel_dim(layer)
    if bool((kept == kept[:1]).all()):
        kept = kept[:1]
    parts = []
    own_names = _parts(name, Form(FormKind.SPLIT, len(kept)))
    for r, weight in enumerate(get_tensor(module, name).chunk(len(kept))):
        index = kept[r].nonzero().flatten()
        weight_node = _insert(module, layer, own_names[r], weight.index_select(1, index))
        bias_node: Node | None = None
        if bias is not None:
            # Tied weights may have a bias each: its parts go by the bias's own name.
            own_bias = get_tensor(module, str(bias.target)).chunk(len(kept))[r].clone()
            bias_node = _insert(module, layer, f"{bias.target}_{r}", own_bias)
        gathered = _gather(module, layer, sibling(name, f"index_{r}"), channel_dim, index)
        assert isinstance(layer.target, torch._ops.OpOverload)
        parts.append(call_before(layer, layer.target, gathered, weight_node, bias_node, *layer.args[3:]))
    whole = parts[0] if len(parts) == 1 else call_before(layer, aten.cat.default, parts, channel_dim)
    layer.replace_all_uses_with(whole)


def _group(module: GraphModule, layer: Node, kept: Tensor) -> None:
    """As `_split`, where every row group keeps as many channels."""
    name = str(layer_weight(layer))
    weights = get_tensor(module, name).chunk(len(kept))
    indices = [channels.nonzero().flatten() for channels in kept]
    weight = torch.cat([w.index_select(1, index) for w, index in zip(weights, indices, strict=True)])
    (own_name,) = _parts(name, Form(FormKind.GROUPED, len(kept)))
    weight_node = _insert(module, layer, own_name, weight)
    gathered = _gather(module, layer, sibling(name, "index"), _channel_dim(layer), torch.cat(indices))
    assert isinstance(layer.target, torch._ops.OpOverload)
    defaults = [a.default_value for a in layer.target._schema.arguments]
    window = [*layer.args[3:], *defaults[max(len(layer.args), 3) :]]
    window[-1] = len(kept)
    grouped = call_before(layer, layer.target, gathered, weight_node, layer_bias(layer), *window)
    layer.replace_all_uses_with(grouped)


def _insert(module: GraphModule, before: Node, name: str, tensor: Tensor) -> Node:
    return insert_tensor(module, before, name, nn.Parameter(tensor, requires_grad=False))


def _gather(module: GraphModule, layer: Node, name: str, dim: int, index: Tensor) -> Node:
    return call_before(layer, aten.index_select.default, layer.args[0], dim, insert_tensor(module, layer, name, index))
