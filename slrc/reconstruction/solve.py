"""The refit of one layer's weights.

A layer with weights W `(out, K)` and damped moments H `(g, K, K)`, G `(out, K)` errs by tr(W H Wᵀ) − 2 tr(W Gᵀ) and a
constant. Its best dense weights are G H⁻¹, and with some columns S alone they are G_S (H_SS)⁻¹.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from slrc.reconstruction.statistics import Moments

FACTOR_NUMBERS = 2**26
"""About how many numbers the factors of a layer's supports have that are kept at once."""

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


class Supports:
    """Some outputs' supports, and the Cholesky factors of H on each; any G is then fitted at little cost.

    Args:
        damped: the layer's moments.
        mask: of these outputs, `(n, K)`.
        rows: which outputs they are, `(n,)`.
    """

    def __init__(self, damped: Damped, mask: Tensor, rows: Tensor) -> None:
        self.rows = rows
        self._solves: list[tuple[Tensor, Tensor, Tensor]] = []
        group_of_row = damped.group_of_row()[rows]
        supports, of_row = torch.unique(mask, dim=0, return_inverse=True)
        for number, support in enumerate(supports):
            alive = support.nonzero().squeeze(1)
            alike = (of_row == number).nonzero().squeeze(1)
            groups, counts = group_of_row[alike].unique(return_counts=True)
            for count in counts.unique() if len(alive) else ():  # as many groups at once as have as many such rows
                some = groups[counts == count]
                own = alike[torch.isin(group_of_row[alike], some)].reshape(len(some), -1, 1)
                hessian = damped.hessian[some.reshape(-1, 1, 1), alive.unsqueeze(1), alive]
                self._solves.append((own, alive, torch.linalg.cholesky(hessian)))

    def fit(self, cross: Tensor) -> Tensor:
        """Return the best weights for G `(n, K)` of these outputs, `(n, K)`."""
        weight = torch.zeros_like(cross)
        for own, alive, factor in self._solves:
            weight[own, alive] = torch.cholesky_solve(cross[own, alive].mT, factor).mT
        return weight


def supports(damped: Damped, mask: Tensor) -> Iterator[Supports]:
    """Yield all outputs, in parts whose factors fit into memory together; those of convolution groups are one part.

    Args:
        damped: the layer's moments.
        mask: the weights that are not zero, `(out, K)`.
    """
    order = torch.arange(len(mask))
    if len(damped.hessian) > 1:
        yield Supports(damped, mask, order)
        return
    kinds, of_row = torch.unique(mask, dim=0, return_inverse=True)
    part = kinds.sum(dim=1).square().cumsum(dim=0) // FACTOR_NUMBERS
    for rows in (order[part[of_row] == number] for number in part.unique()):
        yield Supports(damped, mask[rows], rows)


def refit(damped: Damped, mask: Tensor) -> Tensor:
    """Return the best weights `(out, K)` that are zero where `mask` is not true."""
    weight = torch.zeros_like(damped.cross)
    for part in supports(damped, mask):
        weight[part.rows] = part.fit(damped.cross[part.rows])
    return weight


def error(moments: Moments, weight: Tensor) -> Tensor:
    """Return the mean squared error of each output with some weights `(out, K)`, `(out,)`."""
    by_group = weight.reshape(len(moments.hessian), -1, weight.shape[1])
    squared = ((by_group @ moments.hessian).flatten(0, 1) * weight).sum(dim=1)
    return (squared - 2 * (weight * moments.cross).sum(dim=1) + moments.energy).clamp_min(0)
