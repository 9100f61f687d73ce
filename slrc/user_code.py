"""Which lines of a trace are the user's own, for errors and reports that name them."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_SLRC = tuple((_HERE / folder).resolve() for folder in (".", "passes", "backends"))
_PACKAGES = tuple({Path(sysconfig.get_paths()[name]).resolve() for name in ("purelib", "platlib")})
_PYTHON = tuple({Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib")})
_MACHINERY = tuple(folder / name for folder in _PACKAGES for name in ("torch", "accelerate"))

LONGEST = 200
"""Characters of an error that are shown."""


class Line(NamedTuple):
    """A line of source, in a trace."""

    file: str
    number: int
    code: str

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.number}: {self.code}"


def users_line(lines: Sequence[Line]) -> Line | None:
    """Return the line of a trace, the outermost call first, that shows the user what to look at.

    It is the last one of the user's own. A model of a library has none: then it is the last one of an installed package
    other than torch, and `None` if there is none either.
    """
    outside = [line for line in lines if not line.file.startswith("<") and not _lies_in(line.file, _SLRC)]
    own = [line for line in outside if not _lies_in(line.file, (*_PACKAGES, *_PYTHON))]
    others = [x for x in outside if _lies_in(x.file, _PACKAGES) and not _lies_in(x.file, _MACHINERY)]
    return next(reversed(own or others), None)


def lines_of(error: BaseException) -> list[Line]:
    """Return the lines that an error passed on its way up to where it was caught, the outermost first."""
    return _lines(traceback.extract_tb(error.__traceback__))


def calling_line() -> Line | None:
    """Return the user's line that is being executed."""
    return users_line(_lines(traceback.extract_stack()))


def lines_in(trace: str) -> list[Line]:
    """Return the lines of a trace that was printed."""
    found = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', trace)
    return [Line(file, int(number), code) for file, number, code in found]


def at(line: Line | None) -> str:
    """Return ` at file:line: `code`` for an error, or an empty text."""
    return f" at {_short(line.file)}:{line.number}: `{line.code}`" if line else ""


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says; torch may write thousands of symbols in one."""
    said = said_first(error)
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def said_first(error: BaseException) -> str:
    """Return the first line of what an error says; empty if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, or its type."""
    return said_first(error) or type(error).__name__


def _lines(frames: Iterable[traceback.FrameSummary]) -> list[Line]:
    return [Line(f.filename, f.lineno or 0, _code(f)) for f in frames]


def _code(frame: traceback.FrameSummary) -> str:
    return linecache.getline(frame.filename, frame.lineno or 0).strip() or frame.line or ""


def _lies_in(file: str, folders: Sequence[Path]) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in folders)


def _short(file: str) -> str:
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except ValueError:
        return re.sub(r".*/site-packages/", "", file)
