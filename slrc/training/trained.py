"""What training leaves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slrc.methods.base import Iteration
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.training.checkpoints import EpochRecord
from slrc.training.steps import StepCost


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    `tensors` are the model's parameters and buffers, hard-pruned; `plan` is what they obey, with its budget shared out
    as it was at last; `dense` and `hard_pruned` are the leading metric
    before the first step, and right after pruning with no retraining. `cost` is what steps took here: after a resumed
    run, those since; `None` if there were none. `undistilled` says why the dense network could not teach, and `notes`
    are for the report.
    """

    tensors: dict[str, Tensor]
    plan: Plan
    masks: Masks
    method: str
    dense: float | None
    hard_pruned: float | None
    curve: tuple[EpochRecord, ...]
    history: tuple[Iteration, ...]
    cost: StepCost | None = None
    undistilled: str = ""
    notes: tuple[str, ...] = ()
