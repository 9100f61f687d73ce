"""What pruning each layer alone would cost, for several amounts: what an allocation of sparsity can go by."""

from __future__ import annotations

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
from slrc.reconstruction.solve import error, refit
from slrc.sparsity.plans import Constraint


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
    share of the outputs' variance. Options of one weight and pattern share one elimination.

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
            for alike in _by_pattern(asked[id(seen.weight)]):
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
    if seen.moments is None:
        raise PlanError(f"`{operands(seen.layer)[1].target}` has no error of reconstruction: {seen.why_not}")
    damped, energy = seen.damped(settings.damping), seen.moments.energy.sum()
    masks = select(constraints, damped, tuple(seen.weight.shape), settings.rate)
    least = torch.finfo(torch.float64).tiny
    return [float(error(seen.seen, refit(damped, mask)).sum() / energy.clamp_min(least)) for mask in masks]


def output_divergences(
    program: Program,
    inputs: Sequence[Inputs],
    chosen: Mapping[str, Constraint],
    settings: ReconstructSettings | None = None,
    *,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, float]:
    """Return how far the network's outputs move when one layer alone is pruned and refitted, by the constraint's name.

    For outputs `(n, classes)` it is the divergence of the dense network's softened probabilities from those of the
    pruned one, KL(dense ‖ pruned) in nats; for others the mean squared difference as a share of the outputs' variance.

    Args:
        program: the dense network.
        inputs: of its calls.
        chosen: constraints on one weight each.
        settings: positions, rate and damping.
        seed: of the positions.
        reporter: where progress goes.
    """
    settings = settings or ReconstructSettings()
    by_weight = {id(program.tensors[c.members[0].tensor]): (name, c) for name, c in chosen.items()}
    layers = [node for key, node in first_uses(program).items() if key in by_weight]
    both, generator = SideBySide(program, inputs, layers), torch.Generator().manual_seed(seed)
    changed = program.with_tensors({})
    runs = Interpreter(changed.graph_module)
    with torch.no_grad():
        dense = [_tensors(runs.run(*batch)) for batch in inputs]
    found: dict[str, float] = {}
    with (reporter or Quiet()).task("layers alone", len(layers)) as task:
        for number, layer in enumerate(layers):
            seen = observe(both, number, settings.positions, generator)
            name, constraint = by_weight[id(seen.weight)]
            mean = None if seen.around.mean is None else both.constant(seen.around.mean)
            for target, value in _alone(seen, constraint, settings, mean).items():
                changed.tensors[target].data.copy_(value)
            with torch.no_grad():
                outputs = [_tensors(runs.run(*batch)) for batch in inputs]
            parts = [_divergence(before, after) for before, after in zip(dense, outputs, strict=True)]
            found[name] = sum(parts) / len(parts)
            for node in (operands(layer)[1], seen.around.bias, seen.around.mean):
                if node is not None:
                    changed.tensors[str(node.target)].data.copy_(both.constant(node))
            task.advance(name)
    return found


def _alone(
    seen: Observed, constraint: Constraint, settings: ReconstructSettings, mean: Tensor | None
) -> dict[str, Tensor]:
    """Return the tensors of a layer that is pruned and refitted on the inputs of the dense network, by name."""
    node = operands(seen.layer)[1]
    if seen.moments is None:
        raise PlanError(f"`{node.target}` has no error of reconstruction: {seen.why_not}")
    damped = seen.damped(settings.damping)
    mask = select([constraint], damped, tuple(seen.weight.shape), settings.rate)[0]
    weight = refit(damped, mask)
    made = {str(node.target): weight.reshape(seen.weight.shape)}
    left = seen.moments.outputs - (weight * seen.moments.inputs[damped.group_of_row()]).sum(dim=1)
    if seen.around.bias is not None:
        made[str(seen.around.bias.target)] = left
    elif seen.around.mean is not None and mean is not None:
        made[str(seen.around.mean.target)] = mean - left
    return made


def _tensors(outputs: object) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _divergence(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    total = 0.0
    for a, b in zip(dense, pruned, strict=True):
        if a.dim() == 2 and a.shape[1] > 1:
            log_a, log_b = a.double().log_softmax(1), b.double().log_softmax(1)
            total += float((log_a.exp() * (log_a - log_b)).sum(dim=1).mean())
        else:
            variance = a.double().var(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
            total += float((a.double() - b.double()).square().mean() / variance)
    return total
