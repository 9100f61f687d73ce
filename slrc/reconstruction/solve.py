"""The refit of one layer's weights.

A layer with weights W `(out, K)` and damped moments H `(g, K, K)`, G `(out, K)` errs by tr(W H Wᵀ) − 2 tr(W Gᵀ) and a
constant. Its best dense weights are G H⁻¹, and with some columns S alone they are G_S (H_SS)⁻¹.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slrc.reconstruction.statistics import Moments

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
