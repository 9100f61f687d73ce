"""The refit of one layer's weights, and the elimination that chooses which of them stay.

A layer with weights W `(out, K)` and damped moments H `(g, K, K)`, G `(out, K)` errs by tr(W H Wᵀ) − 2 tr(W Gᵀ) and a
constant. Its best dense weights are G H⁻¹, and with some columns S alone they are G_S (H_SS)⁻¹. Elimination is that of
the optimal brain surgeon (Hassibi and Stork, 1992; for groups Frantar and Alistarh, arXiv 2208.11580): to drop the
columns D costs w_D ([H⁻¹]_DD)⁻¹ w_Dᵀ, with all others refitted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slrc.reconstruction.statistics import Moments

CHUNK_NUMBERS = 2**24
"""Numbers of the inverses that are eliminated at once, as many as one of a layer of 4,096 columns."""

LEAST_DAMPING = 1e-8
"""With less, H may have no inverse in float64."""


class Damped(NamedTuple):
    """H `(g, K, K)` and G `(out, K)` with λ added: λI to H, and λ times the old weights to G."""

    hessian: Tensor
    cross: Tensor

    @property
    def columns(self) -> int:
        """K."""
        return int(self.hessian.shape[1])

    def inverse(self) -> Tensor:
        """Return H⁻¹, `(g, K, K)`."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))

    def ordered(self, columns: Tensor) -> Damped:
        """Return the same with the columns in another order, `(K,)`."""
        if torch.equal(columns, torch.arange(self.columns)):
            return self  # they are large
        return Damped(self.hessian[:, columns][:, :, columns], self.cross[:, columns])

    def group_of_row(self) -> Tensor:
        """Return the convolution group of each output, `(out,)`."""
        out, groups = len(self.cross), len(self.hessian)
        return torch.arange(out) // (out // groups)


def damp(moments: Moments, weight: Tensor, damping: float) -> Damped:
    """Add `damping` times the mean of H's diagonal; inputs that never vary then leave the old weights `(out, K)`."""
    damping = max(damping, LEAST_DAMPING)
    diagonal = moments.hessian.diagonal(dim1=1, dim2=2)
    amount = damping * diagonal.mean(dim=1)
    amount = torch.where(amount > 0, amount, torch.ones_like(amount))
    hessian = moments.hessian + torch.diag_embed(amount.unsqueeze(1).expand_as(diagonal))
    by_row = amount.repeat_interleave(len(weight) // len(hessian)).unsqueeze(1)
    return Damped(hessian, moments.cross + by_row * weight)


def refit(damped: Damped, mask: Tensor) -> Tensor:
    """Return the best weights `(out, K)` that are zero where `mask` is not true."""
    weight = torch.zeros_like(damped.cross)
    group_of_row = damped.group_of_row()
    supports, of_row = torch.unique(mask, dim=0, return_inverse=True)
    for number, support in enumerate(supports):
        alive = support.nonzero().squeeze(1)
        rows = (of_row == number).nonzero().squeeze(1)
        groups, counts = group_of_row[rows].unique(return_counts=True)
        for count in counts.unique() if len(alive) else ():  # as many groups at once as have as many such rows
            alike = groups[counts == count]
            own = rows[torch.isin(group_of_row[rows], alike)].reshape(len(alike), -1, 1)
            factor = torch.linalg.cholesky(damped.hessian[alike][:, alive][:, :, alive])
            weight[own, alive] = torch.cholesky_solve(damped.cross[own, alive].mT, factor).mT
    return weight


def error(moments: Moments, weight: Tensor) -> Tensor:
    """Return the mean squared error of each output with some weights `(out, K)`, `(out,)`."""
    by_group = weight.reshape(len(moments.hessian), -1, weight.shape[1])
    squared = ((by_group @ moments.hessian).flatten(0, 1) * weight).sum(dim=1)
    return (squared - 2 * (weight * moments.cross).sum(dim=1) + moments.energy).clamp_min(0)


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
    at_once = max(1, CHUNK_NUMBERS // damped.columns**2)
    found = []
    for part in rows.split(at_once):
        own = inverse[group_of_row[part[:, 0]]]
        try:
            removal = _eliminate(best[part].float(), own.float(), size, rate)
        except RuntimeError:  # of LAPACK: columns are too alike for float32
            removal = None
        if removal is None or not bool(removal.errors.isfinite().all()):
            removal = _eliminate(best[part], own, size, rate)
        found.append(removal)
    return Removal(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _eliminate(weight: Tensor, inverse: Tensor, size: int, rate: float) -> Removal:
    """Remove from weights `(blocks, R, K)` with an inverse each, `(blocks, K, K)`."""
    blocks, _, columns = weight.shape
    alive = torch.arange(columns // size).expand(blocks, -1)
    order, errors = [], []
    taps = torch.arange(size)
    while count := alive.shape[1]:
        dropped = max(1, round(count * rate))
        by_saliency = _saliency(weight, inverse, size).argsort(dim=1, stable=True)
        first, rest = by_saliency[:, :dropped], by_saliency[:, dropped:].sort(dim=1).values
        gone, kept = ((part.unsqueeze(2) * size + taps).flatten(1) for part in (first, rest))
        factor = torch.linalg.cholesky(_submatrix(inverse, gone, gone))
        lost = torch.linalg.solve_triangular(factor, _columns(weight, gone).transpose(1, 2), upper=False)
        order.append(alive.gather(1, first))
        errors.append(lost.square().sum(dim=2).reshape(blocks, dropped, size).sum(dim=2))
        coupling = torch.linalg.solve_triangular(factor, _submatrix(inverse, gone, kept), upper=False)
        weight = _columns(weight, kept) - lost.transpose(1, 2) @ coupling
        inverse = _submatrix(inverse, kept, kept) - coupling.transpose(1, 2) @ coupling
        alive = alive.gather(1, rest)
    return Removal(torch.cat(order, dim=1), torch.cat(errors, dim=1).double())


def _saliency(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return what it costs to remove each column group alone, `(blocks, groups)`."""
    if size == 1:
        return weight.square().sum(dim=1) / inverse.diagonal(dim1=1, dim2=2)
    blocks, rows, columns = weight.shape
    groups = columns // size
    own = inverse.reshape(blocks, groups, size, groups, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    parts = weight.reshape(blocks, rows, groups, size).permute(0, 2, 3, 1)
    lost = torch.linalg.solve_triangular(torch.linalg.cholesky(own), parts, upper=False)
    return lost.square().sum(dim=(2, 3))


def _columns(weight: Tensor, index: Tensor) -> Tensor:
    return weight.gather(2, index.unsqueeze(1).expand(-1, weight.shape[1], -1))


def _submatrix(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix[torch.arange(len(matrix)).reshape(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]


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
