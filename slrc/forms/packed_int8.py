"""`PackedInt8`: the blocks of an int8 weight that survive, each of some outputs × 4 consecutive input channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = 4
"""Input channels of a block: those that one dot product of bytes multiplies."""
MOST_WEIGHT = 127
"""Weights are symmetric: −127 to 127."""


@dataclass(frozen=True)
class PackedInt8:
    """A block-sparse int8 weight, in blocks of M outputs × 4 input channels at one kernel position.

    `values` is int8, `(surviving blocks, M, 4)`. `columns` is int32, `(surviving blocks,)`: `quad · kh·kw + position`,
    rising in each block row, a quad being 4 consecutive input channels of the convolution group (the last one is filled
    up with zeros). Block row `r` holds the blocks `row_pointers[r]` to `row_pointers[r + 1] - 1`, at least one; each
    convolution group has its outputs / M block rows, rounded up, the last one filled up with zeros.

    A weight of any sparsity can be packed: one pruned to `block:Mx4` loses nothing, one pruned to `block:Mx1` keeps
    zeros where not all four channels survive.
    """

    values: Tensor
    columns: Tensor
    row_pointers: Tensor

    @staticmethod
    def of(weight: Tensor, rows: int, groups: int = 1) -> PackedInt8:
        """Pack the blocks that are not zero (of a row of zeros, the first) of an int8 `(out, in/groups, *kernel)`.

        Raises:
            ValueError: the weight is not int8, or holds −128.
        """
        if weight.dtype != torch.int8 or bool((weight < -MOST_WEIGHT).any()):
            raise ValueError(f"expected an int8 weight of −127 to 127, got {weight.dtype} from {weight.min()}")
        blocks = _blocks(weight, rows, groups)
        kept = blocks.flatten(2).any(dim=2)
        kept[:, 0] |= ~kept.any(dim=1)
        pointers = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(0)])
        return PackedInt8(
            values=blocks[kept].contiguous(),
            columns=kept.nonzero()[:, 1].to(torch.int32),
            row_pointers=pointers.to(torch.int32),
        )


def int8_density(weight: Tensor, rows: int, groups: int = 1) -> float:
    """Return the share of the dense work that blocks of `rows` outputs × 4 input channels leave.

    Above 1 where outputs and channels do not fill the blocks. The weight, of any type, is `(out, in/groups, *kernel)`.
    """
    kept = int(_blocks(weight, rows, groups).flatten(2).any(dim=2).sum())
    return kept * rows * CHANNELS / weight.numel()


def _blocks(weight: Tensor, rows: int, groups: int) -> Tensor:
    """Return `(block rows, quads · kernel positions, rows, 4)`, filled up with zeros."""
    per_group, channels = weight.shape[0] // groups, weight.shape[1]
    split = weight.detach().reshape(groups, per_group, channels, -1)
    taps = split.shape[3]
    filled = torch.nn.functional.pad(split, (0, 0, 0, -channels % CHANNELS, 0, -per_group % rows))
    quads = filled.shape[2] // CHANNELS
    return (
        filled.reshape(-1, rows, quads, CHANNELS, taps).permute(0, 2, 4, 1, 3).reshape(-1, quads * taps, rows, CHANNELS)
    )
