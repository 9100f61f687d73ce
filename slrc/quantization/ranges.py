"""The range that a value is represented in: all of it, all but its tails, or what loses least."""

from __future__ import annotations

from enum import StrEnum

import torch

from slrc.forms.quantization import Range, Scheme
from slrc.quantization.observe import Observed

SHRINKAGE = 64
"""How many shrunken ranges are tried."""
LEAST_SHARE = 0.2


class RangeMethod(StrEnum):
    """How a range follows from what was observed."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


def range_of(seen: Observed, method: RangeMethod, scheme: Scheme, percentile: float) -> Range:
    """Return the range of a value.

    Args:
        seen: the value on calibration data.
        method: `minmax` takes all of it, `percentile` leaves out as many of a hundred numbers on either side as are
            missing to 100, `mse` has the least mean squared error of rounding and clipping together.
        scheme: of the integers.
        percentile: such as 99.99.
    """
    low, high = seen.limits
    if method is RangeMethod.MINMAX or low == high:
        return seen.limits
    width = (high - low) / len(seen.counts)
    centres = low + width * (torch.arange(len(seen.counts), dtype=torch.float64) + 0.5)
    if method is RangeMethod.PERCENTILE:
        below = seen.counts.cumsum(0) / seen.counts.sum()
        tail = 1 - percentile / 100
        first = int((below < tail).sum())
        last = int((below < 1 - tail).sum())
        return Range(min(0.0, low + width * first), max(0.0, min(high, low + width * (last + 1))))
    shares = torch.linspace(LEAST_SHARE, 1.0, SHRINKAGE)
    tried = [Range(low * float(s), high * float(s)) for s in shares]
    if low < 0 < high and scheme.unsigned:  # either side on its own
        tried += [Range(low, high * float(s)) for s in shares] + [Range(low * float(s), high) for s in shares]
    return min(tried, key=lambda limits: _loss(limits, centres, seen.counts, scheme))


def _loss(limits: Range, centres: torch.Tensor, counts: torch.Tensor, scheme: Scheme) -> float:
    scale, zero_point = scheme.scale_of(limits)
    step = scale.double()
    codes = torch.clamp(torch.round(centres / step) + zero_point, scheme.lowest, scheme.highest)
    return float((counts * ((codes - zero_point) * step - centres).square()).sum())
