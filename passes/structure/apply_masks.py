"""Write zeros where the masks prune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from slrc.ir.program import Program
from slrc.passes.base import PassResult, Transform
from slrc.sparsity.masks import Masks


@dataclass(frozen=True)
class ApplyMasks(Transform):
    """Multiply every masked tensor by its mask; the graph stays as it is.

    1. `w` with mask `m` becomes `w · m`.
    """

    masks: Masks
    name: ClassVar[str] = "apply-masks"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with pruned weights at zero."""
        pruned = self.masks.apply(program.tensors)
        changed = {n: t for n, t in pruned.items() if not torch.equal(t, program.tensors[n])}
        return PassResult(program.with_tensors(changed), True) if changed else PassResult(program, False)
