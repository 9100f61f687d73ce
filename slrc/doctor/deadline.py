"""When time is over, and what ends work that does not look at the clock."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SOON = 0.01
AGAIN = 5.0
"""Seconds after which work that has caught the interruption is interrupted once more."""


class Overtime(BaseException):
    """Ends work whose time is over: no `except Exception` on the way may catch it."""


class Deadline:
    """When to stop.

    Args:
        seconds: from now on.
        now: a clock.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.started, self._end = now, now(), now() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left; negative when they are over."""
        return self._end - self.now()

    @property
    def spent(self) -> float:
        """The seconds since it was set."""
        return self.now() - self.started

    def within(self, seconds: float) -> Deadline:
        """Return one that comes after so many seconds, and no later than this one."""
        return Deadline(min(seconds, self.left), self.now)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of what is done inside."""
        began = self.now()
        try:
            yield
        finally:
            took = self.now() - began
            self.started, self._end = self.started + took, self._end + took

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Interrupt what is done inside when time is over, as Ctrl-C would; one call of a library is ended first.

        Off the main thread, and on Windows, which has no such signal, nothing is interrupted.

        Raises:
            Overtime: inside, when time is over.
        """
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return

        def look(*_: Any) -> None:
            over = self.left <= 0
            signal.setitimer(signal.ITIMER_REAL, AGAIN if over else max(self.left, SOON))
            if over:
                raise Overtime

        before = signal.signal(signal.SIGALRM, look)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, SOON))
            yield
        finally:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            finally:  # it may have come due in between
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
