"""Drop operators that only copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from slrc.ir.nodes import argument, op_name
from slrc.ir.program import Program
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import call_before, insert_tensor


@dataclass(frozen=True)
class DropCopies(Transform):
    """Drop copies that an exporter writes out and a runtime would carry out.

    1. `pad` by nothing, and a `slice` of everything, go.
    2. `roll(x, s, d)` becomes `index_select(x, d, …)`, dimension by dimension: a copy each, where slices and a
       concatenation make two. A dimension whose size is not known stays.
    3. A `permute` that undoes the one before goes with it, as around the batch norm of a linear layer.

    Window attention has both in every block.
    """

    name: ClassVar[str] = "drop-copies"

    def __call__(self, program: Program) -> PassResult:
        """Return the program without them."""
        return PassResult(*program.rewrite(_drop_all))


def _drop_all(module: GraphModule) -> bool:
    modified = False
    for node in list(module.graph.nodes):
        if (same := _unchanged(node)) is not None:
            node.replace_all_uses_with(same)
            modified = True
        elif op_name(node) == "roll" and _select(module, node):
            modified = True
    return modified


def _unchanged(node: Node) -> Node | None:
    """Return the value of which a node is a copy, if it is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if op_name(node) == op_name(source) == "permute" and isinstance(source.args[0], Node):
        first, second = (list[int](permute.args[1]) for permute in (source, node))  # type: ignore[arg-type]
        undone = all(first[dim] % len(first) == k for k, dim in enumerate(second))
        return source.args[0] if undone else None
    return source if _is_whole(node) else None


def _is_whole(node: Node) -> bool:
    if op_name(node) == "pad":
        return all(size == 0 for size in node.args[1])  # type: ignore[union-attr]
    if op_name(node) != "slice":
        return False
    dim, start, end, step = (argument(node, k, name) for k, name in enumerate(("dim", "start", "end", "step"), 1))
    size = node.args[0].meta["val"].shape[dim or 0]  # type: ignore[union-attr]
    ends = end is None or (isinstance(end, int) and (end == 2**63 - 1 or (isinstance(size, int) and end >= size)))
    return start in (None, 0) and step in (None, 1) and ends


def _select(module: GraphModule, node: Node) -> bool:
    x, shifts, *dims = node.args
    sizes = x.meta["val"].shape  # type: ignore[union-attr]
    axes = dims[0] if dims else []
    if not axes or not all(isinstance(sizes[d], int) for d in axes):  # type: ignore[union-attr]
        return False
    for k, (shift, dim) in enumerate(zip(shifts, axes, strict=True)):  # type: ignore[arg-type]
        order = torch.arange(sizes[dim]).roll(shift)
        index = insert_tensor(module, node, f"{node.name}_order{k}", order)
        x = call_before(node, torch.ops.aten.index_select.default, x, dim, index)
    assert isinstance(x, Node)
    x.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(x)
    return True
