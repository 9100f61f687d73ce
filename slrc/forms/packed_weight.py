"""`PackedWeight`: the blocks of a weight that survive, one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A block-sparse weight.

    `values` is `(surviving blocks, M)`: the rows of a block side by side. `columns` is `(surviving blocks,)`: which
    column of the GEMM view, rising in each block row. Block row `r` holds the blocks `row_pointers[r]` to
    `row_pointers[r + 1] - 1`, at least one.
    """

    values: Tensor
    columns: Tensor
    row_pointers: Tensor

    @staticmethod
    def of(weight: Tensor, rows: int, groups: int = 1) -> PackedWeight:
        """Pack the blocks of a weight `(out, in/groups, *kernel)` that are not zero; of a row of zeros, the first."""
        blocks = _blocks(weight, rows, groups)
        kept = blocks.any(dim=2)
        kept[:, 0] |= ~kept.any(dim=1)
        pointers = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(0)])
        return PackedWeight(
            values=blocks[kept].contiguous(),
            columns=kept.nonzero()[:, 1].to(torch.int32),
            row_pointers=pointers.to(torch.int32),
        )


def unpack(values: Tensor, columns: Tensor, row_pointers: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """Return the dense weight of `shape`, `(out, in/groups, *kernel)`, of packed blocks."""
    rows, width = values.shape[1], torch.Size(shape[1:]).numel()
    block_rows = len(row_pointers) - 1
    owner = torch.repeat_interleave(torch.arange(block_rows), (row_pointers[1:] - row_pointers[:-1]).long())
    blocks = values.new_zeros(block_rows, width, rows)
    blocks[owner, columns.long()] = values
    per_group = shape[0] // groups
    return blocks.transpose(1, 2).reshape(groups, -1, width)[:, :per_group].reshape(shape)


def block_density(weight: Tensor, rows: int, groups: int = 1) -> float:
    """Return the share of the dense work that blocks of `rows` outputs × 1 column leave.

    Above 1 where outputs do not fill the blocks.
    """
    kept = int(_blocks(weight, rows, groups).any(dim=2).sum())
    return kept * rows / weight.numel()


def _blocks(weight: Tensor, rows: int, groups: int) -> Tensor:
    """Return `(block rows, columns, rows)`; the last block row of a convolution group is filled up with zeros."""
    per_group = weight.shape[0] // groups
    columns = weight[0].numel()
    missing = -per_group % rows
    split = torch.nn.functional.pad(weight.detach().reshape(groups, per_group, columns), (0, 0, 0, missing))
    return split.reshape(-1, rows, columns).transpose(1, 2)
