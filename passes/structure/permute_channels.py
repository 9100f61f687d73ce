"""Put channels in the order in which the blocks of a plan are consecutive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slrc.ir.program import Program
from slrc.passes.analysis.unit_layout import UnitLayout
from slrc.passes.base import PassResult, Transform
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan


@dataclass(frozen=True)
class PermuteChannels(Transform):
    """Reorder the units of every group whose constraints carry an `order`, in all tensors that they lie in.

    1. In each dimension of each parameter and buffer, place `i` of a group takes unit `order[i]`: rows of the layers
       that make it, scales, shifts and statistics of norms, and the inputs of every layer that reads it.
    2. A program whose weights are not zero where the masks prune, or are zero already where the masks prune in the new
       order, is left alone.

    The graph stays as it is and computes the same; masks keep the user's order.

        order (0, 2, 1, 3), blocks 2×1
        conv1 rows 0 1 2 3 ─▶ batch_norm 0 1 2 3 ─▶ conv2 inputs 0 1 2 3     row 0 is pruned like 2, row 1 like 3
        conv1 rows 0 2 1 3 ─▶ batch_norm 0 2 1 3 ─▶ conv2 inputs 0 2 1 3     two blocks of consecutive rows

    Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, have the idea, there for the inputs of a layer.
    """

    plan: Plan
    masks: Masks
    name: ClassVar[str] = "permute-channels"

    def __call__(self, program: Program) -> PassResult:
        """Return the program in the plan's order.

        Raises:
            PlanError: an order is for outputs that cannot be reordered, or two orders are for the same channels.
        """
        if all(c.order is None for c in self.plan):
            return PassResult(program, False)
        layout = UnitLayout.of_plan(program, self.plan)
        orders = layout.orders(self.plan)
        own = {
            n: m for n, m in self.masks.tensors.items() if n in program.tensors and m.shape == program.tensors[n].shape
        }
        permuted = {n: layout.permute(n, m, orders) for n, m in own.items()}
        if not _is_zero_where_pruned(program, own) or _is_zero_where_pruned(program, permuted):
            return PassResult(program, False)
        tensors = {n: layout.permute(n, program.tensors[n], orders) for n in layout.labels.tensors}
        return PassResult(program.with_tensors(tensors), True)


def check_orders(program: Program, plan: Plan) -> None:
    """Make sure that a program can be put in the orders of a plan.

    Raises:
        PlanError: see `UnitLayout.orders`.
    """
    if any(c.order is not None for c in plan):
        UnitLayout.of_plan(program, plan).orders(plan)


def _is_zero_where_pruned(program: Program, masks: Mapping[str, Tensor]) -> bool:
    return not any(bool(program.tensors[n][~mask].any()) for n, mask in masks.items())
