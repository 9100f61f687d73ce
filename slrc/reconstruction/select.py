"""Which weights of a layer survive, for each pattern."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slrc.reconstruction.eliminate import Removal, eliminate, keep_in_each, share_out
from slrc.reconstruction.solve import Damped
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.patterns import Block, Columns, Pattern
from slrc.sparsity.projection import project

ITERATIONS, RAMP = 24, 16
"""Of alternating least squares and projection, and how many of them until only `keep` groups are kept."""


class Grid(NamedTuple):
    """A pattern whose outputs share their columns: blocks of outputs `(blocks, R)`, and `size` columns each.

    `columns` `(K,)` are in an order that has those of a group side by side.
    """

    rows: Tensor
    columns: Tensor
    size: int
    choose: Callable[[Removal, int], Tensor]


def grid_of(pattern: Pattern, shape: tuple[int, ...], order: Sequence[int] | None) -> Grid | None:
    """Return a pattern's grid on a weight of `shape`; `None` for patterns of single weights."""
    rows = torch.arange(shape[0]) if order is None else torch.tensor(order)
    columns, kernel = torch.arange(torch.Size(shape[1:]).numel()), torch.Size(shape[2:]).numel()
    if isinstance(pattern, Block):
        by_position = columns.reshape(-1, pattern.cols, kernel).transpose(1, 2).flatten()
        return Grid(rows.reshape(-1, pattern.rows), by_position, pattern.cols, share_out)
    if isinstance(pattern, Columns):
        return Grid(rows.reshape(pattern.groups, -1), columns, kernel, keep_in_each)
    return None


def select(constraints: Sequence[Constraint], damped: Damped, shape: tuple[int, ...], rate: float) -> list[Tensor]:
    """Return a mask `(out, K)` for each of some constraints of one weight, which differ in what they keep alone.

    Args:
        constraints: on a weight, all of one pattern.
        damped: the layer's moments.
        shape: of the weight.
        rate: the share of the groups that is dropped in one round.
    """
    first = constraints[0]
    grid = grid_of(first.pattern, shape, first.order)
    if grid is None:
        return [_alternate(c, damped, shape) for c in constraints]
    removal = eliminate(damped.ordered(grid.columns), grid.rows, grid.size, rate)
    masks = []
    for c in constraints:
        kept = grid.choose(removal, c.keep).repeat_interleave(grid.size, dim=1)
        mask = torch.empty(shape[0], damped.columns, dtype=torch.bool)
        mask[grid.rows.flatten().unsqueeze(1), grid.columns] = kept.repeat_interleave(grid.rows.shape[1], dim=0)
        masks.append(mask)
    return masks


def _alternate(c: Constraint, damped: Damped, shape: tuple[int, ...]) -> Tensor:
    """Return the support that alternating least squares and projection settle on (ADMM, Boža, arXiv 2401.02938).

    Columns are scaled to a diagonal of ones. The projection keeps less and less, where the pattern leaves that open.
    """
    deviation = damped.hessian.diagonal(dim1=1, dim2=2).sqrt()
    hessian = damped.hessian / (deviation.unsqueeze(1) * deviation.unsqueeze(2))
    by_row = deviation[damped.group_of_row()]
    groups = len(hessian)
    target = (damped.cross / by_row).reshape(groups, -1, damped.columns)
    stiff = torch.cholesky_inverse(torch.linalg.cholesky(hessian + torch.eye(damped.columns, dtype=hessian.dtype)))
    target, stiff = target.float(), stiff.float()
    weight = target @ torch.cholesky_inverse(torch.linalg.cholesky(hessian)).float()
    dual = torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for i in range(ITERATIONS):
        share = min(1.0, (i + 1) / RAMP)
        keep = c.keep if c.pattern.fixed_sparsity is not None else c.groups - round((c.groups - c.keep) * share)
        moved = weight + dual
        mask = project(c.pattern, moved.reshape(shape), keep).reshape(moved.shape)
        copy = moved * mask
        dual = moved - copy
        weight = (target + copy - dual) @ stiff
    return mask.reshape(shape[0], -1)
