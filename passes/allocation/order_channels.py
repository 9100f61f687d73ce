"""Choose the order of outputs in which those with alike columns fall into one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slrc.ir.program import Program
from slrc.passes.analysis.label_indices import IndexLabels
from slrc.passes.analysis.unit_layout import UnitLayout
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.patterns import AnyPattern, Block

TINY = torch.finfo(torch.float32).tiny
MOST_COLUMNS = 1024
"""Of the columns of a group of layers so many are looked at while blocks are formed."""
MOST_ROUNDS = 100
LEAST_GAIN = 1e-5
"""A share of the energy that counts as nothing gained."""
PATIENCE = 8
"""So many rounds of swaps may gain nothing before the search ends."""


def takes_order(pattern: AnyPattern) -> bool:
    """Whether outputs may be reordered for a pattern: blocks of several outputs × 1 column.

    The columns of a wider block are outputs of another layer, whose order would tear it apart.
    """
    return isinstance(pattern, Block) and pattern.rows > 1 and pattern.cols == 1


def order_channels(program: Program, labels: IndexLabels, constraints: Sequence[Constraint]) -> list[Constraint]:
    """Return the constraints with an `order` wherever one lets more energy survive.

    Layers that share their outputs (a residual stream) share the order: it is chosen for all of them together, and must
    raise the sum, over them, of the share of a layer's energy that survives. Outputs that cannot be reordered stay as
    they are.

    Args:
        program: its weights decide.
        labels: of the program.
        constraints: with `pattern` and `keep` as they will be.
    """
    layout = UnitLayout.of(program, labels)
    sharing: dict[int, list[Constraint]] = {}
    for c in constraints:
        number = layout.permutable.get(c.members[0].tensor)
        if number is not None and takes_order(c.pattern):
            sharing.setdefault(number, []).append(c)
    ordered = {c.name: c for members in sharing.values() for c in _ordered(program.tensors, members)}
    return [ordered.get(c.name, c) for c in constraints]


def kept_share(constraint: Constraint, tensors: Mapping[str, Tensor]) -> float:
    """Return the share of a weight's energy that its projection keeps."""
    energy = constraint.energies(tensors)
    total = float(energy.sum(dtype=torch.float64))
    kept = energy.topk(constraint.keep, dim=1, sorted=False).values
    return float(kept.sum(dtype=torch.float64)) / total if total else 1.0


def _ordered(tensors: Mapping[str, Tensor], constraints: Sequence[Constraint]) -> list[Constraint]:
    """Return the constraints of one group with the order that was found, or as they are if that is no better."""
    pattern = constraints[0].pattern
    assert isinstance(pattern, Block)
    order = tuple(form_blocks(RowEnergies.of(tensors, constraints, pattern.rows), pattern.rows).tolist())
    found = [c.model_copy(update={"order": order}) for c in constraints]
    before, after = (sum(kept_share(c, tensors) for c in some) for some in (constraints, found))
    return found if after > before + LEAST_GAIN else list(constraints)


@dataclass(frozen=True)
class RowEnergies:
    """What forming blocks looks at, of one or several layers side by side.

    `energy` is `(out, columns)`: squared weights, as shares of their layer's energy. `cost` is `(columns,)`: the energy
    of the last block that each layer keeps. With blocks B, the energy kept is then Σ_B Σ_c max(Σ_{r in B} energy[r, c]
    − cost[c], 0), up to a constant, as long as `cost` holds.
    """

    energy: Tensor
    cost: Tensor

    @staticmethod
    def of(tensors: Mapping[str, Tensor], constraints: Sequence[Constraint], size: int) -> RowEnergies:
        """Sample the columns of the weights of some layers, to be pruned by blocks of `size` rows."""
        weights = [c.members[0].first(tensors[c.members[0].tensor].detach()).flatten(1) for c in constraints]
        share = min(1.0, MOST_COLUMNS / sum(w.shape[1] for w in weights))
        generator = torch.Generator().manual_seed(0)
        energies, costs = [], []
        for c, weight in zip(constraints, weights, strict=True):
            columns = torch.randperm(weight.shape[1], generator=generator)[: max(1, int(share * weight.shape[1]))]
            energy = weight[:, columns].float().square()
            energy = energy / energy.sum().clamp_min(TINY)
            blocks = energy.reshape(-1, size, len(columns)).sum(dim=1)
            keep = max(1, round(blocks.numel() * c.keep / c.groups))
            energies.append(energy)
            costs.append(blocks.flatten().topk(keep, sorted=False).values.min().expand(len(columns)))
        return RowEnergies(torch.cat(energies, dim=1), torch.cat(costs))


def form_blocks(rows: RowEnergies, size: int) -> Tensor:
    """Return an order of rows in which every `size` of them have large entries in the same columns, `(out,)`."""
    blocks = _swap(rows, _gather_alike(rows, size))
    blocks = blocks.sort(dim=1).values
    return blocks[blocks[:, 0].argsort()].flatten()


def _gather_alike(rows: RowEnergies, size: int) -> Tensor:
    """Give the strongest row that is left the rows most like it, again and again; return blocks `(out/size, size)`.

    Rows are compared by the cosine of their entries, of which none counts for more than a block costs.
    """
    entries = (rows.energy / rows.cost.clamp_min(TINY)).clamp(max=1.0)
    directions = torch.nn.functional.normalize(entries, dim=1)
    alike = directions @ directions.T
    blocks: list[list[int]] = []
    free = torch.ones(len(alike), dtype=torch.bool)
    for seed in rows.energy.sum(dim=1).argsort(descending=True).tolist():
        if not free[seed]:
            continue
        block, likeness = [seed], alike[seed].clone()
        free[seed] = False
        while len(block) < size:
            row = int(likeness.masked_fill(~free, -1.0).argmax())
            block.append(row)
            likeness += alike[row]
            free[row] = False
        blocks.append(block)
    return torch.tensor(blocks)


def _swap(rows: RowEnergies, blocks: Tensor) -> Tensor:
    """Pair blocks at random and let each pair swap the two rows that gains the most, until little is gained."""
    generator = torch.Generator().manual_seed(0)
    blocks, half = blocks.clone(), len(blocks) // 2
    idle = 0
    for _ in range(MOST_ROUNDS):
        one, other = torch.randperm(len(blocks), generator=generator)[: 2 * half].reshape(2, half)
        gain, i, j = _best_swaps(rows, blocks[one], blocks[other])
        better = gain > 0
        one, other, i, j = one[better], other[better], i[better], j[better]
        blocks[one, i], blocks[other, j] = blocks[other, j], blocks[one, i]
        idle = 0 if float(gain[better].sum()) > LEAST_GAIN else idle + 1
        if idle == PATIENCE:
            break
    return blocks


def _best_swaps(rows: RowEnergies, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the best swap of each pair of blocks `(pairs, size)` gains, and which two places it swaps."""
    size = one.shape[1]
    left, right = rows.energy[one], rows.energy[other]  # (pairs, size, columns)
    over_left, over_right = left.sum(dim=1) - rows.cost, right.sum(dim=1) - rows.cost
    before = over_left.clamp(min=0).sum(dim=-1) + over_right.clamp(min=0).sum(dim=-1)
    gains = []
    for place in range(size):
        moved = right - left[:, place : place + 1]
        after = (over_left[:, None] + moved).clamp_(min=0).sum(dim=-1)
        after += (over_right[:, None] - moved).clamp_(min=0).sum(dim=-1)
        gains.append(after - before[:, None])
    best, at = torch.stack(gains, dim=1).flatten(1).max(dim=1)
    return best, at // size, at % size
