"""Cut a convolution of a concatenation into one of each of its parts, so that nothing is copied side by side."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from slrc.ir.nodes import argument, conv_groups, layer_weight, node_shape, op_name
from slrc.passes.graph_edits import call_before, get_tensor, insert_tensor, layer_bias, only_user, sibling

aten = torch.ops.aten


def parts_of(layer: Node) -> list[Node]:
    """Return the values whose concatenation a convolution alone reads, if it is worth cutting; else none.

    Each part but one has its outputs written and read once more; they must be fewer than the inputs, which are spared a
    copy.
    """
    x = layer.args[0]
    if op_name(layer) != "conv2d" or conv_groups(layer) > 1 or not isinstance(x, Node) or only_user(x) is not layer:
        return []
    if op_name(x) != "cat" or argument(x, 1, "dim", 0) not in (1, -3) or len(node_shape(x)) != 4:
        return []
    parts = [part for part in x.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]
    outputs, inputs = node_shape(layer)[1], node_shape(x)[1]
    return parts if len(parts) > 1 and (len(parts) - 1) * outputs < inputs else []


def cut_concatenation(
    module: GraphModule, layer: Node, parts: list[Node], last: Node, residual: Node | None
) -> list[Node]:
    """Return the convolutions that compute a layer part by part, now in its place, in reverse.

    What `last`, the layer or an addition of `residual` to it, gave is now the last of their sums. So each one's sum is
    that of another convolution's as of a residual, and its packed form adds it; a residual is added by the first one.

        conv(cat(a, b), w) + residual          conv(b, w_b) + (conv(a, w_a) + residual)
    """
    name, bias = str(layer_weight(layer)), layer_bias(layer)
    weights = get_tensor(module, name).split([node_shape(part)[1] for part in parts], 1)
    convs, total = list[Node](), residual
    for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        own = nn.Parameter(weight.contiguous(), requires_grad=False)
        read = insert_tensor(module, last, sibling(name, f"part{k}.weight"), own)
        with_bias = bias if k + 1 == len(parts) else None
        conv = call_before(last, aten.conv2d.default, part, read, with_bias, *layer.args[3:])
        conv.meta["val"] = layer.meta["val"]
        convs.append(conv)
        total = conv if total is None else call_before(last, aten.add.Tensor, conv, total)
        total.meta["val"] = layer.meta["val"]
    last.replace_all_uses_with(total)  # type: ignore[arg-type]
    return convs[::-1]
