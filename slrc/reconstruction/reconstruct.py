"""The method `reconstruct`: the layers in order, each pruned and refitted to the dense network's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from slrc.config import CompileConfig
from slrc.ir.nodes import layer_weight
from slrc.ir.program import Program
from slrc.methods.settings import ReconstructSettings
from slrc.progress import Quiet, Reporter
from slrc.reconstruction.calibration import Inputs, calibration_inputs
from slrc.reconstruction.observe import Observed, first_uses, observe, operands
from slrc.reconstruction.select import select
from slrc.reconstruction.side_by_side import SideBySide
from slrc.reconstruction.solve import Damped, supports
from slrc.reconstruction.units import choose_units
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.sparsity.windows import Window
from slrc.training.loop import train
from slrc.training.trained import Trained
from slrc.workload import Workload


def reconstruct(
    program: Program,
    workload: Workload,
    plan: Plan,
    config: CompileConfig,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Trained:
    """Prune the workload's model in place so that it obeys the plan, with neither labels nor training.

    Each layer is refitted to the outputs that it has in the dense network, from the inputs that it has in the pruned
    one. Memory is bounded by one layer's moments and the values that some layer still reads. With retraining epochs the
    network is then trained under its masks.

    Args:
        program: the captured dense model.
        workload: the model and its calibration data.
        plan: what is constrained.
        config: the settings, the epochs of retraining, and the seed.
        checkpoints: a folder for the state of retraining; `None` saves nothing.
        resume: go on with retraining from the newest checkpoint there, if there is one.
        reporter: where progress goes.

    Raises:
        WorkloadError: there is no calibration data, or it cannot be used.
    """
    notes: list[str] = []

    def prune() -> Masks:
        inputs = calibration_inputs(program, workload, config.reconstruct.images, config.seed)
        found = refit_layers(program, plan, inputs, config.reconstruct, config.seed, reporter or Quiet())
        state = {n: t for n, t in workload.model.state_dict().items() if isinstance(t, Tensor)}
        with torch.no_grad():
            for name, value in found.tensors.items():
                state[name].copy_(value)
        found.masks.check(plan, state)
        notes.extend(found.notes)
        return found.masks

    trained = train(workload, plan, config, checkpoints=checkpoints, resume=resume, reporter=reporter, prune=prune)
    return replace(trained, notes=tuple(notes))


class Reconstruction(NamedTuple):
    """The tensors that changed, by every name they have, the masks, and what could not be refitted."""

    tensors: dict[str, Tensor]
    masks: Masks
    notes: tuple[str, ...]


def refit_layers(
    program: Program,
    plan: Plan,
    inputs: Sequence[Inputs],
    settings: ReconstructSettings,
    seed: int,
    reporter: Reporter,
) -> Reconstruction:
    """Return the program's tensors pruned and refitted, layer by layer. See `reconstruct`."""
    generator = torch.Generator().manual_seed(seed)
    coupled = tuple(c for c in plan if c.pattern.coupled)
    units = choose_units(program, coupled, inputs, settings, generator, reporter) if coupled else {}
    return _Refit(program, plan, inputs, settings, generator, units).run(reporter)


