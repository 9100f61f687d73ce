"""`slrc::fake_quantize`: rounding to the steps of an integer type, as an operator of a program.

A program that holds it computes in floating point what its emitted form computes in integers: a backend writes the
operator as a QuantizeLinear and a DequantizeLinear, or as a weight of the integer type. It is trained straight through
(Bengio et al., arXiv 1308.3432), and its scale as in LSQ (Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST_SCALE = 1e-12


@torch.library.custom_op("slrc::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: int, axis: int, lowest: int, highest: int, block: int = 0
) -> Tensor:
    """`(clamp(round(x / scale) + zero_point, lowest, highest) − zero_point) · scale`, ties to even.

    `scale` is positive: one number `()`, or one for each index of dimension `axis` of `x`, `(x.shape[axis],)`. A weight
    with a `block` is to be stored in packed blocks of so many outputs, see `slrc.forms.packed_int8`; to what is
    computed that makes no difference.
    """
    spread = _spread(scale, x, axis)
    codes = torch.clamp(torch.round(x / spread) + zero_point, lowest, highest)
    return (codes - zero_point) * spread


@fake_quantize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def quantize(x: Tensor, scale: Tensor, zero_point: int, axis: int, lowest: int, highest: int) -> Tensor:
    """Return the integers that `fake_quantize` rounds to, as int32."""
    codes = torch.round(x / _spread(scale, x, axis)) + zero_point
    return torch.clamp(codes, lowest, highest).to(torch.int32)


def _spread(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return the scale so that it broadcasts to `x`."""
    positive = scale.clamp_min(LEAST_SCALE)
    return positive.reshape([-1 if d == axis else 1 for d in range(x.dim())]) if scale.dim() else positive


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, *ctx.others, _ = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Gradients of LSQ: the scale's is divided by √(elements · highest), so that it moves as fast as the weights."""
    x, scale = ctx.saved_tensors
    zero_point, axis, lowest, highest = ctx.others
    exact = x / _spread(scale, x, axis) + zero_point
    inside = (exact >= lowest) & (exact <= highest)
    for_scale = None
    if ctx.needs_input_grad[1]:
        moved = torch.where(inside, torch.round(exact) - exact, exact.clamp(lowest, highest) - zero_point)
        dims = [d for d in range(x.dim()) if not scale.dim() or d != axis]
        elements = x.numel() / max(1, scale.numel())
        for_scale = (gradient * moved).sum(dims).reshape(scale.shape) / (elements * max(highest, 1)) ** 0.5
    return gradient * inside, for_scale, None, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)
