"""How integers are laid out on a kind of target, and the ranges that a program's values take, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from slrc.forms.quantize_ops import LEAST_SCALE

WEIGHT_HIGHEST = 127
"""Weights are symmetric, from −127 on, so that a weight and its negative are alike."""
BIAS_HIGHEST = 1 << 30
"""Accumulators hold 32 bits: a bias may take half of them."""


class Range(NamedTuple):
    """The least and the greatest number that a value is to represent."""

    low: float
    high: float


@dataclass(frozen=True)
class Scheme:
    """What a runtime wants of a quantised graph.

    `unsigned`: activations are uint8 with a zero point, else int8 about zero. `everywhere`: what a quantised operator
    returns is quantised too, so that the next one is integer as well; else only what layers read, and what is added to
    a layer's result: a compiler fuses the rest. `integer_bias`: biases are int32, in steps of input times weight.
    """

    name: str
    unsigned: bool
    everywhere: bool
    integer_bias: bool

    @property
    def lowest(self) -> int:
        """The least integer of an activation."""
        return 0 if self.unsigned else -128

    @property
    def highest(self) -> int:
        """The greatest integer of an activation."""
        return 255 if self.unsigned else 127

    def scale_of(self, limits: Range) -> tuple[Tensor, int]:
        """Return the scale `()`, in float32, and the zero point of a range; zero is represented exactly."""
        low, high = min(limits.low, 0.0), max(limits.high, 0.0)
        if not self.unsigned:
            return torch.tensor(max(max(-low, high) / self.highest, LEAST_SCALE)), 0
        scale = max((high - low) / (self.highest - self.lowest), LEAST_SCALE)
        return torch.tensor(scale), min(self.highest, max(self.lowest, round(-low / scale)))


ASYMMETRIC = Scheme("asymmetric", unsigned=True, everywhere=True, integer_bias=True)
"""For ONNX Runtime's CPU, which fuses a Q/DQ pair on every side of an operator into an integer operator."""
SYMMETRIC = Scheme("symmetric", unsigned=False, everywhere=False, integer_bias=False)
"""For TensorRT, which fuses convolution, addition and activation, and takes biases in floating point."""


class Quantization(BaseModel):
    """What is to be rounded in a program, and how: data, beside the program it was found on.

    `ranges` are those of values, by the name of their node. Layers in `skipped`, by the name of their weight, stay in
    floating point; those in `blocks` are stored in packed blocks of so many outputs × 4 input channels.
    With `round_ends` the program is a part of one that rounds: inputs and outputs are rounded whatever reads them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranges: Mapping[str, Range]
    skipped: tuple[str, ...] = ()
    blocks: Mapping[str, int] = {}
    round_ends: bool = False
