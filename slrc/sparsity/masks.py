"""`Masks`: what survives of every constrained tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slrc.errors import OutputError, PlanError
from slrc.sparsity.constraints import Constraint, check_order, check_slice
from slrc.sparsity.patterns import Channel
from slrc.sparsity.plans import Plan
from slrc.sparsity.shards import own, own_of


@dataclass(frozen=True)
class Masks:
    """For each constrained tensor a boolean mask of its shape: true survives."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def project(plan: Plan, tensors: Mapping[str, Tensor]) -> Masks:
        """Return the masks of the projection of `tensors` on all of the plan's constraints.

        Coupled groups take their followers with them; patterns of single weights see what those leave.
        """
        return Masks.of(plan, tensors, plan.project(tensors))

    @staticmethod
    def of(plan: Plan, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor], *, followers: bool = True) -> Masks:
        """Return full masks from one mask for each constraint, by the constraint's name; with followers unless not."""
        names = {s.tensor for c in plan for s in c.members + (c.followers if followers else ())}
        masks = {n: torch.ones(tensors[n].shape, dtype=torch.bool) for n in sorted(names)}
        for c in plan:
            c.scatter(kept[c.name], masks, followers=followers)
        return Masks(masks)

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the masked tensors, zero where they were pruned."""
        return {n: tensors[n].detach() * m.to(tensors[n]) for n, m in self.tensors.items() if n in tensors}

    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Prune `tensors` in place."""
        with torch.no_grad():
            for name, mask in self.tensors.items():
                own(tensors[name]).mul_(own_of(mask, tensors[name]))

    def sparsity(self, plan: Plan) -> float:
        """Return the share of constrained elements that were pruned, each of them counted once."""
        masks = {name: mask.cpu() for name, mask in self.tensors.items()}
        free = {name: torch.ones_like(mask) for name, mask in masks.items()}
        for c in plan:
            c.scatter(torch.zeros_like(c.gather(masks)), free, followers=False)
        pruned = sum(int((~masks[name] & ~other).sum()) for name, other in free.items())
        total = sum(int((~other).sum()) for other in free.values())
        return pruned / total if total else 0.0

    def check(self, plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Make sure that every mask obeys its constraint.

        Args:
            plan: the constraints.
            tensors: what the masks are for, where that is at hand: each mask must have its tensor's shape.

        Raises:
            PlanError: a mask is missing, has another shape, keeps part of a group, or keeps too many.
        """
        for name, mask in self.tensors.items():
            if tensors is not None and name in tensors and mask.shape != tensors[name].shape:
                raise PlanError(
                    f"the mask of `{name}` has shape {tuple(mask.shape)}, expected {tuple(tensors[name].shape)}",
                    hint="the masks belong to another model, or to one that was shrunk since",
                )
        for c in plan:
            if missing := [s.tensor for s in c.members if s.tensor not in self.tensors]:
                raise PlanError(f"constraint `{c.name}`: no mask for `{missing[0]}`")
            _check_mask_shapes(c, self.tensors)
        left = plan.left_by_channels({c.name: c.gather(self.tensors) for c in plan if c.pattern.coupled}, self.tensors)
        for c in plan:
            if not isinstance(c.pattern, Channel) and not c.obeyed_by(c.gather(self.tensors), left.get(c.name)):
                raise PlanError(f"the mask of `{c.name}` does not obey {c.pattern} with {c.keep} of {c.groups} kept")
            if isinstance(c.pattern, Channel) and int(self.surviving_units(c).sum()) > c.keep:
                raise PlanError(f"the masks of `{c.name}` keep more than {c.keep} of {c.groups} channels")

    def surviving_units(self, constraint: Constraint) -> Tensor:
        """Return which units of a coupled group survive, `(units,)`."""
        return constraint.surviving_units(self.tensors)

    def save(self, path: str | Path) -> None:
        """Write the masks as safetensors."""
        save_file({n: m.contiguous() for n, m in self.tensors.items()}, path)

    @staticmethod
    def load(path: str | Path) -> Masks:
        """Read masks that `save` wrote.

        Raises:
            OutputError: the file is missing or is not safetensors.
        """
        try:
            return Masks(load_file(path))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"masks `{path}` cannot be read: {error}") from None


def _check_mask_shapes(c: Constraint, masks: Mapping[str, Tensor]) -> None:
    """Make sure that masks have the groups that a constraint speaks of."""
    for s in c.members + c.followers:
        if s.tensor in masks:
            check_slice(c, s, masks)
    check_order(c, masks)
    if not c.pattern.coupled:
        mask = c.gather(masks)
        shape = tuple(mask.shape)
        if c.pattern.why_not(shape) or (groups := c.pattern.group_view(mask).shape[1]) != c.groups:
            seen = c.pattern.why_not(shape) or f"expected {c.groups} groups, got {groups}"
            raise PlanError(f"the mask of `{c.name}` of shape {shape} does not fit {c.pattern}: {seen}")
