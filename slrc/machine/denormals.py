"""Denormal numbers, which many processors compute far slower than others, as zeros.

An attention mask of -100 is enough: its exponential is denormal, and so is every product with it. Runtimes offer to
take them for zero (ONNX Runtime: `session.set_denormal_as_zero`). Models are timed so, dense and compiled alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LEAST = 5e-324


def are_zero() -> bool:
    """Tell whether this thread takes denormal numbers for zero."""
    return _LEAST == 0.0


@contextmanager
def taken_for_zero() -> Iterator[None]:
    """Take them for zero in this thread, where the processor can, and do as before afterwards."""
    with unchanged():
        torch.set_flush_denormal(True)
        yield


@contextmanager
def unchanged() -> Iterator[None]:
    """Undo what happens to this thread's mode: training is the same to the last bit, whatever was timed before."""
    before = are_zero()
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
