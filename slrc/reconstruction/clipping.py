"""Fitting what an activation lets through: below zero a rectifier does not tell one value from another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SAMPLED_NUMBERS, SAMPLES_A_COLUMN = 2**24, 4
"""How many numbers of a layer's inputs are kept as samples, and how many samples for each column at least."""


@dataclass(frozen=True)
class Clipped:
    """Samples of a layer whose result, scaled and added to, is clipped to `low` and `high`.

    With Y the layer's output, `Y · scale + offset` is what is clipped: `inputs` are `(g, K, samples)`, `outputs` and
    `offset` `(out, samples)`, `scale` `(out, 1)`.
    """

    inputs: Tensor
    outputs: Tensor
    offset: Tensor
    scale: Tensor
    low: float
    high: float

    def of(self, rows: Tensor) -> Clipped:
        """Return those of some outputs `(n,)`: of all, or of a layer without convolution groups."""
        return replace(self, outputs=self.outputs[rows], offset=self.offset[rows], scale=self.scale[rows])

    def shift(self, weight: Tensor, inputs_mean: Tensor, outputs_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much the moments of the target move, G by `(out, K)` and the mean by `(out,)`.

        Where the dense network's value is clipped, the target becomes what the layer with `weight` `(out, K)` gives, if
        that is clipped too, and else the bound. The error after the clipping is then at most that of the moved target
        (Zhang et al., arXiv 1505.06798, alternate likewise).
        """
        out, groups = len(weight), self.inputs.shape[0]
        x = self.inputs - inputs_mean.unsqueeze(2).to(self.inputs.dtype)
        fitted = (weight.to(x.dtype).reshape(groups, -1, weight.shape[1]) @ x).reshape(out, -1)
        before = self.outputs * self.scale + self.offset
        after = (fitted + outputs_mean.unsqueeze(1).to(x.dtype)) * self.scale + self.offset
        target = torch.where(before <= self.low, after.clamp_max(self.low), before)
        target = torch.where(before >= self.high, after.clamp_min(self.high), target)
        moved = torch.where(self.scale.abs() > 0, (target - before) / self.scale, torch.zeros_like(before))
        mean = moved.mean(dim=1, keepdim=True)
        cross = (moved - mean).reshape(groups, -1, x.shape[2]) @ x.mT / x.shape[2]
        return cross.flatten(0, 1).double(), mean.squeeze(1).double()
