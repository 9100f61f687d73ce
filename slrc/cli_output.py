"""Where the command line prints: results on stdout, progress on stderr, from one process of a distributed run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from slrc.progress import Reporter

PIPED_COLUMNS = 1000
"""Of what is no terminal: whoever reads a file or a pipe looks for whole names and lines."""


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, or as `COLUMNS` says."""
    from rich.console import Console

    # No markup: names and paths may hold brackets.
    made = Console(stderr=stderr, markup=False, highlight=False)
    if not made.file.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        made.width = PIPED_COLUMNS
    return made


def reporter() -> Reporter:
    """Return what shows progress bars; nothing where another process does."""
    from slrc.progress import Bars, Quiet

    return Bars(console(stderr=True)) if is_main_process() else Quiet()


def is_main_process() -> bool:
    """Tell whether this is the process of a distributed run that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0
