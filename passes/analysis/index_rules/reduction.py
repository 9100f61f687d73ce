"""Pooling and reductions: spatial dimensions come and go, a labelled dimension that is summed over stays."""

from __future__ import annotations

from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.table import LabelTable, Rule, Value, shape_of

KNOWS_ZEROS = frozenset({"sum", "linalg_vector_norm", "mean", "amax", "amin"})
"""Reductions to which zeros add nothing, or whose result over more zeros follows from that over the rest."""

POOLING = [
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "max_pool2d_with_indices",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_adaptive_avg_pool2d",
]


def pooling(node: Node, table: LabelTable) -> Value | list[Value]:
    """`pool(x (n, c, …))`: channels pass through; spatial positions are mixed."""
    x = node.args[0]
    assert isinstance(x, Node)
    value, outputs = table.value(x), node.meta["val"]
    spatial = 2 if op_rank(node) is None else op_rank(node)
    lead = len(value.dims) - (spatial or 2)
    for labels in value.dims[lead:]:
        table.pin(labels, "spatial position", node)
    result = Value([*value.dims[:lead], *[None] * (spatial or 2)], value.vanishes)
    return [result for _ in outputs] if isinstance(outputs, (tuple, list)) else result


def op_rank(node: Node) -> int | None:
    """Return the number of spatial dimensions that a pooling operator's name tells."""
    digits = [c for c in str(node.target).split(".")[1] if c in "123"]
    return int(digits[0]) if digits else None


def reduction(node: Node, table: LabelTable) -> Value:
    """`mean`, `sum` and the like over some dimensions: removed indices may go where they hold zeros."""
    x = node.args[0]
    assert isinstance(x, Node)
    value, name = table.value(x), op_name(node)
    rank, over = len(value.dims), reduced_dims(node)
    keepdim = bool(argument(node, 3 if name == "linalg_vector_norm" else 2, "keepdim", False))
    least = name == "linalg_vector_norm" and argument(node, 1, "ord", 2) < 0
    for d in over:
        if least or name not in KNOWS_ZEROS or not value.vanishes:
            table.pin(value.dims[d], f"reduced over by {name}", node)
    kept = [None if d in over else value.dims[d] for d in range(rank) if keepdim or d not in over]
    return Value(kept, value.vanishes and name != "logsumexp")


def reduced_dims(node: Node) -> list[int]:
    """Return the dimensions that a reduction runs over."""
    x = node.args[0]
    assert isinstance(x, Node)
    rank = len(shape_of(x))
    asked = argument(node, 2 if op_name(node) == "linalg_vector_norm" else 1, "dim")
    asked = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    return sorted({d % rank for d in asked})


def softmax(node: Node, table: LabelTable) -> Value:
    """`softmax(x, dim)`: the normalised dimension stays."""
    x, dim = node.args[0], argument(node, 1, "dim")
    assert isinstance(x, Node)
    dims = table.dims(x)
    table.pin(dims[dim], "normalised over by softmax", node)
    return Value(dims, vanishes=False)


RULES: dict[str, Rule] = {
    **dict.fromkeys(POOLING, pooling),
    **dict.fromkeys(sorted(KNOWS_ZEROS | {"std", "var", "prod", "logsumexp"}), reduction),
    **dict.fromkeys(["softmax", "_softmax", "log_softmax", "_log_softmax"], softmax),
}
