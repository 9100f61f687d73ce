"""What random layers in float32 and in int8 share: their windows, sums in double precision, and calls of the C API."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

GUARD = 64
"""Numbers on both sides of a result that must stay as they are."""


class Window(ctypes.Structure):
    """`SlrcWindow`."""

    _fields_ = (
        ("kernel", ctypes.c_int64 * 2),
        ("strides", ctypes.c_int64 * 2),
        ("pads", ctypes.c_int64 * 4),
        ("dilations", ctypes.c_int64 * 2),
        ("group", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class AnyLayer:
    """A layer with its input. `weight` is `(out, in/groups, kh, kw)`, or `(out, in)` of a matrix."""

    block: int
    weight: NDArray[Any]
    x: NDArray[Any]
    residual: NDArray[Any] | None = None
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether the weight has no window."""
        return self.weight.ndim == 2

    def sums(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what torch computes of an input, in double precision."""
        weight = torch.from_numpy(self.weight).double()
        if self.is_matrix:
            return functional.linear(x, weight, bias)
        top, left, bottom, right = self.pads
        padded = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(padded, weight, bias, self.strides, 0, self.dilations, self.groups)

    def run(self, conv: Any, gemm: Any, blocks: ctypes.Structure, like: NDArray[Any]) -> NDArray[Any]:
        """Compute by one of two C functions a result `like` another, between two guard zones, which are checked."""
        held = np.full(like.size + 2 * GUARD, 77, like.dtype)
        y = held[GUARD : GUARD + like.size]
        y[:] = np.nan if like.dtype.kind == "f" else 99
        error = ctypes.create_string_buffer(512)
        told = error, ctypes.c_size_t(512)
        x, residual, to = (None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (self.x, self.residual, y))
        if self.is_matrix:
            tokens, inputs = (ctypes.c_int64(d) for d in self.x.shape)
            failed = gemm(ctypes.byref(blocks), x, tokens, inputs, residual, to, *told)
        else:
            window = Window(self.weight.shape[2:], self.strides, self.pads, self.dilations, self.groups)
            from_shape, to_shape = ((ctypes.c_int64 * 4)(*s) for s in (self.x.shape, like.shape))
            failed = conv(ctypes.byref(blocks), ctypes.byref(window), x, from_shape, residual, to, to_shape, *told)
        if failed:
            raise ValueError(error.value.decode())
        assert (held[:GUARD] == 77).all()
        assert (held[GUARD + like.size :] == 77).all()
        return y.reshape(like.shape)


def pick(random: np.random.Generator, *choices: Any) -> Any:
    """Return one of some values."""
    return choices[random.integers(len(choices))]


def random_planes(
    random: np.random.Generator,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> tuple[int, list[int], list[int]]:
    """Return a batch, and sizes of input and output that fit: planes from one pixel to a few thousand."""
    reach = [(kernel[a] - 1) * dilations[a] + 1 - pads[a] - pads[a + 2] for a in range(2)]
    size = [int(random.integers(1, pick(random, 5, 20, 70))) for _ in range(2)]
    size = [max(size[a], reach[a], 1) for a in range(2)]
    return int(random.integers(1, 4)), size, [(size[a] - reach[a]) // strides[a] + 1 for a in range(2)]
