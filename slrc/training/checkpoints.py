"""Checkpoints of a training run: whole or absent, and loaded without unpickling code."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slrc.errors import TrainingError, disk_error
from slrc.methods.base import Iteration, MethodState
from slrc.sparsity.budget import Option

PROGRESS = "progress.json"

DISK_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What Python, safetensors and torch raise where a file cannot be written."""


class EpochRecord(BaseModel):
    """One epoch: mean training loss, the metric of the live model and of a hard-pruned copy, seconds.

    Epoch 0 is the dense start, before any step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    phase: str
    epoch: int
    loss: float | None
    metric: float | None
    hard_pruned: float | None
    seconds: float


class PartOfEpoch(BaseModel):
    """What was done of the epoch under way: steps, the sum of their losses, and the seconds that they took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 0
    summed: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands after an epoch, or within the one that follows `epochs_done`."""

    phase: str
    epochs_done: int
    part: PartOfEpoch
    curve: tuple[EpochRecord, ...]
    method: MethodState
    masks: Mapping[str, Any]
    average: Mapping[str, Any]
    options: Mapping[str, Option]
    """Which options of its budget the plan has."""


class Timer:
    """Says when a checkpoint within an epoch is due.

    Args:
        minutes: since the last checkpoint.
        now: a clock, in seconds.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._now = 60 * minutes, now
        self._last = now()

    @property
    def is_due(self) -> bool:
        """Whether the minutes have passed."""
        return self._now() - self._last >= self._seconds

    def restart(self) -> None:
        """A checkpoint was saved."""
        self._last = self._now()


class CheckpointFolder:
    """A folder of numbered checkpoints, of which the newest whole one counts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, accelerator: Accelerator, snapshot: Snapshot) -> None:
        """Write a checkpoint aside, then rename it; older ones are removed afterwards.

        The first process writes; the others take part in gathering what is shared out among them.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        if not accelerator.is_main_process:
            for part in (*accelerator._models, *accelerator._optimizers):  # in the order of `save_state`
                part.state_dict()
            return
        number = self._numbers()[-1] + 1 if self._numbers() else 0
        aside, final = self.root / "next.partial", self.root / f"{number:06d}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            accelerator.save_state(str(aside / "accelerate"), safe_serialization=True)
            if snapshot.method.tensors:
                save_file(dict(snapshot.method.tensors), aside / "method.safetensors")
            if snapshot.masks:
                save_file({n: m.contiguous() for n, m in snapshot.masks.items()}, aside / "masks.safetensors")
            if snapshot.average:
                save_file({n: t.contiguous() for n, t in snapshot.average.items()}, aside / "average.safetensors")
            progress = {
                "phase": snapshot.phase,
                "epochs_done": snapshot.epochs_done,
                "part": snapshot.part.model_dump(),
                "curve": [r.model_dump() for r in snapshot.curve],
                "numbers": dict(snapshot.method.numbers),
                "options": {name: option.model_dump(mode="json") for name, option in snapshot.options.items()},
                "history": [r.model_dump() for r in snapshot.method.history],
            }
            (aside / PROGRESS).write_text(json.dumps(progress))
            _flush(aside)
            aside.rename(final)
        except DISK_ERRORS as error:
            raise disk_error(self.root, error) from error
        for old in self._numbers()[:-1]:
            shutil.rmtree(self.root / f"{old:06d}", ignore_errors=True)

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        numbers = self._numbers()
        return self.root / f"{numbers[-1]:06d}" if numbers else None

    def read(self, folder: Path) -> Snapshot:
        """Read all but what accelerate keeps (`restore` does that, once the model is prepared).

        Raises:
            TrainingError: the checkpoint is damaged.
        """
        try:
            progress = json.loads((folder / PROGRESS).read_text())
            method, masks, average = (folder / f"{name}.safetensors" for name in ("method", "masks", "average"))
            state = MethodState(
                tensors=load_file(method) if method.exists() else {},
                numbers=progress["numbers"],
                history=tuple(Iteration.model_validate(r) for r in progress["history"]),
            )
            return Snapshot(
                phase=progress["phase"],
                epochs_done=progress["epochs_done"],
                part=PartOfEpoch.model_validate(progress["part"]),
                curve=tuple(EpochRecord.model_validate(r) for r in progress["curve"]),
                method=state,
                masks=load_file(masks) if masks.exists() else {},
                average=load_file(average) if average.exists() else {},
                options={name: Option.model_validate(o) for name, o in progress["options"].items()},
            )
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise TrainingError(
                f"checkpoint `{folder}` cannot be read: {error}", hint="remove it and run without `--resume`"
            ) from error

    def restore(self, accelerator: Accelerator, folder: Path) -> None:
        """Put model, optimiser and schedule back; pickled files are read with `weights_only`."""
        try:
            accelerator.load_state(str(folder / "accelerate"))
        except Exception as error:  # torch, safetensors and accelerate raise what they like
            raise misfit(folder, error) from error

    def _numbers(self) -> list[int]:
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit())


def misfit(folder: Path, error: Exception) -> TrainingError:
    """Return a readable error for a checkpoint of another model."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return TrainingError(
        f"checkpoint `{folder}` does not fit this model: {first}",
        hint="the model, its plan or its optimiser changed since: run without `--resume`",
    )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
