"""What pruning each layer, or each group of channels, alone would cost: what an allocation of sparsity can go by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

from slrc.errors import PlanError
from slrc.ir.program import Program
from slrc.methods.settings import ReconstructSettings
from slrc.progress import Quiet, Reporter
from slrc.reconstruction.calibration import Inputs
from slrc.reconstruction.observe import Observed, first_uses, observe, operands
from slrc.reconstruction.select import select
from slrc.reconstruction.side_by_side import SideBySide
from slrc.reconstruction.solve import Damped, error, refit
from slrc.reconstruction.units import choose_units, readers
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Block, Columns
from slrc.sparsity.plans import Plan

TELLING, NEIGHBOURS = 256, 16
"""Outputs that tell a layer's error, each with weights of its own to fit, and how many stand together at least."""
MOST_OUTPUTS = 2**27
"""Numbers of the dense network's outputs that are kept, half a gigabyte: no further batch is compared after these."""


def layer_errors(
    program: Program,
    inputs: Sequence[Inputs],
    options: Mapping[str, Sequence[Constraint]],
    settings: ReconstructSettings | None = None,
    *,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, list[float]]:
    """Return the relative error of each option, in order, by the options' name.

    It is the mean squared error of the layer's outputs, pruned and refitted on the inputs of the dense network, as a
    share of the outputs' variance; of a layer with many outputs some tell it. Options of one weight and pattern share
    one elimination.

    Args:
        program: the dense network.
        inputs: of its calls, see `calibration_inputs`.
        options: constraints on one weight each, which may differ in pattern and in what they keep.
        settings: positions, rate and damping.
        seed: of the positions.
        reporter: where progress goes.

    Raises:
        PlanError: an option is for coupled groups, or its layer's inputs cannot be unfolded.
    """
    settings = settings or ReconstructSettings()
    tensors = program.tensors
    asked: dict[int, list[tuple[str, int, Constraint]]] = {}
    for name, constraints in options.items():
        for place, c in enumerate(constraints):
            if c.pattern.coupled:
                raise PlanError(f"`{name}`: {c.pattern} spans layers, and has no error of one layer")
            asked.setdefault(id(tensors[c.members[0].tensor]), []).append((name, place, c))
    layers = [node for key, node in first_uses(program).items() if key in asked]
    both, generator = SideBySide(program, inputs, layers), torch.Generator().manual_seed(seed)
    found = {name: [0.0] * len(constraints) for name, constraints in options.items()}
    with (reporter or Quiet()).task("layer errors", len(layers)) as task:
        for number in range(len(layers)):
            seen = observe(both, number, settings.positions, generator)
            for alike in _by_pattern(asked[id(seen.stored)]):
                errors = _errors(seen, [c for _, _, c in alike], settings)
                for (name, place, _), value in zip(alike, errors, strict=True):
                    found[name][place] = value
            del seen  # else its moments lived on beside the next ones
            task.advance()
    return found


def _by_pattern(own: Sequence[tuple[str, int, Constraint]]) -> list[list[tuple[str, int, Constraint]]]:
    alike: dict[object, list[tuple[str, int, Constraint]]] = {}
    for entry in own:
        alike.setdefault((entry[2].pattern, entry[2].order), []).append(entry)
    return list(alike.values())


def _errors(seen: Observed, constraints: Sequence[Constraint], settings: ReconstructSettings) -> list[float]:
    damped, shape, moments = _damped(seen, settings), tuple(seen.weight.shape), seen.seen
    dense = seen.moments
    assert dense is not None
    if len(damped.hessian) == 1 and not isinstance(constraints[0].pattern, Columns):  # their outputs share supports
        rows = _telling(constraints[0], shape[0])
        constraints = [_of_some(c, len(rows) / shape[0]) for c in constraints]
        shape, damped = (len(rows), *shape[1:]), damped._replace(cross=damped.cross[rows])
        moments, dense = (m._replace(cross=m.cross[rows], energy=m.energy[rows]) for m in (moments, dense))
    energy = dense.energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    masks = select(constraints, damped, shape, settings.rate)
    return [float(error(moments, refit(damped, mask)).sum() / energy) for mask in masks]


