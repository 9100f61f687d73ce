"""Linear layers, matrix products and running sums: the summed dimension joins, the others pass through."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.analysis.index_rules.table import Dims, LabelTable, Rule, Value, covers, is_one, shape_of, tensor_args


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
    """`a (…, m, k) @ b (…, k, n)`, where either may be a vector."""
    a, b = tensor_args(node)[:2]
    return _product(node, table, a, b)


def add_matmul(node: Node, table: LabelTable) -> Value:
    """`addmm(x, a, b)`, `baddbmm(x, a, b)`: `x + a @ b`."""
    x, a, b = tensor_args(node)[:3]
    product, added, shape = _product(node, table, a, b), table.value(x), shape_of(x)
    dims = list(product.dims)
    for k in range(1, len(added.dims) + 1):
        if not is_one(shape[-k]):
            dims[-k] = table.join_if_labelled(dims[-k], added.dims[-k], node)
    return Value(dims, product.vanishes and added.vanishes and covers(added, dims))


def running_sum(node: Node, table: LabelTable) -> Value:
    """`cumsum(x, dim)`: zeros at removed indices add nothing to the others, but are zeros no longer."""
    x, dim = node.args[0], argument(node, 1, "dim")
    assert isinstance(x, Node)
    value = table.value(x)
    table.contract(value.dims[dim], [value], node)
    return Value(value.dims, value.vanishes and value.dims[dim] is None)


def _product(node: Node, table: LabelTable, a: Node, b: Node) -> Value:
    left, right = table.value(a), table.value(b)
    inner = table.join_if_labelled(left.dims[-1], right.dims[-2:][0], node)
    table.contract(inner, [left, right], node)
    consume_parameters(table, [(a, -1), (b, -2 if len(shape_of(b)) > 1 else -1)])
    rows, columns = left.dims[-2:-1], right.dims[-1:] if len(right.dims) > 1 else []
    batch: Dims = []
    zero = all(side.vanishes or all(d is None for d in own) for side, own in ((left, rows), (right, columns)))
    for k in range(max(len(left.dims), len(right.dims)), 2, -1):
        sides = [n for n in (a, b) if len(shape_of(n)) >= k and not is_one(shape_of(n)[-k])]
        merged = table.dims(sides[0])[-k] if sides else None
        for other in sides[1:]:
            merged = table.join_if_labelled(merged, table.dims(other)[-k], node)
        zero = zero and (merged is None or any(table.value(n).vanishes for n in sides))
        batch.append(merged)
    return Value([*batch, *rows, *columns], zero)


def consume_parameters(table: LabelTable, summed: Sequence[tuple[Node, int]]) -> None:
    """Say which dimensions of weights are summed over, unless the product is one of weights only."""
    found = [parameter_dim(node, dim) for node, dim in summed]
    if None in found:
        for parameter in found:
            if parameter is not None:
                table.consume(*parameter)


def parameter_dim(node: Node, dim: int) -> tuple[Node, int] | None:
    """Return the parameter that a value is, perhaps transposed, and which of its dimensions stands at `dim`."""
    dim %= len(shape_of(node))
    while op_name(node) in ("t", "transpose", "permute"):
        rank, source = len(shape_of(node)), node.args[0]
        assert isinstance(source, Node)
        if op_name(node) == "permute":
            order = node.args[1]
            assert isinstance(order, (list, tuple))
            dim = int(order[dim]) % rank  # type: ignore[arg-type]
        else:
            one, other = (0, 1) if op_name(node) == "t" else (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
            dim = {one: other, other: one}.get(dim, dim)
        node = source
    return (node, dim) if node.op == "get_attr" else None


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(["matmul", "bmm", "mm", "mv", "dot"], matmul),
    **dict.fromkeys(["addmm", "baddbmm"], add_matmul),
    "cumsum": running_sum,
}
