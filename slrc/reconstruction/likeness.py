"""How much a pruned network's outputs are like the dense one's: what can be told where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slrc.ir.program import Program
from slrc.reconstruction.calibration import Inputs, calibration_inputs
from slrc.reconstruction.errors import are_classes, output_tensors
from slrc.workload import Workload

SAMPLES = 256
"""On how many samples two networks are compared."""


@dataclass(frozen=True)
class Likeness:
    """What two networks return for the same inputs.

    `agreement` is how often the greatest class is the same, of all samples and places of the first output that has
    classes in dimension 1; `None` if none has. `error` is the root of the squared differences over the outputs' squared
    distances from their mean. `fresh` tells whether layers were refitted on other inputs than these.
    """

    samples: int
    fresh: bool
    agreement: float | None
    error: float

    def __str__(self) -> str:
        which = "that no layer was refitted on" if self.fresh else "of its data"
        agreement = "" if self.agreement is None else f"{self.agreement:.1%} of the classes are the dense model's, and "
        return f"on {self.samples} samples {which}, {agreement}outputs differ by {self.error:.1%} of their spread"


def likeness_to_dense(
    dense: Program, pruned: Program, workload: Workload, seed: int, *, refitted: int = 0, logits: bool | None = None
) -> Likeness:
    """Compare two programs on the workload's calibration inputs.

    Args:
        dense: the captured model.
        pruned: the same with other tensors.
        workload: its calibration data, else its training batches, are what both are given.
        seed: of the order of the data.
        refitted: of how many of those inputs, from the first on, the pruned network was made; they are left out where
            there are others.
        logits: whether outputs are of classes; by default those are that have two dimensions.

    Raises:
        WorkloadError: there is no data, or it cannot be used.
    """
    inputs = calibration_inputs(dense, workload, refitted + SAMPLES, seed)
    others = list(_after(inputs, refitted, dense))
    chosen = others or inputs
    parts = [_compared(dense, pruned, batch, logits) for batch in chosen]
    same, classes, apart, spread = (sum(part) for part in zip(*parts, strict=True))
    return Likeness(
        samples=sum(_samples(batch, dense) for batch in chosen),
        fresh=refitted > 0 and bool(others),
        agreement=same / classes if classes else None,
        error=math.sqrt(apart / spread) if spread else math.nan,
    )


def _after(inputs: Sequence[Inputs], count: int, program: Program) -> Iterator[Inputs]:
    """Yield the calls of which no sample is among the first `count`."""
    seen = 0
    for batch in inputs:
        if seen >= count:
            yield batch
        seen += _samples(batch, program)


def _samples(batch: Inputs, program: Program) -> int:
    return next((len(x) for x, is_free in zip(batch, program.free_batches, strict=True) if is_free), program.batch)


def _compared(dense: Program, pruned: Program, batch: Inputs, logits: bool | None) -> tuple[float, float, float, float]:
    """Return on how many classes both agree, of how many, their squared difference, and the dense outputs' spread."""
    with torch.no_grad():
        outputs = [output_tensors(p.graph_module(*batch)) for p in (dense, pruned)]
    same = classes = apart = spread = 0.0
    for a, b in zip(*outputs, strict=True):
        if not classes and are_classes(a, logits):
            alike: Tensor = a.argmax(dim=1) == b.argmax(dim=1)
            same, classes = float(alike.sum()), float(alike.numel())
        apart += float((a.double() - b.double()).square().sum())
        spread += float((a.double() - a.double().mean()).square().sum())
    return same, classes, apart, spread
