"""How the command line tells what went wrong: a message and a hint on stderr, and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from slrc.errors import SlrcError
from slrc.user_code import said_first

INTERRUPTED = 130
RAISED_BY_GLOO = re.compile(r"\[\S*/gloo/\S+:\d+\] ")
"""Where in its sources gloo lost another process: so what it raises begins."""


@contextmanager
def told_errors(debug: bool) -> Iterator[None]:
    """Turn what is raised into an exit: known errors become one message with a hint, others ask for a report."""
    try:
        yield
    except SlrcError as error:
        _fail_if_another_ended(error, debug)
        _fail(error.message, error.hint, 2, debug)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:  # what typer makes of Ctrl-C
            raise
        hint = (
            "`slrc compile --resume` goes on after what was saved of the training, if it had begun; `slrc sweep` does "
            "so where the same command is given again"
        )
        _fail("interrupted", hint, INTERRUPTED, debug)
    except Exception as error:
        _fail_if_another_ended(error, debug)
        _fail(
            f"internal error: {type(error).__name__}: {said_first(error)}",
            "this is a bug in slrc: please report it with the output of `--debug`",
            1,
            debug,
        )


def _fail_if_another_ended(error: BaseException, debug: bool) -> None:
    """What a process of several says when it cannot reach another: that one has ended, and said why."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(map(_is_of_reaching_another, _causes(error))):
        hint = (
            "see what it wrote; `--resume` goes on after what was saved, as `torchrun --max-restarts 1` does by itself"
        )
        _fail("another process of this run has ended, or cannot be reached", hint, 1, debug)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, which is wrapped where it passed through the user's code."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_of_reaching_another(error: BaseException) -> bool:
    """Tell whether processes could not exchange something: torch has types for that, but none for what gloo raises."""
    distributed = sys.modules.get("torch.distributed")  # where it was not imported, it raised nothing
    if isinstance(error, getattr(distributed, "DistError", ())):
        return True
    return type(error) is RuntimeError and RAISED_BY_GLOO.match(str(error)) is not None


def _fail(message: str, hint: str | None, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else ""))
    sys.exit(code)
