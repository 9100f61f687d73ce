"""Attention and other products of activations."""

from __future__ import annotations

from torch.fx import Node

from slrc.ir.nodes import argument
from slrc.passes.analysis.index_rules.contraction import consume_parameters
from slrc.passes.analysis.index_rules.table import Dims, Labels, LabelTable, Rule, Value, is_one, shape_of, tensor_args


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
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    nodes = [a for a in operands if isinstance(a, Node)]
    terms, out = einsum_terms(equation, [len(shape_of(n)) for n in nodes])
    if any(len(set(t)) != len(t) for t in terms):
        raise NotImplementedError  # a diagonal
    labels: dict[str, Labels] = {}
    zero = True
    for letter in sorted(set("".join(terms))):
        holders = [(n, t.index(letter)) for t, n in zip(terms, nodes, strict=True) if letter in t]
        holders = [(n, d) for n, d in holders if not is_one(shape_of(n)[d])]
        merged = table.dims(holders[0][0])[holders[0][1]] if holders else None
        for n, d in holders[1:]:
            merged = table.join_if_labelled(merged, table.dims(n)[d], node)
        labels[letter] = merged
        if letter not in out:
            table.contract(merged, [table.value(n) for n, _ in holders], node)
            consume_parameters(table, holders)
        elif merged is not None:
            zero = zero and any(table.value(n).vanishes for n, _ in holders)
    return Value([labels[letter] for letter in out], zero)


def einsum_terms(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of every operand and of the result, with letters of their own for what `...` stands for.

    `"...i,ij"` with ranks 3 and 2 gives `["01i", "ij"]` and `"01j"`.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    most = max([n for n, term in zip(hidden, terms, strict=True) if "..." in term], default=0)
    letters = "".join(str(k) for k in range(most))
    if not arrow:
        once = sorted(c for c in set(left) - set(",.") if left.count(c) == 1)
        out = "..." + "".join(once)
    terms = [term.replace("...", letters[most - n :]) for term, n in zip(terms, hidden, strict=True)]
    return terms, out.replace("...", letters)


RULES: dict[str, Rule] = {"scaled_dot_product_attention": scaled_dot_product_attention, "einsum": einsum}
