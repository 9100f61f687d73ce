"""`Plan`: what is constrained, and how much of it may survive.

A plan is data. It names, for every constrained weight or coupled group of tensors, the pattern and how many groups
of it are kept. It can be printed, compared, edited and fed back with `--plan`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from slrc.errors import PatternError, PlanError
from slrc.sparsity.budget import Budget, Floats, Option, choose_options
from slrc.sparsity.choices import Attention, LayerNorm
from slrc.sparsity.constraints import (
    Constraint,
    check_order,
    check_slice,
    option_losses,
    with_option,
    with_whole_members,
)

PLAN_SCHEMA_VERSION = 1


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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

    def reallocated(self, tensors: Mapping[str, Tensor], losses: Sequence[Floats] | None = None) -> Plan:
        """Return the plan with the options of its budget that cost these weights least; without a budget, itself.

        Args:
            tensors: the weights.
            losses: `option_losses` of them, where they are known.

        Raises:
            PlanError: not even the fastest options keep to the budget.
        """
        if self.budget is None:
            return self
        ms = [np.array([o.ms for o in menu.options]) for menu in self.budget.menus]
        chosen = choose_options(losses or self.option_losses(tensors), ms, self.budget.ms)
        if chosen is None:
            raise PlanError(
                f"a budget of {self.budget.ms:.3f} ms cannot be met: the fastest options of all layers take "
                f"{self.budget.least_ms:.3f} ms"
            )
        return self.with_options({m.name: m.options[k] for m, k in zip(self.budget.menus, chosen, strict=True)})

    def option_losses(self, tensors: Mapping[str, Tensor]) -> list[Floats]:
        """Return what every option of the budget costs these weights, for each of its menus; without one, nothing.

        An option costs −log of the share of the layer's energy that its projection keeps, times its weight: the least
        sum keeps the greatest product of shares, so that the scale of a layer says nothing and none is starved.
        """
        menus = self.budget.menus if self.budget else ()
        named = {c.name: c for c in self.constraints}
        left = self.left_by_channels(self._project_coupled(tensors), tensors)
        members = with_whole_members([named[menu.name] for menu in menus], tensors)
        return [option_losses(c, menu, live, left.get(c.name)) for menu, (c, live) in zip(menus, members, strict=True)]

    def loss(self, losses: Sequence[Floats]) -> float:
        """Return what the options that it has cost, of `option_losses`; 0 without a budget."""
        taken, menus = self.options(), self.budget.menus if self.budget else ()
        return sum(float(own[m.options.index(taken[m.name])]) for own, m in zip(losses, menus, strict=True))

    def project(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mask of every constraint's projection, by its name: of channels, then of what those leave."""
        coupled = self._project_coupled(tensors)
        left = self.left_by_channels(coupled, tensors)
        single = with_whole_members([c for c in self.constraints if not c.pattern.coupled], tensors)
        return coupled | {c.name: c.project(live, left.get(c.name)) for c, live in single}

    def _project_coupled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        coupled = with_whole_members([c for c in self.constraints if c.pattern.coupled], tensors)
        return {c.name: c.project(live) for c, live in coupled}

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
