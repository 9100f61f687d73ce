"""The transforms between training and lowering, in order, and what emits the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from slrc.backends import LoweredProgram, Target, get_backend
from slrc.errors import BackendError, disk_error
from slrc.forms.form import Forms
from slrc.ir.program import Program
from slrc.passes.base import Transform
from slrc.passes.forms.pack_blocks import PackBlocks
from slrc.passes.forms.split_columns import SplitColumns
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.passes.structure.drop_copies import DropCopies
from slrc.passes.structure.fold_batch_norm import FoldBatchNorm
from slrc.passes.structure.maximum_first import MaximumFirst
from slrc.passes.structure.permute_channels import PermuteChannels
from slrc.passes.structure.shrink_channels import ShrinkChannels
from slrc.passes.structure.trim_kernels import TrimKernels
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan

Checker = Callable[[str, Program], object]
"""Makes sure of a program after the transform that is named; it raises where it computes something else."""

DENSE: tuple[Transform, ...] = (FoldBatchNorm(), DropCopies(), MaximumFirst(), TrimKernels())
"""What the dense model gets too, so that only sparsity is measured."""


def run_passes(passes: Sequence[Transform], program: Program, check: Checker | None = None) -> Program:
    """Apply transforms one after another.

    Args:
        passes: the transforms.
        program: where to start.
        check: is called with the name of each transform that modified the program, and with the result.

    Raises:
        VerificationError: by `check`: a step computes something else.
    """
    for transform in passes:
        program, modified = transform(program)
        if modified and check is not None:
            check(transform.name, program)
    return program


def baseline(program: Program) -> Program:
    """Return the dense program with all that the compiled one gets besides sparsity."""
    return run_passes(DENSE, program)


def structure(program: Program, plan: Plan, masks: Masks, check: Checker | None = None) -> Program:
    """Turn masks into structure that is the same for every target. What is left of them are zeros in weights."""
    passes = (ApplyMasks(masks), PermuteChannels(plan, masks), ShrinkChannels(plan, masks), *DENSE)
    return run_passes(passes, program, check)


def apply_forms(program: Program, forms: Forms, check: Checker | None = None) -> Program:
    """Give each layer of a structured program its form on a target.

    Of a program that is to be rounded, layers are split before, packed after: see `split_layers` and `pack_layers`.
    """
    return pack_layers(split_layers(program, forms, check), forms, check)


def split_layers(program: Program, forms: Forms, check: Checker | None = None) -> Program:
    """Split layers with forms of row groups: what comes of them are layers like others."""
    return run_passes((SplitColumns(forms),), program, check)


def pack_layers(program: Program, forms: Forms, check: Checker | None = None) -> Program:
    """Pack layers in floating point; those of a program that rounds which do not round their weights."""
    return run_passes((PackBlocks(forms),), program, check)


def lower(program: Program, target: Target, folder: Path) -> LoweredProgram:
    """Emit a program for a target into a folder, which is made if it is not there.

    Raises:
        BackendError: the target cannot be built here, or cannot take the program.
        OutputError: the folder cannot be written.
    """
    backend = get_backend(target)
    reasons = [backend.available(target).why_not_emit, *backend.check(program)]
    if reason := next(filter(None, reasons), None):
        raise BackendError(f"{program.name} cannot be emitted for target `{target}`: {reason}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return LoweredProgram(backend.lower(program, target, folder), folder, target)
    except OSError as error:
        raise disk_error(folder, error) from error
