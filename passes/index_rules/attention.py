"""Attention and other products of activations."""

from __future__ import annotations

from torch.fx import Node

from slrc.passes.index_rules.table import Dims, Labels, LabelTable, Rule, Value, is_one, shape_of, tensor_args
from slrc.program import argument


def scaled_dot_product_attention(node: Node, table: LabelTable) -> Value:
    """`sdpa(q (…, h, l, e), k (…, h, s, e), v (…, h, s, f), mask (…, h, l, s)) -> (…, h, l, f)`.

    Heads go together. The width `e` of queries and keys goes together; removed places add nothing to their product.
    With fewer key heads than query heads (grouped-query attention), query heads go with the key head that they share.
    """
    query, key, value = tensor_args(node)[:3]
    q, k, v = (table.value(a) for a in (query, key, value))
    rank = len(q.dims)
    batch: Dims = []
    for d in range(rank - 2):
        shared = table.join_if_labelled(k.dims[d], v.dims[d], node)
        batch.append(_join_heads(node, table, q.dims[d], shared, d == rank - 3))
    width = table.join_if_labelled(q.dims[-1], k.dims[-1], node)
    table.contract(width, [q, k], node)
    tokens = table.join_if_labelled(k.dims[-2], v.dims[-2], node)
    table.pin(tokens, "attended over", node)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        _join_mask(node, table, mask, [*batch, q.dims[-2], None])
    # A removed query attends evenly to everything: its result is not zero.
    return Value([*batch, q.dims[-2], v.dims[-1]], v.vanishes and q.dims[-2] is None)


def _join_heads(node: Node, table: LabelTable, query: Labels, shared: Labels, is_head: bool) -> Labels:
    if is_head and query is not None and shared is not None and len(query) != len(shared):
        groups = table.join_rows(query.reshape(len(shared), -1))
        table.union.join(groups, shared)
        return query
    return table.join_if_labelled(query, shared, node)


def _join_mask(node: Node, table: LabelTable, mask: Node, against: Dims) -> None:
    dims, shape = table.dims(mask), shape_of(mask)
    for k in range(1, len(dims) + 1):
        if is_one(shape[-k]):
            continue
        table.join_if_labelled(dims[-k], against[-k] if k <= len(against) else None, node)


def einsum(node: Node, table: LabelTable) -> Value:
    """`einsum("bhid,bhjd->bhij", a, b)`: a letter is one dimension; letters that do not come out are summed over."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or not isinstance(operands, (list, tuple)):
        raise NotImplementedError
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    values = [table.value(a) for a in operands if isinstance(a, Node)]
    if not out or len(terms) != len(values) or any(len(set(t)) != len(t) for t in terms):
        raise NotImplementedError
    labels: dict[str, Labels] = {}
    for letter in sorted(set("".join(terms))):
        met = [v.dims[t.index(letter)] for t, v in zip(terms, values, strict=True) if letter in t]
        merged = met[0]
        for other in met[1:]:
            merged = table.join_if_labelled(merged, other, node)
        labels[letter] = merged
        if letter not in out:
            holders = [v for t, v in zip(terms, values, strict=True) if letter in t]
            table.contract(merged, holders, node)
    zero = all(
        any(v.vanishes for t, v in zip(terms, values, strict=True) if letter in t)
        for letter in out
        if labels[letter] is not None
    )
    return Value([labels[letter] for letter in out], zero)


RULES: dict[str, Rule] = {"scaled_dot_product_attention": scaled_dot_product_attention, "einsum": einsum}
