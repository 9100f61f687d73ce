"""Cut a linear layer that computes several projections at once, such as an attention's queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node

from slrc.ir.nodes import layer_weight, op_name
from slrc.passes.graph_edits import call_before, get_tensor, insert_tensor, layer_bias, only_user, sibling

VIEWS = frozenset({"view", "_unsafe_view", "reshape"})


def cut_projections(module: GraphModule, layer: Node, rows: int) -> list[Node]:
    """Return the layers that compute a linear layer's projections one by one, now in its place; or that layer alone.

    They are cut where the graph itself takes them apart, and where each has a multiple of `rows` outputs:

        linear ─▶ view(…, 3, heads, dim) ─▶ permute ─▶ select(i)            linear_i ─▶ view(…, heads, dim) ─▶ permute

    A runtime need not split and copy what they compute.
    """
    view = only_user(layer)
    permute = only_user(view) if view is not None and op_name(view) in VIEWS else None
    if view is None or permute is None or op_name(permute) != "permute" or op_name(layer) != "linear":
        return [layer]
    at = layer.meta["val"].dim() - 1
    shape, sizes = layer.meta["val"].shape, view.meta["val"].shape
    if len(sizes) <= at or any(a is not b and a != b for a, b in zip(shape[:at], sizes[:at], strict=True)):
        return [layer]
    parts, outputs = int(sizes[at]), int(shape[-1])
    order = [int(d) % len(sizes) for d in permute.args[1]]  # type: ignore[union-attr, arg-type, call-overload]
    taken = dict(_taken(permute, order.index(at)))
    if outputs // parts % rows or set(taken.values()) != set(range(parts)):
        return [layer]
    linears = [_part(module, layer, index, parts) for index in range(parts)]
    inner = [d - (d > at) for d in order if d != at]
    for node, index in taken.items():
        given = view.args[1]
        size = [s for k, s in enumerate(given) if k != at]  # type: ignore[arg-type, union-attr]
        apart = call_before(node, view.target, linears[index], size)  # type: ignore[arg-type]
        turned = call_before(node, torch.ops.aten.permute.default, apart, inner)
        apart.meta["val"], turned.meta["val"] = view.meta["val"].select(at, 0), node.meta["val"]
        node.replace_all_uses_with(turned)
    return linears


def _taken(permute: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """Yield the nodes that take one entry of a dimension, and which; `-1` for one that takes something else."""
    for user in permute.users:
        if op_name(user) == "select" and user.args[1] == dim:
            yield user, int(user.args[2])  # type: ignore[arg-type]
        elif op_name(user) == "unbind" and (user.args[1] if len(user.args) > 1 else 0) == dim:
            yield from ((item, int(item.args[1])) for item in user.users)  # type: ignore[arg-type]
        else:
            yield user, -1


def _part(module: GraphModule, layer: Node, index: int, parts: int) -> Node:
    name, bias = str(layer_weight(layer)), layer_bias(layer)
    weight = get_tensor(module, name)
    size = weight.shape[0] // parts
    rows = slice(index * size, (index + 1) * size)
    operands = [insert_tensor(module, layer, sibling(name, f"{index}.weight"), _parameter(weight[rows]))]
    if bias is not None:
        own = get_tensor(module, str(bias.target))
        operands.append(insert_tensor(module, layer, sibling(name, f"{index}.bias"), _parameter(own[rows])))
    part = call_before(layer, torch.ops.aten.linear.default, layer.args[0], *operands)
    part.meta["val"] = layer.meta["val"][..., :size]
    return part


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)
