"""Silence for what torch logs and prints on its way to an error that slrc reports itself."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

DEBUG = "SLRC_DEBUG"
"""The environment variable that lets torch speak; `--debug` sets it."""


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hold back warnings, logs and prints while torch traces or exports, unless the user debugs."""
    if os.environ.get(DEBUG):
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch's loggers have handlers of their own, each of them
    hidden = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
