"""What becomes of a dimension further down: needed where a reshape must choose which new dimension takes the labels."""

from __future__ import annotations

from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.table import shape_of

TAKES_APART = frozenset({"unbind", "select", "split", "split_with_sizes", "chunk"})
NORMALISES = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax"})
ATTENDS = frozenset({"scaled_dot_product_attention", "matmul", "bmm", "einsum", "softmax", "_softmax"})
KEEPS_SHAPE = frozenset(
    {
        "clone",
        "contiguous",
        "alias",
        "detach",
        "_to_copy",
        "dropout",
        "mul",
        "div",
        "relu",
        "elu",
        "softmax",
        "rms_norm",
    }
)
MOVES = frozenset(
    {"permute", "transpose", "unsqueeze", "getitem", "squeeze", "slice", "expand", "view", "reshape", "_unsafe_view"}
)
"""Between an attention's projection and its product, as where grouped keys are repeated for every query."""
FAR = 12
"""Operators to follow: an attention's heads are split some steps before its product."""


def is_taken_apart(node: Node, dim: int, steps: int = FAR) -> bool:
    """Return whether a dimension of a value is later unbound, selected from or split: it lists parts (q, k, v).

    Or normalised over by a softmax: it lists weights that add up to one.
    """
    if steps == 0:
        return False
    for user in node.users:
        name = op_name(user)
        if name in TAKES_APART | NORMALISES and _asked_dim(user, name) == dim:
            return True
        moved = _moved(user, name, dim, len(shape_of(node)))
        if moved is not None and is_taken_apart(user, moved, steps - 1):
            return True
    return False


def _asked_dim(node: Node, name: str) -> int | None:
    """Return the dimension of its operand that an operator names."""
    x = node.args[0]
    assert isinstance(x, Node)
    asked = argument(node, 2 if name in ("split", "split_with_sizes", "chunk") else 1, "dim", 0)
    return asked % len(shape_of(x)) if isinstance(asked, int) else None


def feeds_attention(node: Node, steps: int = FAR) -> bool:
    """Return whether a value soon enters a product of two activations or a softmax."""
    reached, seen = {node}, {node}
    for _ in range(steps):
        users = {user for value in reached for user in value.users} - seen
        if any(op_name(user) in ATTENDS for user in users):
            return True
        seen |= users
        reached = {user for user in users if op_name(user) in KEEPS_SHAPE | TAKES_APART | MOVES}
    return False


def _moved(user: Node, name: str, dim: int, rank: int) -> int | None:
    """Return where a dimension goes in an operator that only moves dimensions, or `None`."""
    if name in KEEPS_SHAPE:
        return dim
    if name == "permute":
        order = [int(d) % rank for d in user.args[1]]  # type: ignore[union-attr, arg-type]
        return order.index(dim)
    if name == "transpose":
        a, b = (int(d) % rank for d in user.args[1:3])  # type: ignore[arg-type]
        return b if dim == a else a if dim == b else dim
    if name == "unsqueeze":
        at = int(user.args[1]) % (rank + 1)  # type: ignore[arg-type]
        return dim + (at <= dim)
    return None
