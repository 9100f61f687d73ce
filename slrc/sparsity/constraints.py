"""`Constraint`: how much of one weight or coupled group may survive, by which pattern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slrc.errors import PlanError
from slrc.sparsity.budget import Floats, Menu, Option
from slrc.sparsity.patterns import PatternField
from slrc.sparsity.projection import energies, obeys, project
from slrc.sparsity.shards import buckets, whole
from slrc.sparsity.slices import Order, Slice
from slrc.sparsity.windows import Window


class Constraint(BaseModel):
    """At most `keep` of `groups` survive in each row of the pattern's view of `members`.

    For a pattern on single weights, `members` is that weight. For `channel` it is the coupled group: the producers'
    slices, each unit a row; `followers` are the consumers' slices, which vanish with their unit and are not scored.

    `order` is for patterns on single weights: the pattern sees output `order[i]` of the weight as its row `i`, so that
    outputs with alike columns fall into one block (`"3,0,1,2"` in JSON); `None` is output `i` as row `i`. Weights and
    masks stay as the user has them; `slrc.passes.structure.permute_channels` reorders the program.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pattern: PatternField
    groups: int = Field(ge=1)
    keep: int = Field(ge=1)
    members: tuple[Slice, ...] = Field(min_length=1)
    followers: tuple[Slice, ...] = ()
    order: Order = None

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what the pattern sees: a weight's outputs in `order`, or a coupled group as `(units, features)`."""
        if not self.pattern.coupled:
            return self.in_order(tensors[self.members[0].tensor])
        return torch.cat([s.rows(tensors[s.tensor], self.groups) for s in self.members], dim=1)

    def num_weights(self, tensors: Mapping[str, Tensor]) -> int:
        """Return the number of constrained elements."""
        return self.gather(tensors).numel()

    def kept_weights(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many of the constrained elements the constraint lets survive."""
        return self.num_weights(tensors) * self.keep // self.groups

    def energies(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the energy of every group, `(rows, groups)`."""
        return energies(self.pattern, self.gather(tensors))

    def lost(self, tensors: Mapping[str, Tensor], keeps: Sequence[int], left: Tensor | None = None) -> Floats:
        """Return the share of the energy that the projection takes away with each of `keeps` groups kept."""
        window = Window.of(self.pattern, self.gather(tensors), left)
        found = energies(self.pattern, window.seen)
        smallest = found.sort(dim=1).values.sum(dim=0).double().cumsum(dim=0).cpu().numpy()
        removed = np.concatenate([[0.0], smallest])
        groups = found.shape[1]
        gone = [groups - self._kept_of(groups, keep) for keep in keeps]
        return removed[gone] / max(float(smallest[-1]), np.finfo(float).tiny)

    def project(self, tensors: Mapping[str, Tensor], left: Tensor | None = None) -> Tensor:
        """Return the projection's mask, of the shape of `gather`.

        `left`, for a single weight of that shape, is what other constraints leave of it: whole outputs and whole inputs
        are gone. The pattern then sees the weight without them, and the same share of its groups is kept.
        """
        window = Window.of(self.pattern, self.gather(tensors), left)
        if window.is_whole:
            return project(self.pattern, window.seen, self.keep)
        groups = self.pattern.group_view(window.seen).shape[1]
        return window.put_back(project(self.pattern, window.seen, self._kept_of(groups, self.keep)))

    def obeyed_by(self, mask: Tensor, left: Tensor | None = None) -> bool:
        """Return whether a mask of the shape of `gather` keeps whole groups, and no more of them than it may."""
        window = Window.of(self.pattern, mask, left)
        groups = self.pattern.group_view(window.seen).shape[1]
        return obeys(self.pattern, window.seen, self._kept_of(groups, self.keep))

    def of_groups(self, groups: int) -> Constraint:
        """Return the constraint for a weight with so many groups, of which it keeps the same share."""
        return self.model_copy(update={"groups": groups, "keep": self._kept_of(groups, self.keep)})

    def _kept_of(self, groups: int, keep: int) -> int:
        """Return how many of so many groups are the same share as `keep` of all."""
        return keep if groups == self.groups else max(1, round(groups * keep / self.groups))

    def scatter(self, mask: Tensor, masks: Mapping[str, Tensor], *, followers: bool) -> None:
        """Clear in `masks` what `mask`, of the shape of `gather`, does not keep."""
        if not self.pattern.coupled:
            masks[self.members[0].tensor].logical_and_(self._in_place_order(mask.cpu()))
            return
        units = mask.any(dim=1).cpu()
        for s in self.members + (self.followers if followers else ()):
            s.scale_(masks[s.tensor], units)

    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply every group of the members in place by its factor, `(rows, groups)`."""
        if self.pattern.coupled:
            for s in self.members:
                s.scale_(tensors[s.tensor], factors[0])
            return
        weight = tensors[self.members[0].tensor]
        spread = factors.unsqueeze(-1).expand(-1, -1, weight.numel() // factors.numel())
        shape = tuple(self.members[0].first(weight).shape)
        weight.mul_(self._in_place_order(self.pattern.from_group_view(spread, shape)))

    def in_order(self, weight: Tensor) -> Tensor:
        """Return a single weight, or a mask of it, as `gather` does."""
        seen = self.members[0].first(weight)
        return seen if self.order is None else seen[torch.tensor(self.order, device=seen.device)]

    def _in_place_order(self, seen: Tensor) -> Tensor:
        """Return what the pattern sees of a weight in the weight's own order of dimensions and of outputs."""
        if self.order is not None:
            seen = seen[torch.tensor(self.order, device=seen.device).argsort()]
        return seen.movedim(0, self.members[0].dim)

    def surviving_units(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which units of a coupled group survive in `masks`, `(units,)`."""
        return self.gather(masks).any(dim=1)


def with_whole_members(
    constraints: Iterable[Constraint], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[Constraint, dict[str, Tensor]]]:
    """Yield each constraint with the tensors of its members, whole. Those of many constraints are gathered at once.

    Constraints that are gathered together see the same tensors, so that changes in place last among them.
    """

    def num_bytes(c: Constraint) -> int:
        return sum(tensors[n].nbytes for n in {s.tensor for s in c.members})

    for bucket in buckets(constraints, num_bytes):
        live = whole({s.tensor: tensors[s.tensor] for c in bucket for s in c.members})
        for c in bucket:
            yield c, live


def with_option(constraint: Constraint, option: Option) -> Constraint:
    """Return a constraint with an option's pattern and what that keeps."""
    return constraint.model_copy(update={"pattern": option.pattern, "groups": option.groups, "keep": option.keep})


def option_losses(constraint: Constraint, menu: Menu, tensors: Mapping[str, Tensor], left: Tensor | None) -> Floats:
    """Return what each option of a menu costs the weights, `(options,)`: −log of the energy's share kept, weighed."""
    losses = np.zeros(len(menu.options))
    by_pattern: dict[str, list[int]] = {}
    for k, option in enumerate(menu.options):
        if option.keep < option.groups:
            by_pattern.setdefault(str(option.pattern), []).append(k)
    for places in by_pattern.values():
        options = [menu.options[k] for k in places]
        lost = with_option(constraint, options[0]).lost(tensors, [o.keep for o in options], left)
        losses[places] = -np.log(np.maximum(1.0 - lost, np.finfo(float).tiny)) * [o.weight for o in options]
    return losses


def check_slice(c: Constraint, s: Slice, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that a slice lies in a tensor and holds whole units.

    Raises:
        PlanError: it does not.
    """
    if s.tensor not in tensors:
        raise PlanError(
            f"constraint `{c.name}`: the model has no tensor `{s.tensor}`",
            hint="the plan belongs to another model: write a new one with `slrc inspect --plan-out`",
        )
    shape = tuple(tensors[s.tensor].shape)
    has_dim = -len(shape) <= s.dim < len(shape)
    if not has_dim and not c.pattern.coupled:
        raise PlanError(f"constraint `{c.name}`: `{s.tensor}` of shape {shape} has no dimension {s.dim}")
    if c.pattern.coupled:
        size = shape[s.dim] if has_dim else 0
        length = size if s.index is None else len(s.index)
        outside = s.index is not None and any(not 0 <= i < size for i in s.index)
        repeated = s.index is not None and len(set(s.index)) < length
        if length == 0 or outside or repeated or length % c.groups:
            raise PlanError(f"constraint `{c.name}`: `{s.tensor}` of shape {shape} does not have its units")


def check_order(c: Constraint, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that an order names every output once.

    Raises:
        PlanError: it does not, or the pattern has no order of outputs.
    """
    if c.order is None:
        return
    if c.pattern.coupled:
        raise PlanError(
            f"constraint `{c.name}`: {c.pattern} has no order of outputs", hint="take `order` out of the constraint"
        )
    shape = tuple(c.members[0].first(tensors[c.members[0].tensor]).shape)
    if sorted(c.order) != list(range(shape[0])):
        raise PlanError(
            f"constraint `{c.name}`: its `order` does not name every output of `{c.members[0].tensor}` of shape "
            f"{shape} once",
            hint=f"list 0 to {shape[0] - 1} in any order, or take `order` out",
        )
