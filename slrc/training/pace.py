"""How fast training is: samples a second, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

FEW = 10
"""Samples a second below which a tenth is told."""


class Pace:
    """Counts the steps and samples of one epoch.

    Args:
        steps_left: of the whole phase, before the epoch's first step.
        processes: that train at once, each with samples of its own.
        now: a clock, in seconds.
    """

    def __init__(self, steps_left: int, processes: int = 1, now: Callable[[], float] = time.monotonic) -> None:
        self._left, self._processes, self._now = steps_left, processes, now
        self._started, self._steps, self._samples = now(), 0, 0

    def step(self, samples: int) -> None:
        """Note that a step was taken on so many samples."""
        self._steps += 1
        self._samples += samples * self._processes

    def __str__(self) -> str:
        seconds = self._now() - self._started
        if not self._steps or seconds <= 0:
            return ""
        left = timedelta(seconds=round((self._left - self._steps) * seconds / self._steps))
        rate = self._samples / seconds
        return f"{rate:,.{0 if rate >= FEW else 1}f} samples/s, {left} to go"
