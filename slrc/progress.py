"""Progress on long work: bars on stderr for the command line, silence for the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

WIDE = 110
"""Characters of a line from which on bars and what is left of the work stand beside the notes."""


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, note: str = "") -> None:
        """One more step is done."""


class Reporter(Protocol):
    """Where progress and notes go."""

    def note(self, text: str) -> None:
        """Say something in passing."""

    def task(self, what: str, total: int) -> AbstractContextManager[Task]:
        """Start work of `total` steps; the result is a context manager that gives a `Task`."""


class Quiet:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Task]:
        """Count silently."""
        yield _Silent()


class _Silent:
    def advance(self, note: str = "") -> None:
        return


class Bars:
    """Progress bars and notes on a console (stderr, so that results alone stand on stdout)."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, style="dim", highlight=False)

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Task]:
        """Show a bar while the work lasts, where there is room for one; leave one line."""
        wide = self._console.is_terminal and self._console.width >= WIDE
        columns = (
            TextColumn("{task.description}"),
            *((BarColumn(bar_width=24),) if wide else ()),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            *((TimeRemainingColumn(),) if wide else ()),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self._console) as progress:
            yield _Bar(progress, what, total)


class _Bar:
    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._id = progress.add_task(what, total=total, note="")

    def advance(self, note: str = "") -> None:
        self._progress.update(self._id, advance=1, note=note)
