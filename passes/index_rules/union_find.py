"""Union-find over integer labels, on whole arrays at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class UnionFind:
    """Classes of labels. Joins are collected and resolved together, in near-linear time (pointer jumping)."""

    def __init__(self) -> None:
        self._size = 0
        self._edges: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def new(self, count: int) -> NDArray[np.int64]:
        """Return `count` new labels, each in a class of its own."""
        self._size += count
        return np.arange(self._size - count, self._size, dtype=np.int64)

    def join(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Join `a[i]` with `b[i]` for every `i`."""
        if a is not b:
            self._edges.append((a.reshape(-1), b.reshape(-1)))

    def roots(self) -> NDArray[np.int64]:
        """Return for every label the smallest label of its class."""
        root = np.arange(self._size, dtype=np.int64)
        if not self._edges:
            return root
        a = np.concatenate([x for x, _ in self._edges])
        b = np.concatenate([y for _, y in self._edges])
        while True:
            low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
            apart = low != high
            if not apart.any():
                return root
            a, b = a[apart], b[apart]
            np.minimum.at(root, high[apart], low[apart])
            while True:
                jumped = root[root]
                if np.array_equal(jumped, root):
                    break
                root = jumped
