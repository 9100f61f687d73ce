"""TensorRT's messages, sent to Python's logging; its errors are kept for the text of a `BackendError`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)
KEPT = ("Layers:", "(Sparsity)")


@dataclass
class MessageLog:
    """What TensorRT has said since the last `clear`; `ilogger` is the object that TensorRT reports to."""

    ilogger: Any = None
    errors: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """What the builder says of the engine's layers, and of those with 2:4 weights."""

    def clear(self) -> None:
        """Forget what was said in the steps before."""
        self.errors.clear()
        self.kept.clear()

    @property
    def last_error(self) -> str:
        """The last error, or words that say that there was none."""
        return self.errors[-1] if self.errors else "it gave no reason"

    def record(self, severity: str, text: str) -> None:
        """Pass a message on, and keep it if it is an error."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text.strip())
        if text.startswith(KEPT):
            self.kept.append(text)
        # Never louder than INFO: with no GPU present TensorRT reports errors that do not matter, and one that
        # does is raised.
        detail = severity in ("INFO", "VERBOSE")
        logger.log(logging.DEBUG if detail else logging.INFO, "%s: %s", severity.lower(), text)


@cache
def message_log(trt: Any) -> MessageLog:
    """Return the log of a flavour's module.

    There is one for the life of the process: TensorRT keeps the first logger that it gets and ignores others.
    """
    log = MessageLog()

    class Forward(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.record(severity.name, msg)

    log.ilogger = Forward()
    return log
