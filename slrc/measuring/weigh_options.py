"""Weigh options by what they are measured to cost: how far the network's outputs move, with no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from slrc.ir.program import Program
from slrc.measuring.choose_widths import WidthWeights, losses_of_widths
from slrc.measuring.latency_meter import Menus
from slrc.measuring.latency_table import interpolate
from slrc.progress import Reporter
from slrc.reconstruction.calibration import Inputs, calibration_inputs
from slrc.reconstruction.errors import group_divergences, layer_errors, output_divergences
from slrc.sparsity.budget import Menu, Option
from slrc.sparsity.choices import Metric
from slrc.sparsity.constraints import Constraint, with_option
from slrc.sparsity.plans import Plan
from slrc.training.distillation import returns_logits
from slrc.workload import Workload

IMAGES = 256
"""Samples that tell what options cost."""
REFERENCE = 0.25
"""The share of its groups that a layer keeps where it is pruned alone."""
WIDTH_REFERENCE = 0.5
"""The share of its units that a group of channels keeps where it is pruned alone."""
LEAST = 1e-12
Weights = Mapping[tuple[str, Option], float]
"""By what the loss of energy of each option counts, by the name of its layer; options have no milliseconds here."""


class Weigher:
    """Tells by what options and widths count: measured on the workload's data, by a metric other than energy alone.

    Args:
        program: the dense network.
        workload: with calibration data or training batches; else all count alike.
        metric: `error` is of layers alone: widths then go by energy.
        seed: of the samples.
        reporter: where progress goes.
    """

    def __init__(
        self, program: Program, workload: Workload | None, metric: Metric, seed: int, reporter: Reporter | None
    ) -> None:
        self._program, self._workload, self._reporter, self._seed = program, workload, reporter, seed
        has_data = workload is not None and (workload.calibration is not None or workload.train_batches is not None)
        self._metric = metric if has_data else Metric.ENERGY
        self._weighed: dict[tuple[Menu, ...], Weights] = {}

    def options(self, plan: Plan, menus: Sequence[Menu]) -> Weights:
        """Return what the options of a plan's layers count; nothing where all count alike.

        It does not depend on what they take: the same options are weighed once.
        """
        if self._metric is Metric.ENERGY:
            return {}
        same = tuple(Menu(name=menu.name, options=tuple(map(_untimed, menu.options))) for menu in menus)
        if same not in self._weighed:
            logits = self._returns_logits
            self._weighed[same] = weigh_options(
                self._program, plan, menus, self._inputs, self._metric, self._reporter, logits=logits
            )
        return self._weighed[same]

    def widths(self, plan: Plan) -> WidthWeights:
        """Return what a plan's groups of channels count; nothing where all count alike."""
        if self._metric is not Metric.DIVERGENCE:
            return {}
        return weigh_widths(self._program, plan, self._inputs, self._reporter, logits=self._returns_logits)

    @property
    def _returns_logits(self) -> bool | None:
        return None if self._workload is None else returns_logits(self._workload)

    @cached_property
    def _inputs(self) -> list[Inputs]:
        assert self._workload is not None
        return calibration_inputs(self._program, self._workload, IMAGES, self._seed)


def weigh_options(
    program: Program,
    plan: Plan,
    menus: Sequence[Menu],
    inputs: Sequence[Inputs],
    metric: Metric,
    reporter: Reporter | None = None,
    *,
    logits: bool | None = None,
) -> Weights:
    """Return by what the loss of energy of each option counts, so that the dense weights' loss is what was measured.

    An option costs its layer's error of reconstruction, on the inputs of the dense network. For `divergence` that is
    scaled for each layer, so that a layer that keeps a quarter costs what the network's outputs move by if it alone is
    pruned. Errors are measured for the first pattern of a menu; those of other patterns go by the energy that they
    lose beside it.

    Args:
        program: the dense network.
        plan: its constraints of single weights have the menus.
        menus: the options.
        inputs: of the network's calls.
        metric: `error` or `divergence`.
        reporter: where progress goes.
        logits: as for `output_divergences`.

    Raises:
        PlanError: a layer's inputs cannot be unfolded.
    """
    constraints = {c.name: c for c in plan if not c.pattern.coupled}
    first = {menu.name: _of_first_pattern(constraints[menu.name], menu) for menu in menus}
    asked = {name: options for name, options in first.items() if options}
    errors = layer_errors(program, inputs, asked, reporter=reporter)
    near = {name: int(np.argmin([abs(c.keep / c.groups - REFERENCE) for c in own])) for name, own in asked.items()}
    scale = dict.fromkeys(asked, 1.0)
    if metric is Metric.DIVERGENCE:
        alone = {name: own[near[name]] for name, own in asked.items()}
        moved = output_divergences(program, inputs, alone, logits=logits, reporter=reporter)
        scale = {name: moved[name] / max(errors[name][near[name]], LEAST) for name in asked}
    weights: dict[tuple[str, Option], float] = {}
    for menu in menus:
        if menu.name in asked:
            own = asked[menu.name]
            densities, known = [c.keep / c.groups for c in own], errors[menu.name]
            for option in menu.options:
                density = option.keep / option.groups
                if density < 1:
                    error = interpolate(-density, [*(-d for d in densities), -1.0], [*known, 0.0]) * scale[menu.name]
                    lost = _lost(program, own[0], max(1, round(own[0].groups * density)))
                    weights[menu.name, _untimed(option)] = error / max(lost, LEAST)
    return weights


def weigh_widths(
    program: Program,
    plan: Plan,
    inputs: Sequence[Inputs],
    reporter: Reporter | None = None,
    *,
    logits: bool | None = None,
) -> WidthWeights:
    """Return by what the loss of energy of each group of channels counts.

    A group that keeps half of its units then costs what the network's outputs move by if it alone is pruned.

    Args:
        program: the dense network.
        plan: of channels.
        inputs: of the network's calls.
        reporter: where progress goes.
        logits: as for `output_divergences`.
    """
    half = [c.model_copy(update={"keep": max(1, round(WIDTH_REFERENCE * c.groups))}) for c in plan]
    moved = group_divergences(program, inputs, half, logits=logits, reporter=reporter)
    return {c.name: moved[c.name] / max(losses_of_widths(c, program)[c.keep], LEAST) for c in half}


def weighed(found: Menus, weights: Weights) -> Menus:
    """Return menus whose options have their weights."""
    menus = [
        Menu(
            name=menu.name,
            options=tuple(
                o.model_copy(update={"weight": weights.get((menu.name, _untimed(o)), o.weight)}) for o in menu.options
            ),
        )
        for menu in found.menus
    ]
    return found._replace(menus=tuple(menus))


def _of_first_pattern(constraint: Constraint, menu: Menu) -> list[Constraint]:
    """Return the options of a menu's first pattern but the dense one, as constraints."""
    pruned = [o for o in menu.options if o.keep < o.groups]
    return [with_option(constraint, o) for o in pruned if o.pattern == pruned[0].pattern]


def _untimed(option: Option) -> Option:
    return option.model_copy(update={"ms": 0.0, "weight": 1.0})


def _lost(program: Program, constraint: Constraint, keep: int) -> float:
    return float(-np.log(max(1.0 - float(constraint.lost(program.tensors, [keep])[0]), np.finfo(float).tiny)))
