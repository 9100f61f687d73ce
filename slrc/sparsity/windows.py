"""`Window`: what a pattern sees of a weight of which other constraints have taken whole outputs and inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slrc.sparsity.patterns import AnyPattern, Block


class Window(NamedTuple):
    """A weight without the outputs and inputs that are gone; its last block is filled up with outputs of no energy."""

    seen: Tensor
    shape: tuple[int, ...]
    rows: Tensor | None = None
    columns: Tensor | None = None

    @staticmethod
    def of(pattern: AnyPattern, weight: Tensor, left: Tensor | None) -> Window:
        """Return what a pattern sees of a weight `(out, in, *kernel)` of which `left`, of its shape, is left."""
        shape = tuple(weight.shape)
        if left is None or bool(left.all()):
            return Window(weight, shape)
        rows, columns = left.flatten(1).any(dim=1), left.transpose(0, 1).flatten(1).any(dim=1)
        rectangle = rows[:, None] & columns[None, :]
        if not bool((left == rectangle.reshape(*rectangle.shape, *(1 for _ in shape[2:]))).all()):
            return Window(weight, shape)
        kept_rows, kept_columns = rows.nonzero().flatten(), columns.nonzero().flatten()
        seen = weight[kept_rows][:, kept_columns]
        if missing := -len(seen) % (pattern.rows if isinstance(pattern, Block) else 1):
            last = seen[-1:].expand(missing, *seen.shape[1:])
            seen = torch.cat([seen, last if seen.dtype == torch.bool else torch.zeros_like(last)])
        return Window(seen, shape, kept_rows, kept_columns)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is gone."""
        return self.rows is None

    def put_back(self, mask: Tensor) -> Tensor:
        """Return a mask of what is seen as one of the whole weight, false where it is gone."""
        assert self.rows is not None
        assert self.columns is not None
        whole = mask.new_zeros(self.shape)
        part = whole[self.rows]
        part[:, self.columns] = mask[: len(self.rows)]
        whole[self.rows] = part
        return whole
