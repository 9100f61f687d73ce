"""Measuring a finished output again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file

from slrc.backends import Artifact, LoweredProgram, get_backend, parse_target
from slrc.errors import OutputError
from slrc.machine.cores import usable_cores
from slrc.measuring.timing import Latency, environment, time_pair
from slrc.progress import Reporter
from slrc.reporting.report import Report

INPUTS = "inputs.safetensors"
"""The example inputs, in the output folder."""


class BenchResult(BaseModel):
    """What `slrc bench` measured, and where."""

    model_config = ConfigDict(frozen=True)

    model: str
    latency: tuple[Latency, ...]
    not_run: tuple[str, ...]
    environment: dict[str, Any]


def bench_output(folder: Path, threads: int | None, reporter: Reporter) -> BenchResult:
    """Time every target of an output folder again, by default with as many threads as the compile took here.

    Raises:
        OutputError: the folder is not the output of a compile, or a file in it is damaged.
    """
    report = Report.load(folder)
    try:
        stored = load_file(folder / INPUTS)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"`{folder / INPUTS}` cannot be read: {error}") from None
    inputs = [stored[f"input_{i}"] for i in range(len(stored))]
    latency, not_run = [], []
    before = {x.target: min(x.threads, usable_cores()) for x in report.latency if not x.device}
    for result in report.targets:
        target = parse_target(result.target)
        if why_not := get_backend(target).available(target).why_not_run:
            not_run.append(f"{target}: {why_not}")
            continue
        dense, compiled = (
            LoweredProgram(Artifact.read(path), path, target)
            for path in (folder / result.folder / "dense", folder / result.folder / "compiled")
        )
        latency.append(time_pair(dense, compiled, inputs, threads or before.get(result.target), reporter))
    return BenchResult(model=report.model, latency=tuple(latency), not_run=tuple(not_run), environment=environment())
