"""Inputs and outputs of a layer, their moments, and what least squares makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from slrc.reconstruction.solve import Damped
from slrc.reconstruction.statistics import Moments, Statistics


def correlated(samples: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)


def moments_of(x: Tensor, y: Tensor) -> Moments:
    """Of `(samples, g, K)` and `(samples, out)`, about zero."""
    statistics = Statistics()
    statistics.add(x, y)
    return statistics.moments().about_zero()


def undamped(moments: Moments) -> Damped:
    return Damped(moments.hessian, moments.cross)


def least_squares(x: Tensor, y: Tensor, columns: Tensor) -> tuple[Tensor, float]:
    weight = torch.linalg.lstsq(x[:, columns], y).solution
    return weight.T, float((x[:, columns] @ weight - y).square().sum()) / len(x)
