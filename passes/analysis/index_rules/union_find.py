"""Union-find over integer labels, on whole arrays at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class UnionFind:
    """Classes of labels. Joins are collected and resolved together, in near-linear time (pointer jumping)."""

    def __init__(self) -> None:
        self._size = 0
        self._edges: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._root = np.arange(0, dtype=np.int64)

    def new(self, count: int) -> NDArray[np.int64]:
        """Return `count` new labels, each in a class of its own."""
        self._size += count
        return np.arange(self._size - count, self._size, dtype=np.int64)

    def join(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Join `a[i]` with `b[i]` for every `i`."""
        if a is not b:
            self._edges.append((a.reshape(-1), b.reshape(-1)))

    def roots(self) -> NDArray[np.int64]:
        """Return for every label the smallest label of its class, as far as joined by now."""
        root = np.concatenate([self._root, np.arange(len(self._root), self._size, dtype=np.int64)])
        if self._edges:
            a = np.concatenate([x for x, _ in self._edges])
            b = np.concatenate([y for _, y in self._edges])
            _resolve(root, a, b)
        self._root, self._edges = root, []
        return root.copy()


def _resolve(root: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
    """Join `a[i]` with `b[i]` in `root`, in place."""
    while True:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        apart = low != high
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        np.minimum.at(root, high[apart], low[apart])
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root[:] = jumped
