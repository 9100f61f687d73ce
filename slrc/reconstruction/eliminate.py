"""The elimination that chooses which of a layer's weights stay: that of the optimal brain surgeon.

To drop the columns D of weights W, all others refitted, costs w_D ([H⁻¹]_DD)⁻¹ w_Dᵀ (Hassibi and Stork, 1992; for
groups Frantar and Alistarh, arXiv 2208.11580). H are the layer's damped moments, as in `solve`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from slrc.reconstruction.solve import Damped

CHUNK_NUMBERS = 2**24
"""Numbers of the factors that are worked on at once, as many as one of a layer of 4,096 columns."""


class Removal(NamedTuple):
    """For each block of rows, in what order its column groups go: `order` and `errors`, both `(blocks, groups)`.

    `errors` are what each removal adds, those before it done and all that is left refitted.
    """

    order: Tensor
    errors: Tensor


def eliminate(damped: Damped, rows: Tensor, size: int, rate: float) -> Removal:
    """Remove the column groups of each block of rows, the least missed first, till none is left.

    Args:
        damped: the layer's moments.
        rows: which outputs make a block, `(blocks, R)`; all of one convolution group.
        size: how many consecutive columns make a group.
        rate: the share of the groups that goes in one round; within a round the order is that at its start.
    """
    inverse = damped.inverse()
    group_of_row = damped.group_of_row()
    best = torch.cat([g @ i for g, i in zip(damped.cross.chunk(len(inverse)), inverse, strict=True)])
    single = inverse.float()

    def remove(part: Tensor) -> Removal:
        of_block = group_of_row[part[:, 0]]
        try:
            removal = _Elimination(best[part].float(), single, of_block, size).run(rate)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # columns are too alike for float32
            removal = None
        if removal is None or not bool(removal.errors.isfinite().all()):
            removal = _Elimination(best[part], inverse, of_block, size).run(rate)
        return removal

    threads = torch.get_num_threads()
    at_once = min(CHUNK_NUMBERS // damped.columns**2, len(rows)) // threads
    found = by_threads(remove, rows.split(max(1, at_once)), threads)
    return Removal(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def by_threads(work: Callable[[Tensor], Removal], parts: Sequence[Tensor], threads: int) -> list[Removal]:
    """Return what work on each part gives; each thread has a part of its own, in which torch takes no more threads."""
    if threads == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(work, parts))
    torch.set_num_threads(threads)  # for threads that torch has not seen yet; this one's own count has not changed
    return found


class _Elimination:
    """Removal from weights `(blocks, R, K)`, whose inverses are those `(g, K, K)` of the convolution groups `of_block`.

    It factorises each block's inverse into L Lᵀ with what is missed least as the next pivots, and works out their
    columns of L only then (left-looking): of the inverse of what is left no more than the diagonal is ever formed. All
    tensors hold the column groups in one order, those that are left before those that are gone.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, of_block: Tensor, size: int) -> None:
        blocks, rows, columns = weight.shape
        groups = columns // size
        self.inverse, self.of_block, self.size = inverse, of_block, size
        self.groups = torch.arange(groups).repeat(blocks, 1)
        self.weight = weight.reshape(blocks, rows, groups, size).permute(0, 2, 3, 1).contiguous()
        by_group = inverse.reshape(-1, groups, size, groups, size)
        self.own = by_group.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)[of_block]
        """The diagonal blocks of the inverse of what is left, `(blocks, groups, size, size)`."""
        self.factor = weight.new_empty(blocks, groups, size, columns)
        """L, of which as many columns are known as are gone."""

    def run(self, rate: float) -> Removal:
        """Remove all, in rounds of a share of what is left."""
        order, errors = [], []
        left = self.groups.shape[1]
        while left:
            dropped = max(1, round(left * rate))
            self._move_last(self._saliency(left).argsort(dim=1, stable=True)[:, :dropped], left)
            errors.append(self._remove_last(dropped, left))
            left -= dropped
            order.append(self.groups[:, left : left + dropped])
        return Removal(torch.cat(order, dim=1), torch.cat(errors, dim=1).double())

    def _saliency(self, left: int) -> Tensor:
        """Return what it costs to remove each column group alone, `(blocks, left)`."""
        weight, own = self.weight[:, :left], self.own[:, :left]
        if self.size == 1:
            return (weight.square().sum(dim=3) / own.squeeze(3)).squeeze(2)
        lost = torch.linalg.solve_triangular(torch.linalg.cholesky(own), weight, upper=False)
        return lost.square().sum(dim=(2, 3))

    def _move_last(self, chosen: Tensor, left: int) -> None:
        """Move the groups at some places `(blocks, n)` behind all others that are left."""
        rest = left - chosen.shape[1]
        gone = torch.zeros(len(chosen), left, dtype=torch.bool).scatter(1, chosen, True)
        block, hole = gone[:, :rest].nonzero(as_tuple=True)  # in the order of blocks, as many in each as of the others
        filler = (~gone[:, rest:]).nonzero()[:, 1] + rest
        first = torch.arange(len(chosen)).unsqueeze(1) * self.groups.shape[1]
        start = first.flatten()[block]
        last = (first + torch.arange(rest, left)).flatten()
        to = torch.cat([start + hole, last])
        source = torch.cat([start + filler, (first + chosen).flatten()])
        for tensor in (self.groups, self.weight, self.own, self.factor):
            of_all = tensor.view(-1, *tensor.shape[2:])
            of_all.index_copy_(0, to, of_all.index_select(0, source))

    def _known(self, left: int) -> int:
        """Return how many columns of L are known."""
        return (self.groups.shape[1] - left) * self.size

    def _remove_last(self, dropped: int, left: int) -> Tensor:
        """Remove the last groups of those that are left; return what each adds to the error, `(blocks, dropped)`."""
        rest, known, blocks = left - dropped, self._known(left), len(self.weight)
        columns = (self.groups[:, :left].unsqueeze(2) * self.size + torch.arange(self.size)).flatten(1)
        gone = columns[:, rest * self.size :]
        row = (self.of_block.unsqueeze(1) * self.inverse.shape[1] + gone).flatten()
        rows = self.inverse.flatten(0, 1).index_select(0, row).unflatten(0, gone.shape)
        panel = rows.gather(2, columns.unsqueeze(1).expand(-1, gone.shape[1], -1))
        factor = self.factor[:, :left, :, :known].flatten(1, 2)
        panel.baddbmm_(factor[:, rest * self.size :], factor.mT, alpha=-1)
        pivots = torch.linalg.cholesky(panel[:, :, rest * self.size :])
        lost = torch.linalg.solve_triangular(pivots, self.weight[:, rest:left].flatten(1, 2), upper=False)
        coupling = torch.linalg.solve_triangular(pivots, panel[:, :, : rest * self.size], upper=False)
        by_group = coupling.reshape(blocks, dropped * self.size, rest, self.size).permute(0, 2, 3, 1)
        self.weight[:, :rest] -= (coupling.mT @ lost).reshape(self.weight[:, :rest].shape)
        self.own[:, :rest] -= by_group @ by_group.mT
        self.factor[:, :rest, :, known : known + dropped * self.size] = by_group
        return lost.square().sum(dim=2).reshape(blocks, dropped, self.size).sum(dim=2)


def share_out(removal: Removal, keep: int) -> Tensor:
    """Return which of all blocks' groups are kept, `(blocks, groups)`: those whose removal adds the most error.

    Each block keeps at least one, if there are as many to keep as blocks.
    """
    blocks, groups = removal.order.shape
    rising = removal.errors.cummax(dim=1).values  # a group that goes later is never the first to go
    if keep >= blocks:
        rising = rising.clone()
        rising[:, -1] = torch.inf
    gone = torch.zeros(blocks * groups, dtype=torch.bool)
    gone[rising.flatten().argsort(stable=True)[: blocks * groups - keep]] = True
    kept = torch.zeros_like(gone).reshape(blocks, groups)
    return kept.scatter(1, removal.order, ~gone.reshape(blocks, groups))


def keep_in_each(removal: Removal, keep: int) -> Tensor:
    """Return which groups are kept, `(blocks, groups)`, where each block keeps the last `keep`."""
    kept = torch.zeros(removal.order.shape, dtype=torch.bool)
    return kept.scatter(1, removal.order[:, removal.order.shape[1] - keep :], True)
