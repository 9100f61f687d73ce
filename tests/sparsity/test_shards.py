"""Tensors that are not shared out pass through; buckets. Processes that share: `tests/training/test_sharding.py`."""

from __future__ import annotations

import torch

from slrc.sparsity import shards


def test_buckets_keep_the_order_and_their_size() -> None:
    limit = shards.BUCKET
    sizes = [limit // 2, limit // 2, 1, 3 * limit, limit, 1]
    assert list(shards.buckets(sizes, lambda size: size)) == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:5], sizes[5:]]
    assert list(shards.buckets([], len)) == []


def test_tensors_that_are_not_shared_out_pass_through() -> None:
    tensor = torch.arange(6.0).view(3, 2)
    assert shards.own(tensor) is tensor
    assert shards.of_own(tensor, like=tensor) is tensor
    assert shards.own_of(tensor, like=tensor) is tensor
    assert shards.share(tensor, like=tensor) is tensor
    assert shards.whole({"a": tensor})["a"] is tensor
    assert [(n, t is tensor) for n, t in shards.whole_in_turn({"a": tensor, "b": tensor})] == [("a", True), ("b", True)]
    assert shards.totals([1.0, 2.5], of=[tensor]) == [1.0, 2.5]
    assert shards.totals([1.0], of=[]) == [1.0]
