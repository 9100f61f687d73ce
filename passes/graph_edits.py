"""Small edits of graph modules that transforms share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node


def sibling(weight: str, leaf: str) -> str:
    """Return a name beside a weight's: `conv1.bias` for `conv1.weight`, `in_proj_weight_bias` for `in_proj_weight`."""
    return f"{weight.removesuffix('.weight')}.{leaf}" if weight.endswith(".weight") else f"{weight}_{leaf}"


def get_tensor(module: GraphModule, name: str) -> Tensor:
    """Return a parameter or buffer by its qualified name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def set_tensor(module: GraphModule, name: str, tensor: Tensor) -> None:
    """Set or replace a parameter (if it is one) or buffer by its qualified name; modules on the way are made."""
    owner: nn.Module = module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            setattr(owner, part, nn.Module())
        owner = getattr(owner, part)
    if leaf in owner._parameters or leaf in owner._buffers:
        delattr(owner, leaf)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def insert_tensor(module: GraphModule, before: Node, name: str, tensor: Tensor) -> Node:
    """Add a tensor and return a new node that reads it, placed before `before`.

    An equal tensor of that name is shared, as by two calls of one layer; where anything else has the name, the new
    tensor gets another one.
    """
    name = _free_name(module, name, tensor)
    if not _find(module, name):
        set_tensor(module, name, tensor)
    return _read(module, before, name)


def replace_tensor(module: GraphModule, before: Node, name: str, tensor: Tensor) -> Node:
    """Put a tensor in the place of the one of that name; return a new node that reads it, placed before `before`."""
    get_tensor(module, name)
    set_tensor(module, name, tensor)
    return _read(module, before, name)


def _read(module: GraphModule, before: Node, name: str) -> Node:
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _free_name(module: GraphModule, name: str, tensor: Tensor) -> str:
    """Return the name, or one like it at the root of the module, that is free or belongs to an equal tensor."""
    flat = name.replace(".", "_")
    candidates = itertools.chain([name], (f"{flat}_{k}" for k in itertools.count(1)))
    return next(c for c in candidates if not (found := _find(module, c)) or _are_equal(found[0], tensor))


def _find(module: GraphModule, name: str) -> list[Any]:
    """Return what stands under a name or on the way to it, in a list; an empty one if nothing does."""
    owner: Any = module
    for part in name.split("."):
        if not isinstance(owner, nn.Module):
            break
        if not hasattr(owner, part):
            return []
        owner = getattr(owner, part)
    return [owner]


def _are_equal(found: Any, tensor: Tensor) -> bool:
    same_kind = isinstance(found, Tensor) and isinstance(found, nn.Parameter) == isinstance(tensor, nn.Parameter)
    return same_kind and found.dtype == tensor.dtype and torch.equal(found, tensor)


def reads(module: GraphModule, name: str) -> int:
    """Return how many operators read a parameter or buffer."""
    return sum(len(n.users) for n in module.graph.nodes if n.op == "get_attr" and n.target == name)


def only_user(node: Node) -> Node | None:
    """Return the operator that alone reads a value, or `None` if there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def layer_bias(layer: Node) -> Node | None:
    """Return the node of a layer's bias, or `None` if it has none."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return bias if isinstance(bias, Node) else None


def call_before(before: Node, target: torch._ops.OpOverload, *args: Any) -> Node:
    """Insert a call of an ATen operator before a node, with that node's source location."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta = {k: v for k, v in before.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return node


def wrap_result(node: Node, target: torch._ops.OpOverload, *args: Any) -> None:
    """Let everything that reads a node read `target(node, *args)` instead."""
    with node.graph.inserting_after(node):
        wrapped = node.graph.call_function(target, (node, *args))
    wrapped.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    node.replace_all_uses_with(wrapped, delete_user_cb=lambda user: user is not wrapped)
