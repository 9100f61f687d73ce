"""`Plan` and `Masks`: what is constrained, how much of it may survive, and what did.

A plan is data. It names, for every constrained weight or coupled group of tensors, the pattern and how many groups
of it are kept. It can be printed, compared, edited and fed back with `--plan`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slrc.errors import OutputError, PatternError, PlanError
from slrc.latency import LatencyForecast
from slrc.patterns import AnyPattern, Channel, energies, obeys, parse_pattern, project

PLAN_SCHEMA_VERSION = 1


def _parse_ranges(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    spans = [re.fullmatch(r"(\d+):(\d+)", span.strip()) for span in value.split(",")]
    ranges = [range(int(span[1]), int(span[2])) for span in spans if span is not None]
    if len(ranges) < len(spans) or not all(ranges):
        raise ValueError(f"expected ranges like `0:64,128:192`, got `{value}`")
    return tuple(i for one in ranges for i in one)


def _print_ranges(indices: tuple[int, ...] | None) -> str | None:
    if indices is None:
        return None
    spans: list[list[int]] = []
    for i in indices:
        if spans and spans[-1][1] == i:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1])
    return ",".join(f"{start}:{stop}" for start, stop in spans)


def _parse_order(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
        raise ValueError(f"expected places like `3,0,1,2`, got `{value}`")
    return tuple(int(place) for place in value.split(","))


def _print_order(order: tuple[int, ...] | None) -> str | None:
    return None if order is None else ",".join(map(str, order))


PatternField = Annotated[
    AnyPattern,
    BeforeValidator(lambda v: v if isinstance(v, AnyPattern) else parse_pattern(str(v))),
    PlainSerializer(str, return_type=str),
]
Indices = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_parse_ranges),
    PlainSerializer(_print_ranges, return_type=str | None),
]

Order = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_parse_order),
    PlainSerializer(_print_order, return_type=str | None),
]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(_Data):
    """Where the units of a coupled group lie in one dimension of one tensor.

    `index` lists positions unit by unit, the same number for each (`"0:64,128:192"` in JSON); `None` is unit `i` at
    position `i`.
    """

    tensor: str
    dim: int = 0
    index: Indices = None

    def rows(self, tensor: Tensor, units: int) -> Tensor:
        """Return the slice of `tensor` as `(units, features)`."""
        moved = tensor.movedim(self.dim, 0)
        if self.index is not None:
            moved = moved[torch.tensor(self.index, device=tensor.device)]
        return moved.reshape(units, -1)

    def scale_(self, tensor: Tensor, value: Tensor) -> None:
        """Multiply the slice of `tensor` in place by a factor for each unit, `(units,)`: a number, or true or false."""
        moved = tensor.movedim(self.dim, 0)
        index = torch.arange(len(moved)) if self.index is None else torch.tensor(self.index)
        spread = value.repeat_interleave(len(index) // len(value)).reshape(-1, *(1 for _ in moved.shape[1:]))
        moved[index] = moved[index] * spread


class Attention(StrEnum):
    """What is removed from an attention, where heads and their width are split from one dimension."""

    HEADS = "heads"
    """Whole heads."""
    WIDTH = "width"
    """The same places of every head."""


class LayerNorm(StrEnum):
    """What becomes of the dimension that a layer norm or RMS norm normalises over."""

    KEEP = "keep"
    """It stays."""
    NARROW = "narrow"
    """It is prunable: the norm keeps the statistics of its full width."""


class Constraint(_Data):
    """At most `keep` of `groups` survive in each row of the pattern's view of `members`.

    For a pattern on single weights, `members` is that weight. For `channel` it is the coupled group: the producers'
    slices, each unit a row; `followers` are the consumers' slices, which vanish with their unit and are not scored.

    `order` is for patterns on single weights: the pattern sees output `order[i]` of the weight as its row `i`, so that
    outputs with alike columns fall into one block (`"3,0,1,2"` in JSON); `None` is output `i` as row `i`. Weights and
    masks stay as the user has them; `slrc.passes.permute_channels` reorders the program.
    """

    name: str
    pattern: PatternField
    groups: int = Field(ge=1)
    keep: int = Field(ge=1)
    members: tuple[Slice, ...] = Field(min_length=1)
    followers: tuple[Slice, ...] = ()
    order: Order = None

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what the pattern sees: the weight in its `order`, or the coupled group as `(units, features)`."""
        if not self.pattern.coupled:
            weight = tensors[self.members[0].tensor]
            return weight if self.order is None else weight[torch.tensor(self.order, device=weight.device)]
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

    def project(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the projection's mask, of the shape of `gather`."""
        return project(self.pattern, self.gather(tensors), self.keep)

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
        weight.mul_(self._in_place_order(self.pattern.from_group_view(spread, tuple(weight.shape))))

    def _in_place_order(self, seen: Tensor) -> Tensor:
        """Return what the pattern sees of a weight with its outputs back in the weight's own order."""
        return seen if self.order is None else seen[torch.tensor(self.order, device=seen.device).argsort()]

    def surviving_units(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which units of a coupled group survive in `masks`, `(units,)`."""
        return self.gather(masks).any(dim=1)


class LeftOut(_Data):
    """A weight or group that is not constrained, and why."""

    name: str
    reason: str


class Plan(_Data):
    """Everything that is constrained in a program, and what was left alone."""

    schema_version: int = PLAN_SCHEMA_VERSION
    attention: Attention = Attention.HEADS
    layer_norm: LayerNorm = LayerNorm.KEEP
    sparsity_asked: float
    sparsity: float
    latency: LatencyForecast | None = None
    shortfall: str = ""
    constraints: tuple[Constraint, ...]
    left_out: tuple[LeftOut, ...] = ()

    def partly(self, share: float) -> Plan:
        """Return the plan with only a `share` of what it prunes, in [0, 1], for schedules."""
        keeps = [c.groups - round((c.groups - c.keep) * share) for c in self.constraints]
        partly = [c.model_copy(update={"keep": k}) for c, k in zip(self.constraints, keeps, strict=True)]
        return self.model_copy(update={"constraints": tuple(partly)})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote, perhaps edited since.

        Raises:
            PlanError: the file is missing, is not JSON, or does not have a plan's fields.
        """
        try:
            data = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise PlanError(f"plan `{path}` does not exist", hint="check the path given to `--plan`") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"plan `{path}` cannot be read as JSON: {error}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != PLAN_SCHEMA_VERSION:
            raise PlanError(
                f"plan `{path}` has schema version {version}, expected {PLAN_SCHEMA_VERSION}",
                hint="write it anew with this version of slrc",
            )
        try:
            return Plan.model_validate(data)
        except PatternError as error:
            raise PlanError(f"plan `{path}`: {error.message}", hint=error.hint) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"plan `{path}`, field `{where}`: {first['msg']}") from None

    def check(self, tensors: Mapping[str, Tensor], conv_groups: Mapping[str, int]) -> None:
        """Make sure that the plan fits a program's tensors.

        Raises:
            PlanError: a tensor is missing or has another shape, or more groups are kept than there are.
        """
        names = [c.name for c in self.constraints]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise PlanError(f"constraint `{twice[0]}` appears twice in the plan", hint="give each a name of its own")
        for c in self.constraints:
            for s in c.members + c.followers:
                _check_slice(c, s, tensors)
            _check_order(c, tensors)
            if not c.pattern.coupled:
                weight = c.members[0].tensor
                shape = tuple(tensors[weight].shape)
                if reason := c.pattern.why_not(shape, conv_groups.get(weight, 1)):
                    raise PlanError(
                        f"cannot apply {c.pattern} to `{weight}`: {reason}",
                        hint=f"leave it out with `--skip {c.name}`",
                    )
            groups = c.groups if c.pattern.coupled else c.energies(tensors).shape[1]
            if c.groups != groups:
                raise PlanError(f"constraint `{c.name}`: expected {groups} groups, got {c.groups}")
            if c.keep > c.groups:
                raise PlanError(
                    f"constraint `{c.name}`: cannot keep {c.keep} of {c.groups} groups",
                    hint=f"give `keep` a value from 1 to {c.groups}",
                )
            fixed = c.pattern.fixed_sparsity
            if fixed is not None and c.keep != (prescribed := round(c.groups * (1 - fixed))):
                raise PlanError(f"constraint `{c.name}`: {c.pattern} keeps {prescribed} of {c.groups}, got {c.keep}")

    def __iter__(self) -> Iterator[Constraint]:  # type: ignore[override]
        return iter(self.constraints)


@dataclass(frozen=True)
class Masks:
    """For each constrained tensor a boolean mask of its shape: true survives."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def project(plan: Plan, tensors: Mapping[str, Tensor]) -> Masks:
        """Return the masks of the projection of `tensors` on all of the plan's constraints.

        Coupled groups take their followers with them.
        """
        return Masks.of(plan, tensors, {c.name: c.project(tensors) for c in plan})

    @staticmethod
    def of(plan: Plan, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Masks:
        """Return full masks from one mask for each constraint, by the constraint's name."""
        names = {s.tensor for c in plan for s in c.members + c.followers}
        masks = {n: torch.ones(tensors[n].shape, dtype=torch.bool) for n in sorted(names)}
        for c in plan:
            c.scatter(kept[c.name], masks, followers=True)
        return Masks(masks)

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
            if not isinstance(c.pattern, Channel) and not obeys(c.pattern, c.gather(self.tensors), c.keep):
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
            _check_slice(c, s, masks)
    _check_order(c, masks)
    if not c.pattern.coupled:
        mask = masks[c.members[0].tensor]
        shape = tuple(mask.shape)
        if c.pattern.why_not(shape) or (groups := c.pattern.group_view(mask).shape[1]) != c.groups:
            seen = c.pattern.why_not(shape) or f"expected {c.groups} groups, got {groups}"
            raise PlanError(f"the mask of `{c.name}` of shape {shape} does not fit {c.pattern}: {seen}")


def _check_slice(c: Constraint, s: Slice, tensors: Mapping[str, Tensor]) -> None:
    if s.tensor not in tensors:
        raise PlanError(
            f"constraint `{c.name}`: the model has no tensor `{s.tensor}`",
            hint="the plan belongs to another model: write a new one with `slrc inspect --plan-out`",
        )
    shape = tuple(tensors[s.tensor].shape)
    if c.pattern.coupled:
        size = shape[s.dim] if -len(shape) <= s.dim < len(shape) else 0
        length = size if s.index is None else len(s.index)
        outside = s.index is not None and any(not 0 <= i < size for i in s.index)
        repeated = s.index is not None and len(set(s.index)) < length
        if length == 0 or outside or repeated or length % c.groups:
            raise PlanError(f"constraint `{c.name}`: `{s.tensor}` of shape {shape} does not have its units")


def _check_order(c: Constraint, tensors: Mapping[str, Tensor]) -> None:
    if c.order is None:
        return
    if c.pattern.coupled:
        raise PlanError(
            f"constraint `{c.name}`: {c.pattern} has no order of outputs", hint="take `order` out of the constraint"
        )
    shape = tuple(tensors[c.members[0].tensor].shape)
    if sorted(c.order) != list(range(shape[0])):
        raise PlanError(
            f"constraint `{c.name}`: its `order` does not name every output of `{c.members[0].tensor}` of shape "
            f"{shape} once",
            hint=f"list 0 to {shape[0] - 1} in any order, or take `order` out",
        )
