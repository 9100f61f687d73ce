"""What pruning each layer alone would cost, for several amounts: what an allocation of sparsity can go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

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
    share of the outputs' variance; after the batch norm, where one alone reads them. Options of one weight and pattern
    share one elimination.

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
    damped, scale = seen.damped(settings.damping), seen.scale
    energy = (seen.moments.energy * scale.square()).sum().clamp_min(torch.finfo(torch.float64).tiny)
    masks = select(constraints, damped, tuple(seen.weight.shape), settings.rate, scale)
    errors = [error(seen.seen, refit(damped, mask)) * scale.square() for mask in masks]
    return [float(e.sum() / energy) for e in errors]
