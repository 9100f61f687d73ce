"""`Diagnosis`: what an examination found, as data."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

DIAGNOSIS_SCHEMA_VERSION: Final = 1


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    NOTE = "note"
    FAILS = "fails"


class Finding(_Data):
    """What one check says, and what to do about it."""

    check: str
    status: Status
    said: str
    hint: str | None = None


class Pin(_Data):
    """Why some layers cannot be pruned by a pattern."""

    reason: str
    layers: tuple[str, ...]


class Reach(_Data):
    """The shares of the parameters and multiply-accumulates that a pattern touches, and what pins the rest."""

    pattern: str
    params: float
    macs: float
    pins: tuple[Pin, ...]


class PartTime(_Data):
    """What a layer or product takes, with the operators after it; `ms` is `None` where time was over."""

    name: str
    macs: int
    ms: float | None


class SpeedupPoint(_Data):
    """The whole network, pruned by magnitude as it is: timed beside the dense one.

    `speedup` and `spread` are as in a `Latency`; both are `None` where nothing was timed, with the reason. `reached` is
    the share of the constrained weights pruned.
    """

    pattern: str
    sparsity: float
    reached: float | None = None
    speedup: float | None = None
    spread: tuple[float, float] | None = None
    why_not: str = ""


class Training(_Data):
    """What training and evaluating take here.

    `samples` are those of a batch. `steps` are those of an epoch and `hours` those of the whole training, both `None`
    where the number of batches is not known without reading them all. An evaluation that was stopped is not `whole`:
    its seconds are the least that it takes.
    """

    samples: int
    step_seconds: float
    steps: int | None
    epoch_seconds: float | None
    evaluation_seconds: float | None
    evaluation_is_whole: bool
    hours: float | None


class Diagnosis(_Data):
    """Everything that `slrc doctor` found."""

    schema_version: Literal[1] = DIAGNOSIS_SCHEMA_VERSION
    model: str
    target: str
    threads: int
    findings: tuple[Finding, ...]
    reach: tuple[Reach, ...]
    parts: tuple[PartTime, ...]
    speedups: tuple[SpeedupPoint, ...]
    training: Training | None
    seconds: float
    environment: dict[str, Any]

    @property
    def is_healthy(self) -> bool:
        """Whether no check failed."""
        return all(f.status is not Status.FAILS for f in self.findings)
