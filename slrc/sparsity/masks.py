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
from slrc.sparsity.patterns import Channel
from slrc.sparsity.plans import Constraint, Plan, check_order, check_slice


@dataclass(frozen=True)
class Masks:
    """For each constrained tensor a boolean mask of its shape: true survives."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def project(plan: Plan, tensors: Mapping[str, Tensor]) -> Masks:
        """Return the masks of the projection of `tensors` on all of the plan's constraints.

        Coupled groups take their followers with them; patterns of single weights see what those leave.
        """
        return Masks(projection(plan, tensors, followers=True))

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the masked tensors, zero where they were pruned."""
        return {n: tensors[n].detach() * m.to(tensors[n]) for n, m in self.tensors.items() if n in tensors}

    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Prune `tensors` in place."""
        with torch.no_grad():
            for name, mask in self.tensors.items():
                tensors[name].mul_(mask.to(tensors[name]))

    def sparsity(self, plan: Plan) -> float:
        """Return the share of constrained elements that were pruned."""
        views = [c.gather(self.tensors) for c in plan]
        total = sum(v.numel() for v in views)
        return 1.0 - sum(int(v.sum()) for v in views) / total if total else 0.0

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
            if not isinstance(c.pattern, Channel) and not c.obeyed_by(c.gather(self.tensors), self._left(c, plan)):
                raise PlanError(f"the mask of `{c.name}` does not obey {c.pattern} with {c.keep} of {c.groups} kept")
            if isinstance(c.pattern, Channel) and int(self.surviving_units(c).sum()) > c.keep:
                raise PlanError(f"the masks of `{c.name}` keep more than {c.keep} of {c.groups} channels")

    def _left(self, c: Constraint, plan: Plan) -> Tensor | None:
        """Return what the coupled groups that survive leave of a single weight, as the constraint sees it."""
        weight = c.members[0].tensor
        left: Tensor | None = None
        for group in plan:
            if not group.pattern.coupled or weight not in {s.tensor for s in group.members + group.followers}:
                continue
            left = torch.ones(self.tensors[weight].shape, dtype=torch.bool) if left is None else left
            for s in group.members + group.followers:
                if s.tensor == weight:
                    s.scale_(left, self.surviving_units(group))
        return c.in_order(left)

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
        mask = masks[c.members[0].tensor]
        shape = tuple(mask.shape)
        if c.pattern.why_not(shape) or (groups := c.pattern.group_view(mask).shape[1]) != c.groups:
            seen = c.pattern.why_not(shape) or f"expected {c.groups} groups, got {groups}"
            raise PlanError(f"the mask of `{c.name}` of shape {shape} does not fit {c.pattern}: {seen}")


def projection(plan: Plan, tensors: Mapping[str, Tensor], *, followers: bool) -> dict[str, Tensor]:
    """Return masks of all constrained tensors, and of followers if asked: of channels, then of what those leave."""
    left = plan.left_by_channels(tensors, followers=True)
    own = {s.tensor for c in plan for s in c.members}
    masks = {n: torch.ones(tensors[n].shape, dtype=torch.bool) for n in sorted(own)}
    if followers:
        masks = {n: left.get(n, m) for n, m in {**masks, **left}.items()}
    else:
        masks |= {n: m for n, m in plan.left_by_channels(tensors, followers=False).items() if n in own}
    masks = {n: masks[n].clone() for n in sorted(masks)}
    for c in plan:
        if not c.pattern.coupled:
            mask = c.project(tensors, c.in_order(left.get(c.members[0].tensor)))
            c.scatter(mask, masks, followers=False)
    return masks
