"""Linear layers and matrix products: the summed dimension joins, the others pass through."""

from __future__ import annotations

from torch.fx import Node

from slrc.passes.index_rules.table import LabelTable, Rule, Value, tensor_args


def linear(node: Node, table: LabelTable) -> Value:
    """`linear(x (…, i), w (o, i), b (o)) -> (…, o)`."""
    x, weight, *bias = tensor_args(node)
    x_dims, w_dims = table.dims(x), table.dims(weight)
    inner = table.join(x_dims[-1], w_dims[1], node)
    table.contract(inner, [table.value(x), table.value(weight)], node)
    if weight.op == "get_attr":
        table.consume(weight, 1)
    for b in bias:
        table.join(w_dims[0], table.dims(b)[0], node)
    # A bias is added at removed places of the other dimensions too.
    zero_elsewhere = all(d is None for d in x_dims[:-1]) or (table.value(x).vanishes and not bias)
    return Value([*x_dims[:-1], w_dims[0]], zero_elsewhere and all(table.value(p).vanishes for p in (weight, *bias)))


def matmul(node: Node, table: LabelTable) -> Value:
    """`a (…, m, k) @ b (…, k, n)`."""
    a, b = tensor_args(node)[:2]
    left, right = table.value(a), table.value(b)
    if len(left.dims) < 2 or len(right.dims) < 2:
        raise NotImplementedError
    inner = table.join(left.dims[-1], right.dims[-2], node)
    table.contract(inner, [left, right], node)
    batch_dims = []
    rank = max(len(left.dims), len(right.dims))
    for d in range(rank - 2):
        sides = [v.dims[d - (rank - len(v.dims))] for v in (left, right) if d >= rank - len(v.dims)]
        merged = sides[0]
        for other in sides[1:]:
            merged = table.join_if_labelled(merged, other, node)
        batch_dims.append(merged)
    zero = (
        (left.vanishes or left.dims[-2] is None)
        and (right.vanishes or right.dims[-1] is None)
        and (left.vanishes or right.vanishes or all(d is None for d in batch_dims))
    )
    return Value([*batch_dims, left.dims[-2], right.dims[-1]], zero)


RULES: dict[str, Rule] = {"linear": linear, **dict.fromkeys(["matmul", "bmm", "mm"], matmul)}
