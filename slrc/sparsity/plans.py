"""`Plan`: what is constrained, and how much of it may survive.

A plan is data. It names, for every constrained weight or coupled group of tensors, the pattern and how many groups
of it are kept. It can be printed, compared, edited and fed back with `--plan`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from torch import Tensor

from slrc.errors import PatternError, PlanError
from slrc.sparsity.budget import Budget, Floats, Menu, Option, choose_options
from slrc.sparsity.choices import Attention, LayerNorm
from slrc.sparsity.patterns import AnyPattern, Block, PatternField
from slrc.sparsity.projection import energies, obeys, project

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
    """Where the units of a coupled group, or the outputs of a single weight, lie in one dimension of one tensor.

    `index` lists positions unit by unit, the same number for each (`"0:64,128:192"` in JSON); `None` is unit `i` at
    position `i`.
    """

    tensor: str
    dim: int = 0
    index: Indices = None

    def first(self, tensor: Tensor) -> Tensor:
        """Return `tensor` with the dimension of the units first."""
        return tensor.movedim(self.dim, 0)

    def rows(self, tensor: Tensor, units: int) -> Tensor:
        """Return the slice of `tensor` as `(units, features)`."""
        moved = self.first(tensor)
        if self.index is not None:
            moved = moved[torch.tensor(self.index, device=tensor.device)]
        return moved.reshape(units, -1)

    def scale_(self, tensor: Tensor, value: Tensor) -> None:
        """Multiply the slice of `tensor` in place by a factor for each unit, `(units,)`: a number, or true or false."""
        moved = self.first(tensor)
        index = torch.arange(len(moved)) if self.index is None else torch.tensor(self.index)
        spread = value.repeat_interleave(len(index) // len(value)).reshape(-1, *(1 for _ in moved.shape[1:]))
        moved[index] = moved[index] * spread


class Constraint(_Data):
    """At most `keep` of `groups` survive in each row of the pattern's view of `members`.

    For a pattern on single weights, `members` is that weight. For `channel` it is the coupled group: the producers'
    slices, each unit a row; `followers` are the consumers' slices, which vanish with their unit and are not scored.

    `order` is for patterns on single weights: the pattern sees output `order[i]` of the weight as its row `i`, so that
    outputs with alike columns fall into one block (`"3,0,1,2"` in JSON); `None` is output `i` as row `i`. Weights and
    masks stay as the user has them; `slrc.passes.structure.permute_channels` reorders the program.
    """

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


class LatencyForecast(_Data):
    """What was asked for and is expected, as shares of the dense latency; `segments_ms` is what the segments sum to."""

    target: str
    threads: int
    budget: float
    predicted: float
    segments_ms: float


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
    budget: Budget | None = None

    @property
    def patterns(self) -> str:
        """The patterns of all constraints, such as `block:8x1 + channel`."""
        return " + ".join(sorted({str(c.pattern) for c in self.constraints}))

    def partly(self, share: float) -> Plan:
        """Return the plan with only a `share` of what it prunes, in [0, 1], for schedules."""
        keeps = [c.groups - round((c.groups - c.keep) * share) for c in self.constraints]
        partly = [c.model_copy(update={"keep": k}) for c, k in zip(self.constraints, keeps, strict=True)]
        return self.model_copy(update={"constraints": tuple(partly)})

    def reallocated(self, tensors: Mapping[str, Tensor]) -> Plan:
        """Return the plan with the options of its budget that cost these weights least; without a budget, itself.

        An option costs −log of the share of the layer's energy that its projection keeps, times its weight: the least
        sum keeps the greatest product of shares, so that the scale of a layer says nothing and none is starved.

        Raises:
            PlanError: not even the fastest options keep to the budget.
        """
        if self.budget is None:
            return self
        losses = self._losses(tensors)
        ms = [np.array([o.ms for o in menu.options]) for menu in self.budget.menus]
        chosen = choose_options(losses, ms, self.budget.ms)
        if chosen is None:
            raise PlanError(
                f"a budget of {self.budget.ms:.3f} ms cannot be met: the fastest options of all layers take "
                f"{self.budget.least_ms:.3f} ms"
            )
        return self.with_options({m.name: m.options[k] for m, k in zip(self.budget.menus, chosen, strict=True)})

    def loss(self, tensors: Mapping[str, Tensor]) -> float:
        """Return what its options cost these weights, as `reallocated` counts; 0 without a budget."""
        if self.budget is None:
            return 0.0
        taken, menus = self.options(), self.budget.menus
        places = [menu.options.index(taken[menu.name]) for menu in menus]
        return sum(float(own[k]) for own, k in zip(self._losses(tensors), places, strict=True))

    def _losses(self, tensors: Mapping[str, Tensor]) -> list[Floats]:
        assert self.budget is not None
        named = {c.name: c for c in self.constraints}
        coupled = {c.name: c.project(tensors) for c in self.constraints if c.pattern.coupled}
        left = self.left_by_channels(coupled, tensors)
        return [_losses(named[menu.name], menu, tensors, left.get(menu.name)) for menu in self.budget.menus]

    def project(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mask of every constraint's projection, by its name: of channels, then of what those leave."""
        kept = {c.name: c.project(tensors) for c in self.constraints if c.pattern.coupled}
        left = self.left_by_channels(kept, tensors)
        return {c.name: kept[c.name] if c.name in kept else c.project(tensors, left.get(c.name)) for c in self}

    def left_by_channels(self, kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what channels leave of single weights, as their constraints see them, by the constraint's name.

        Args:
            kept: the masks of coupled groups, by the constraint's name.
            tensors: of the shapes of the model's.
        """
        single = {c.members[0].tensor: c for c in self.constraints if not c.pattern.coupled}
        left = {n: torch.ones(tensors[n].shape, dtype=torch.bool) for n in single}
        touched = set()
        for c in self.constraints:
            if c.pattern.coupled:
                units = kept[c.name].any(dim=1).cpu()
                for s in c.members + c.followers:
                    if s.tensor in single:
                        touched.add(s.tensor)
                        s.scale_(left[s.tensor], units)
        return {single[n].name: single[n].in_order(left[n]) for n in touched}

    def with_options(self, chosen: Mapping[str, Option]) -> Plan:
        """Return the plan with these options of its budget, by the name of the constraint.

        Raises:
            PlanError: the budget has no such option: it is of another plan.
        """
        menus = {menu.name: menu.options for menu in self.budget.menus} if self.budget else {}
        if strangers := [name for name, option in chosen.items() if option not in menus.get(name, ())]:
            raise PlanError(f"`{strangers[0]}` has an option that the plan's budget does not offer")
        constraints = [c if c.name not in chosen else with_option(c, chosen[c.name]) for c in self.constraints]
        return self.model_copy(update={"constraints": tuple(constraints)})

    def options(self) -> dict[str, Option]:
        """Return which options of its budget the plan has, as `with_options` takes them."""
        named = {c.name: c for c in self.constraints}
        return {
            menu.name: next(o for o in menu.options if with_option(named[menu.name], o) == named[menu.name])
            for menu in (self.budget.menus if self.budget else ())
        }

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
                check_slice(c, s, tensors)
            check_order(c, tensors)
            if not c.pattern.coupled:
                weight = c.members[0].tensor
                shape = tuple(c.gather(tensors).shape)
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


def with_option(constraint: Constraint, option: Option) -> Constraint:
    """Return a constraint with an option's pattern and what that keeps."""
    return constraint.model_copy(update={"pattern": option.pattern, "groups": option.groups, "keep": option.keep})


def _losses(constraint: Constraint, menu: Menu, tensors: Mapping[str, Tensor], left: Tensor | None) -> Floats:
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
