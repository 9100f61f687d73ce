"""AC/DC (Peste et al., NeurIPS 2021, arXiv 2106.12379): phases of sparse and of dense training in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from slrc.methods.base import Iteration, MaskedMethod
from slrc.methods.settings import ACDCSettings
from slrc.sparsity.plans import Plan


class ACDC(MaskedMethod):
    """Begins dense, since the start is trained; ends sparse."""

    name: ClassVar[str] = "ac-dc"

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, updates: int, settings: ACDCSettings | None = None
    ) -> None:
        super().__init__(parameters, plan)
        self.settings, self.updates = settings or ACDCSettings(), updates

    def update(self, loss: Callable[[], float]) -> Iteration:
        """Go over to the next phase, where one ends."""
        self.k += 1
        sparse = self.k >= self.updates * (1.0 - self.settings.final) or self.k // self.settings.phase % 2 == 1
        if not sparse:
            self.release()
        elif not self.kept:
            self.reallocate()
            self.prune(self.plan)
        return self.record(loss())