def _telling(c: Constraint, outputs: int) -> Tensor:
    """Return which of a layer's outputs tell its error: runs of neighbours, with all of a block, spread evenly."""
    rows = c.pattern.rows if isinstance(c.pattern, Block) else 1
    together = -(-NEIGHBOURS // rows) * rows
    order = torch.arange(outputs) if c.order is None else torch.tensor(c.order)
    return torch.cat(order.split(together)[:: -(-outputs // TELLING)])


def _of_some(c: Constraint, share: float) -> Constraint:
    """Return a constraint on a share of its outputs, in their order, of whose groups it keeps the same part."""
    if c.pattern.fixed_sparsity is not None:
        return c.model_copy(update={"order": None})
    keep, groups = max(1, round(c.keep * share)), round(c.groups * share)
    return c.model_copy(update={"order": None, "keep": keep, "groups": groups})


def output_divergences(
    program: Program,
    inputs: Sequence[Inputs],
    chosen: Mapping[str, Constraint],
    settings: ReconstructSettings | None = None,
    *,
    logits: bool | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, float]:
    """Return how far the network's outputs move when one layer alone is pruned and refitted, by the constraint's name.

    For logits `(n, classes, …)` it is the divergence of the dense network's probabilities from those of the pruned one,
    KL(dense ‖ pruned) in nats, averaged over samples and positions; for other outputs the mean squared difference as a
    share of their variance. Several outputs are added up. Of large outputs fewer samples are compared.

    Args:
        program: the dense network.
        inputs: of its calls.
        chosen: constraints on one weight each.
        settings: positions, rate and damping.
        logits: whether dimension 1 of outputs is classes; `None` if nobody says: then that of `(n, classes)` is, while
            by its shape alone a map of logits is not told from one of other features.
        seed: of the positions.
        reporter: where progress goes.

    Raises:
        PlanError: a layer's inputs cannot be unfolded, or the outputs are not finite.
    """
    settings = settings or ReconstructSettings()
    by_weight = {id(program.tensors[c.members[0].tensor]): (name, c) for name, c in chosen.items()}
    layers = [node for key, node in first_uses(program).items() if key in by_weight]
    both, generator = SideBySide(program, inputs, layers), torch.Generator().manual_seed(seed)
    outputs, found = _Outputs(program, inputs, logits), {}
    with (reporter or Quiet()).task("layers alone", len(layers)) as task:
        for number in range(len(layers)):
            seen = observe(both, number, settings.positions, generator)
            name, constraint = by_weight[id(seen.stored)]
            damped = _damped(seen, settings)
            mask = select([constraint], damped, tuple(seen.weight.shape), settings.rate)[0]
            found[name] = outputs.divergence(_refitted(seen, damped, mask, both))
            task.advance(name)
    return found


def group_divergences(
    program: Program,
    inputs: Sequence[Inputs],
    chosen: Sequence[Constraint],
    settings: ReconstructSettings | None = None,
    *,
    logits: bool | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, float]:
    """Return how far the network's outputs move when one group of channels alone is pruned, by the constraint's name.

    The layers that read the group are refitted to what is left of it, on the inputs of the dense network. See
    `output_divergences`.

    Args:
        program: the dense network.
        inputs: of its calls.
        chosen: coupled constraints.
        settings: positions, rate and damping.
        logits: as for `output_divergences`.
        seed: of the positions.
        reporter: where progress goes.

    Raises:
        PlanError: the outputs are not finite.
    """
    settings, reporter = settings or ReconstructSettings(), reporter or Quiet()
    generator = torch.Generator().manual_seed(seed)
    units = choose_units(program, chosen, inputs, settings, generator, reporter)
    nothing = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
    masks = {c.name: Masks.of(nothing.model_copy(update={"constraints": (c,)}), program.tensors, units) for c in chosen}
    changed = {name: own.apply(program.tensors) for name, own in masks.items()}
    reads = readers(program, chosen)
    both = SideBySide(program, inputs, list(reads))
    with reporter.task("readers of channels", len(reads)) as task:
        for number, own in enumerate(reads.values()):
            seen = observe(both, number, settings.positions, generator)
            if seen.moments is not None:
                damped = _damped(seen, settings)
                for name, weight in {c.name: s.tensor for c, s in own}.items():
                    kept = _columns(seen.outputs_first(masks[name].tensors[weight]))
                    refitted = _refitted(seen, damped, kept, both)
                    changed[name] |= refitted | masks[name].apply(refitted)
            task.advance()
    outputs = _Outputs(program, inputs, logits)
    with reporter.task("channels alone", len(chosen)) as task:
        found = {}
        for name, tensors in changed.items():
            found[name] = outputs.divergence(tensors)
            task.advance(name)
    return found


def _columns(mask: Tensor) -> Tensor:
    """Return the mask `(out, K)` of what a layer reads; rows of its own that are pruned are fitted like the others."""
    return mask.any(dim=0).expand(mask.shape)


class _Outputs:
    """The outputs of a network, and how far they move when some of its tensors change."""

    def __init__(self, program: Program, inputs: Sequence[Inputs], logits: bool | None) -> None:
        self._original, self._logits = program.tensors, logits
        self._changed = program.with_tensors({})
        self._runs = Interpreter(self._changed.graph_module)
        self._compared: list[tuple[Inputs, list[Tensor]]] = []
        numbers = 0
        for batch in inputs:
            self._compared.append((batch, self._run(batch)))
            numbers += sum(t.numel() for t in self._compared[-1][1])
            if numbers > MOST_OUTPUTS:
                break

    def divergence(self, changed: Mapping[str, Tensor]) -> float:
        """Return the mean over batches, with the tensors of these names in place of the network's own."""
        for name, value in changed.items():
            self._changed.tensors[name].data.copy_(value)
        parts = [divergence(dense, self._run(batch), self._logits) for batch, dense in self._compared]
        for name in changed:
            self._changed.tensors[name].data.copy_(self._original[name])
        mean = sum(parts) / len(parts)
        if not math.isfinite(mean):
            raise PlanError(
                f"the network's outputs, or what they are once `{next(iter(changed))}` is pruned, are not finite: what "
                "pruning costs cannot be told from them",
                hint='are the calibration inputs what the network is used on? `budget-metric = "energy"` in a TOML '
                "file goes by the weights alone",
            )
        return mean

    def _run(self, batch: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(self._runs.run(*batch))


def _damped(seen: Observed, settings: ReconstructSettings) -> Damped:
    if seen.moments is None:
        weight = operands(seen.layer)[1].target
        raise PlanError(
            f"`{weight}` has no error of reconstruction: {seen.why_not}", hint=f"leave it out: --skip {weight}"
        )
    return seen.damped(settings.damping)


def _refitted(seen: Observed, damped: Damped, mask: Tensor, both: SideBySide) -> dict[str, Tensor]:
    """Return the tensors of a layer that is refitted on a support `(out, K)`, by name, with what takes on its means."""
    assert seen.moments is not None
    weight = refit(damped, mask)
    made = {str(operands(seen.layer)[1].target): seen.as_stored(weight)}
    left = seen.moments.outputs - (weight * seen.moments.inputs[damped.group_of_row()]).sum(dim=1)
    if seen.around.bias is not None:
        made[str(seen.around.bias.target)] = left
    elif seen.around.mean is not None:
        made[str(seen.around.mean.target)] = both.constant(seen.around.mean) - left
    return made


def output_tensors(outputs: object) -> list[Tensor]:
    """Return the numbers among a network's outputs."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def are_classes(output: Tensor, logits: bool | None) -> bool:
    """Tell whether dimension 1 of an output is of classes. See `output_divergences`."""
    return (output.dim() == 2 if logits is None else logits and output.dim() >= 2) and output.shape[1] > 1


def divergence(dense: Sequence[Tensor], pruned: Sequence[Tensor], logits: bool | None) -> float:
    """Return how far outputs have moved, see `output_divergences`."""
    total = 0.0
    for a, b in zip(dense, pruned, strict=True):
        if are_classes(a, logits):
            log_a, log_b = a.double().log_softmax(1), b.double().log_softmax(1)
            apart = torch.where(log_a.isneginf(), 0.0, log_a.exp() * (log_a - log_b))  # 0 · log 0 = 0
            total += float(apart.sum(dim=1).mean())
        else:
            variance = a.double().var(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
            total += float((a.double() - b.double()).square().mean() / variance)
    return total
