"""Which units of coupled groups survive: those that the layers that read them miss most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from slrc.ir.nodes import conv_groups, output_dim
from slrc.ir.program import Program
from slrc.methods.settings import ReconstructSettings
from slrc.progress import Reporter
from slrc.reconstruction.calibration import Inputs
from slrc.reconstruction.eliminate import eliminate
from slrc.reconstruction.observe import Observed, first_uses, observe
from slrc.reconstruction.side_by_side import SideBySide
from slrc.reconstruction.solve import Damped
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.slices import Slice

Reads = list[tuple[Constraint, Slice]]
"""The groups that a layer reads, and where their units lie in its weight."""


def readers(program: Program, constraints: Sequence[Constraint]) -> dict[Node, Reads]:
    """Return the layers that read coupled groups, in the graph's order; none that is in groups itself."""
    tensors, found = program.tensors, {}
    for key, layer in first_uses(program).items():
        inputs = 1 - output_dim(layer)
        own = [(c, s) for c in constraints for s in c.followers if s.dim == inputs and id(tensors[s.tensor]) == key]
        if own and conv_groups(layer) == 1:
            found[layer] = own
    return found


def choose_units(
    program: Program,
    constraints: Sequence[Constraint],
    inputs: Sequence[Inputs],
    settings: ReconstructSettings,
    generator: torch.Generator,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """Return a mask for each coupled constraint, by its name, `(units, features)`.

    Every layer that reads a group eliminates its units, in the dense network; what the removal of a unit adds to its
    error, as a share of its output's variance, is summed over these layers. Where no layer reads a group, the units
    with the most energy survive.
    """
    tensors, reads = program.tensors, readers(program, constraints)
    both = SideBySide(program, inputs, list(reads))
    scores: dict[str, Tensor] = {}
    with reporter.task("choosing channels", len(reads)) as task:
        for number, own in enumerate(reads.values()):
            for name, missed in _missed(observe(both, number, settings.positions, generator), own, settings):
                scores[name] = scores.get(name, torch.zeros_like(missed)) + missed
            task.advance()
    kept = {}
    for c in constraints:
        seen_by_pattern = c.gather(tensors)
        score = scores.get(c.name, c.energies(tensors)[0].double())
        units = torch.zeros(c.groups, dtype=torch.bool)
        units[score.topk(c.keep).indices] = True
        kept[c.name] = units.unsqueeze(1).expand(seen_by_pattern.shape)
    return kept


def _missed(seen: Observed, reads: Reads, settings: ReconstructSettings) -> list[tuple[str, Tensor]]:
    if seen.moments is None:
        return []
    return [(c.name, _missed_units(seen, s, c.groups, settings)) for c, s in reads]


def _missed_units(seen: Observed, s: Slice, units: int, settings: ReconstructSettings) -> Tensor:
    """Return what each unit's removal adds to a reader's error, after those that it misses less, `(units,)`."""
    channels, taps = seen.weight.shape[1], seen.weight[0, 0].numel()
    places = torch.arange(channels) if s.index is None else torch.tensor(s.index)
    columns = (places.unsqueeze(1) * taps + torch.arange(taps)).flatten()
    damped = seen.damped(settings.damping)
    own = Damped(damped.hessian[:, columns][:, :, columns], damped.cross[:, columns])
    rows = torch.arange(len(seen.weight)).unsqueeze(0)
    removal = eliminate(own, rows, len(columns) // units, settings.rate)
    energy = seen.seen.energy.sum()
    missed = torch.zeros(units, dtype=torch.float64)
    missed[removal.order[0]] = removal.errors[0] / energy.clamp_min(torch.finfo(torch.float64).tiny)
    return missed