class _Refit:
    """One way through the network."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        inputs: Sequence[Inputs],
        settings: ReconstructSettings,
        generator: torch.Generator,
        units: dict[str, Tensor],
    ) -> None:
        self.program, self.plan, self.settings, self.generator = program, plan, settings, generator
        self.kept = dict(units)
        tensors = program.tensors
        self.both = SideBySide(program, inputs, list(first_uses(program).values()))
        self.constraints = {id(tensors[c.members[0].tensor]): c for c in plan if not c.pattern.coupled}
        coupled = plan.model_copy(update={"constraints": tuple(c for c in plan if c.pattern.coupled)})
        self.masks = {id(tensors[n]): m for n, m in Masks.of(coupled, tensors, units).tensors.items()}
        self.notes: list[str] = []
        for tensor in tensors.values():
            if (mask := self.masks.get(id(tensor))) is not None:
                self.both.own[id(tensor)] = tensor.detach() * mask

    def run(self, reporter: Reporter) -> Reconstruction:
        """Refit all layers in order."""
        stretches = self.both.stretches
        with reporter.task("reconstructing", len(stretches)) as task:
            for number, (_, layer) in enumerate(stretches):
                self._step(number)
                task.advance(str(layer_weight(layer)))
        tensors = self.program.tensors
        own = {n: self.both.own[id(t)].detach() for n, t in tensors.items() if id(t) in self.both.own}
        return Reconstruction(own, Masks.of(self.plan, tensors, self.kept), tuple(self.notes))

    def _step(self, number: int) -> None:
        """Observe a layer and refit it; its moments are gone before those of the next are made."""
        seen = observe(self.both, number, self.settings.positions, self.generator, self._is_refitted)
        if seen.moments is not None:
            self._refit(seen)
        elif (constraint := self.constraints.get(id(seen.stored))) is not None:
            self._prune_by_magnitude(seen, constraint)

    def _is_refitted(self, layer: Node) -> bool:
        """Whether a layer is pruned, or has other inputs than in the dense network and a weight of its own."""
        source, node = operands(layer)
        key = id(self.both.constant(node))
        if key in self.constraints or key in self.masks:
            return True
        return self.both.differs(source) and self.both.is_stored(node) and self.both.reads(node) == 1

    def _prune_by_magnitude(self, seen: Observed, c: Constraint) -> None:
        name = c.members[0].tensor
        self.kept[c.name] = c.project({name: seen.stored})
        mask = torch.ones(seen.stored.shape, dtype=torch.bool)
        c.scatter(self.kept[c.name], {name: mask}, followers=False)
        self.both.replace(operands(seen.layer)[1], seen.stored * mask)
        self.notes.append(f"`{c.name}` was pruned by magnitude and not refitted: {seen.why_not}")

    def _refit(self, seen: Observed) -> None:
        moments, around = seen.moments, seen.around
        assert moments is not None
        damped = seen.damped(self.settings.damping)
        constraint, given = self.constraints.get(id(seen.stored)), self.masks.get(id(seen.stored))
        given = None if given is None else seen.outputs_first(given)
        if constraint is not None:
            mask = self._select(constraint, damped, seen.weight, given)
            self.kept[constraint.name] = constraint.gather({constraint.members[0].tensor: seen.as_stored(mask)})
        else:
            mask = torch.ones_like(damped.cross, dtype=torch.bool) if given is None else given
        fitted, outputs = self._fit(seen, damped, mask)
        self.both.replace(operands(seen.layer)[1], seen.as_stored(fitted).contiguous())
        left = outputs - (fitted * moments.inputs[damped.group_of_row()]).sum(dim=1)
        if around.bias is not None:
            bias_mask = self.masks.get(id(self.both.constant(around.bias)))
            self.both.replace(around.bias, left if bias_mask is None else left * bias_mask)
        elif around.mean is not None:
            self.both.replace(around.mean, self.both.current(around.mean) - left)

    def _select(self, constraint: Constraint, damped: Damped, weight: Tensor, left: Tensor | None) -> Tensor:
        """Return the mask `(out, K)` that a layer's own pattern keeps of what channels leave of its weight, `left`."""
        window = Window.of(constraint.pattern, weight, None if left is None else left.reshape(weight.shape))
        if window.rows is None or window.columns is None:
            return select([constraint], damped, tuple(weight.shape), self.settings.rate)[0]
        taps = weight[0, 0].numel()
        columns = (window.columns.unsqueeze(1) * taps + torch.arange(taps)).flatten()
        missing = len(window.seen) - len(window.rows)
        cross = functional.pad(damped.cross[window.rows][:, columns], (0, 0, 0, missing))
        hessian = damped.hessian[:, columns][:, :, columns]
        if len(hessian) > 1:  # the moments of what is left of the groups: all rows of a group are, or none
            hessian = hessian[damped.group_of_row()[window.rows].unique()]
        seen = damped._replace(hessian=hessian, cross=cross)
        groups = constraint.pattern.group_view(window.seen).shape[1]
        narrow = constraint.of_groups(groups)
        mask = select([narrow], seen, tuple(window.seen.shape), self.settings.rate)[0]
        return window.put_back(mask.reshape(window.seen.shape)).flatten(1)

    def _fit(self, seen: Observed, damped: Damped, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's weights `(out, K)` on a support, and the means that its outputs are to have, `(out,)`.

        Where an activation clips the result, the target moves towards what has been fitted, and that is fitted anew.
        """
        assert seen.moments is not None
        weight, outputs = torch.zeros_like(damped.cross), seen.moments.outputs.clone()
        clipped = seen.clipped if seen.around.takes_means else None
        for part in supports(damped, mask):
            rows, cross = part.rows, damped.cross[part.rows]
            fitted, mean = part.fit(cross), seen.moments.outputs[rows]
            if clipped is not None:
                own = clipped.of(rows)
                for _ in range(self.settings.clipping):
                    moved, up = own.shift(fitted, seen.moments.inputs, mean)
                    fitted, mean = part.fit(cross + moved), seen.moments.outputs[rows] + up
            weight[rows], outputs[rows] = fitted, mean
        return weight, outputs
