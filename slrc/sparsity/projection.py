"""The Euclidean projection on a pattern's set, written once for all patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from slrc.sparsity.patterns import Pattern


def energies(pattern: Pattern, weight: Tensor) -> Tensor:
    """Return the energy (sum of squares) of every group, `(rows, groups)`, in float32 or better."""
    view = pattern.group_view(weight.detach())
    return view.to(torch.promote_types(view.dtype, torch.float32)).square().sum(dim=-1)


def project(pattern: Pattern, weight: Tensor, keep: int) -> Tensor:
    """Return the mask of the Euclidean projection of `weight` on the pattern's set.

    Args:
        pattern: the pattern.
        weight: `(out, in, *kernel)`, or `(units, features)` for a coupled group.
        keep: how many groups survive in each row of the pattern's view.

    Returns:
        A boolean mask of the shape of `weight`, with exactly `keep` groups in each row.
    """
    energy = energies(pattern, weight)
    mask = torch.zeros_like(energy, dtype=torch.bool)
    mask.scatter_(1, energy.topk(keep, dim=1).indices, True)
    size = weight.numel() // max(1, energy.numel())
    return pattern.from_group_view(mask.unsqueeze(-1).expand(-1, -1, size), tuple(weight.shape))


def obeys(pattern: Pattern, mask: Tensor, keep: int) -> bool:
    """Return whether `mask` keeps whole groups, and at most `keep` of them in each row."""
    view = pattern.group_view(mask)
    whole = bool((view == view[..., :1]).all())
    return whole and bool((view[..., 0].sum(dim=1) <= keep).all())
