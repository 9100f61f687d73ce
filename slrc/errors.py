"""The errors a user can meet: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

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


class UnreachableError(PlanError):
    """A latency cannot be met; `least` is the share of the dense one that can."""

    def __init__(self, message: str, hint: str, least: float) -> None:
        super().__init__(message, hint)
        self.least = least


class TrainingError(SlrcError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be used."""


class BackendError(SlrcError):
    """A backend is missing, cannot take the program, or failed to build or run it."""


class VerificationError(SlrcError):
    """A step's output differs from the step before by more than the stated tolerance."""


class OutputError(SlrcError):
    """The output folder cannot be written, read or resumed."""


class DeviceError(SlrcError):
    """A device cannot be reached, cannot run what is asked of it, or computes something else."""


def disk_error(where: Path, error: BaseException) -> OutputError:
    """Return a readable error for a folder that cannot be written."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return OutputError(
        f"cannot write to `{where}`: {reason}", hint="free some space or choose another folder with `--out`"
    )
