"""How the command line tells what went wrong: a message and a hint on stderr, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from slrc.errors import SlrcError
from slrc.user_code import said_first

INTERRUPTED = 130


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
    said = f"{error} {error.__cause__}".lower()
    if os.environ.get("WORLD_SIZE", "1") != "1" and ("gloo" in said or "nccl" in said):
        hint = (
            "see what it wrote; `--resume` goes on after what was saved, as `torchrun --max-restarts 1` does by itself"
        )
        _fail("another process of this run has ended, or cannot be reached", hint, 1, debug)


def _fail(message: str, hint: str | None, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else ""))
    sys.exit(code)
