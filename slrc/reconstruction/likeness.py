"""How much a pruned network's outputs are like the dense one's: what can be told where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Interpreter

from slrc.ir.program import Program
from slrc.reconstruction.calibration import Inputs, calibration_inputs, samples_of
from slrc.reconstruction.errors import are_classes, output_tensors
from slrc.workload import Workload

SAMPLES = 256
"""On how many samples two networks are compared."""
LEAST = 64
"""With fewer samples that no layer was refitted on, all are compared."""


@dataclass(frozen=True)
class Likeness:
    """What two networks return for the same inputs.

    `agreement` is how often the greatest number in dimension 1 is at the same place, over all samples and places of the
    first output that may be of classes; `None` if none is. `error` is the root of the squared differences over the
    squared distances of each output from its mean. `fresh` tells whether layers were refitted on other inputs.
    """

    samples: int
    fresh: bool
    agreement: float | None
    error: float

    def __str__(self) -> str:
        which = "that no layer was refitted on" if self.fresh else "of its data"
        same = (
            "" if self.agreement is None else f"the greatest output is the dense model's in {self.agreement:.1%}, and "
        )
        return f"on {self.samples} samples {which}, {same}outputs differ by {self.error:.1%} of their spread"


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
            there are enough others.
        logits: whether outputs are of classes; by default those may be that have two dimensions.

    Raises:
        WorkloadError: there is no data, or it cannot be used.
    """
    inputs = calibration_inputs(dense, workload, refitted + SAMPLES, seed)
    others = list(_after(inputs, refitted, dense))
    fresh = refitted > 0 and sum(samples_of(dense, batch) for batch in others) >= LEAST
    chosen = others if fresh else inputs
    sums = _Sums(logits)
    runs = [Interpreter(program.graph_module) for program in (dense, pruned)]
    with torch.no_grad():
        for batch in chosen:
            sums.add(*(output_tensors(run.run(*batch)) for run in runs))
    return Likeness(sum(samples_of(dense, batch) for batch in chosen), fresh, sums.agreement, sums.error)


def _after(inputs: Sequence[Inputs], count: int, program: Program) -> Iterator[Inputs]:
    """Yield the calls of which no sample is among the first `count`."""
    seen = 0
    for batch in inputs:
        if seen >= count:
            yield batch
        seen += samples_of(program, batch)


class _Sums:
    """What is summed up over calls."""

    def __init__(self, logits: bool | None) -> None:
        self._logits, self._same, self._places, self._apart = logits, 0, 0, 0.0
        self._moments: dict[int, list[float]] = {}

    def add(self, dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> None:
        """Add the outputs of a call."""
        classes = next((k for k, output in enumerate(dense) if are_classes(output, self._logits)), None)
        for k, (a, b) in enumerate(zip(dense, pruned, strict=True)):
            if k == classes:
                alike = a.argmax(dim=1) == b.argmax(dim=1)
                self._same, self._places = self._same + int(alike.sum()), self._places + alike.numel()
            a, b = a.double(), b.double()
            self._apart += float((a - b).square().sum())
            known = self._moments.setdefault(k, [0.0, 0.0, 0.0])
            for i, more in enumerate((a.numel(), float(a.sum()), float(a.square().sum()))):
                known[i] += more

    @property
    def agreement(self) -> float | None:
        return self._same / self._places if self._places else None

    @property
    def error(self) -> float:
        spread = sum(squares - total**2 / count for count, total, squares in self._moments.values() if count)
        return math.sqrt(self._apart / spread) if spread > 0 else math.inf if self._apart else 0.0
