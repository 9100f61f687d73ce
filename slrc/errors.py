"""The errors a user can meet: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path


class SlrcError(Exception):
    """Base of every error that `slrc` raises on purpose.

    Args:
        message: what went wrong and where; what was expected and what was found.
        hint: what the user can do about it, or `None`.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class ConfigError(SlrcError):
    """An option, a configuration file or a plan's text has a value that cannot be used."""


class WorkloadError(SlrcError):
    """The model, its inputs, its data or the user's own functions cannot be used as given."""


class CaptureError(SlrcError):
    """`torch.export` cannot trace the model."""


class PatternError(SlrcError):
    """A pattern cannot be parsed, or does not fit a weight."""


class PlanError(SlrcError):
    """A plan does not fit the program that it is applied to."""


class TrainingError(SlrcError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be used."""


class BackendError(SlrcError):
    """A backend is missing, cannot take the program, or failed to build or run it."""


class VerificationError(SlrcError):
    """A step's output differs from the step before by more than the stated tolerance."""


class OutputError(SlrcError):
    """The output folder cannot be written, read or resumed."""


def disk_error(where: Path, error: BaseException) -> OutputError:
    """Return a readable error for a folder that cannot be written."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return OutputError(
        f"cannot write to `{where}`: {reason}", hint="free some space or choose another folder with `--out`"
    )


_HERE = Path(__file__).parent
_SLRC = tuple((_HERE / folder).resolve() for folder in (".", "passes", "backends"))
_PACKAGES = tuple({Path(sysconfig.get_paths()[name]).resolve() for name in ("purelib", "platlib")})
_PYTHON = tuple({Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib")})
_MACHINERY = tuple(folder / name for folder in _PACKAGES for name in ("torch", "accelerate"))


def own_frame(files: Sequence[str]) -> int | None:
    """Return which of a trace's files, from the outermost call to the innermost, shows the user what to look at.

    It is the last one of the user's own. A model of a library has none: then it is the last one of an installed package
    other than torch, and `None` if there is none either.
    """
    outside = [i for i, file in enumerate(files) if not file.startswith("<") and not _lies_in(file, _SLRC)]
    own = [i for i in outside if not _lies_in(files[i], (*_PACKAGES, *_PYTHON))]
    others = [i for i in outside if _lies_in(files[i], _PACKAGES) and not _lies_in(files[i], _MACHINERY)]
    return next(reversed(own or others), None)


def _lies_in(file: str, folders: Sequence[Path]) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in folders)
