"""Union-find on arrays against one label at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slrc.passes.analysis.index_rules.union_find import UnionFind

SIZE = 24
Joins = list[list[tuple[int, int]]]


def naive_roots(size: int, joins: Joins) -> list[int]:
    """Relabel the whole list for every pair: a class goes by its smallest label."""
    root = list(range(size))
    for a, b in (pair for pairs in joins for pair in pairs):
        low, high = sorted((root[a], root[b]))
        root = [low if r == high else r for r in root]
    return root


@given(st.lists(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), max_size=8), max_size=8))
def test_roots_are_those_of_the_naive_union_find(joins: Joins) -> None:
    union = UnionFind()
    union.new(SIZE)
    for pairs in joins:
        ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        union.join(ends[:, 0], ends[:, 1])
    assert union.roots().tolist() == naive_roots(SIZE, joins)


@given(st.lists(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), max_size=8), max_size=8))
def test_roots_on_the_way_change_nothing(joins: Joins) -> None:
    union = UnionFind()
    union.new(SIZE)
    for k, pairs in enumerate(joins):
        ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        union.join(ends[:, 0], ends[:, 1])
        assert union.roots().tolist() == naive_roots(SIZE, joins[: k + 1])


def test_labels_are_consecutive_and_apart_until_joined() -> None:
    union = UnionFind()
    assert union.new(2).tolist() == [0, 1]
    assert union.new(3).tolist() == [2, 3, 4]
    assert union.roots().tolist() == [0, 1, 2, 3, 4]


def test_joins_are_transitive_and_later_labels_can_join() -> None:
    union = UnionFind()
    a, b, c = union.new(3), union.new(3), union.new(3)
    union.join(c, b)
    union.join(b, a)
    assert union.roots().tolist() == [0, 1, 2] * 3
    d = union.new(1)
    union.join(d, a[2:])
    assert union.roots().tolist() == [0, 1, 2] * 3 + [2]


def test_a_long_chain_has_one_root() -> None:
    union = UnionFind()
    labels = union.new(1000)
    union.join(labels[:-1], labels[1:])
    assert union.roots().tolist() == [0] * 1000


def test_two_dimensional_arrays_join_element_by_element() -> None:
    union = UnionFind()
    a = union.new(4).reshape(2, 2)
    b = union.new(4).reshape(2, 2)
    union.join(a, b.T)
    assert union.roots().tolist() == [0, 1, 2, 3, 0, 2, 1, 3]
