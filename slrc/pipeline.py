"""The transforms between training and lowering, in order, each checked against the masked module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slrc.forms.form import Forms
from slrc.ir.program import Program
from slrc.passes.base import Transform
from slrc.passes.forms.pack_blocks import PackBlocks
from slrc.passes.forms.split_columns import SplitColumns
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.passes.structure.drop_copies import DropCopies
from slrc.passes.structure.fold_batch_norm import FoldBatchNorm
from slrc.passes.structure.permute_channels import PermuteChannels
from slrc.passes.structure.shrink_channels import ShrinkChannels
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.verify import TOLERANCE_FP32, Check, compare, outputs_of

STRUCTURE: tuple[Transform, ...] = (ApplyMasks(), PermuteChannels(), ShrinkChannels(), FoldBatchNorm(), DropCopies())
"""From masks to structure, the same for every target. What is left of the masks are zeros in weights."""

DENSE: tuple[Transform, ...] = (FoldBatchNorm(), DropCopies())
"""What the dense model gets too, so that only sparsity is measured."""


def baseline(program: Program) -> Program:
    """Return the dense program with all that the compiled one gets besides sparsity."""
    return run_passes(DENSE, program, _NOTHING, Masks())


def apply_forms(
    program: Program,
    forms: Forms,
    reference: Sequence[Tensor] | None = None,
    checks: list[Check] | None = None,
) -> Program:
    """Give each layer its form on a target, after `STRUCTURE`. See `run_passes` for `reference` and `checks`."""
    return run_passes((SplitColumns(forms), PackBlocks(forms)), program, _NOTHING, Masks(), reference, checks)


def run_passes(
    passes: Sequence[Transform],
    program: Program,
    plan: Plan,
    masks: Masks,
    reference: Sequence[Tensor] | None = None,
    checks: list[Check] | None = None,
) -> Program:
    """Apply transforms one after another.

    Args:
        passes: the transforms.
        program: where to start.
        plan: what was constrained.
        masks: what survived.
        reference: the outputs that every step must reproduce on the program's example inputs; `None` checks nothing.
        checks: where the results of the checks are added.

    Raises:
        VerificationError: a step computes something else; the message names it.
    """
    for transform in passes:
        program, modified = transform(program, plan, masks)
        if modified and reference is not None:
            outputs = outputs_of(program.module(), program.example_inputs)
            check = compare(f"masked module = {transform.name}", reference, outputs, TOLERANCE_FP32)
            if checks is not None:
                checks.append(check)
    return program


_NOTHING = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
