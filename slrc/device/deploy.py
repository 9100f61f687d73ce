"""What the command line does with a device: deploy what a compile wrote, measure it again there, and remove it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from slrc.backends import parse_target
from slrc.backends.engine_summary import EngineSummary
from slrc.device.build_bundle import REPORTED, choose_target, make_bundle, sources_of
from slrc.device.bundle import pack, read_bundle, unpack
from slrc.device.clocks import lock_commands, locked_clocks
from slrc.device.probe import DeviceInfo
from slrc.device.remote import Remote, Stage, device_folder
from slrc.device.results import ComparedOutput, Result
from slrc.device.ssh import Connection
from slrc.device.ssh_device import SshDevice, reported
from slrc.errors import DeviceError, disk_error
from slrc.measuring.timing import Latency
from slrc.progress import Reporter
from slrc.reporting.bench import BenchResult
from slrc.reporting.report import Pair, Report
from slrc.workspace import DEPLOYED

Agree = Callable[[str, str], bool]
"""Asks whether to lock the clocks by a command, and to set them as they were by another."""


class Deployment(BaseModel):
    """What came back from a deploy: where the model lies there, that it is equal, and what it takes."""

    model_config = ConfigDict(frozen=True)

    model: str
    device: DeviceInfo
    folder: str
    """The bundle's folder on the device."""
    runtime: str
    outputs: tuple[ComparedOutput, ...]
    latency: Latency
    engine: Pair[EngineSummary] | None = None
    """What the engines consist of, where they were built there."""


def deploy_output(
    output: Path,
    host: str,
    target: str | None,
    threads: int | None,
    reporter: Reporter,
    agree: Agree | None = None,
) -> Deployment:
    """Copy what a compile wrote, or a bundle's file, to a device, prove it equal there, measure it, and leave it there.

    The result is also written into the output's folder.

    Raises:
        OutputError: `output` is not the output of a compile.
        DeviceError: the device cannot be reached or cannot run it, or computes something else.
    """
    with SshDevice(host) as device, tempfile.TemporaryDirectory() as folder:
        stage, result, latency = _run(device, output, target, threads, Path(folder), reporter, agree)
        model = stage.manifest.model
        place = f"models/{re.sub(r'[^A-Za-z0-9_.-]+', '-', model).strip('.') or 'model'}"
        device.remote.place(stage, place)
        engines = result.engine("dense"), result.engine("compiled")
        deployment = Deployment(
            model=model,
            device=device.info,
            folder=f"{device.remote.folder}/{place}",
            runtime=result.runtime,
            outputs=result.outputs,
            latency=latency,
            engine=Pair(dense=engines[0], compiled=engines[1]) if engines[0] and engines[1] else None,
        )
    if output.is_file():
        return deployment
    path = output / DEPLOYED
    try:
        path.write_text(deployment.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise disk_error(path, error) from error
    return deployment


def bench_on_device(
    output: Path,
    host: str,
    target: str | None,
    threads: int | None,
    reporter: Reporter,
    agree: Agree | None = None,
) -> BenchResult:
    """Measure what a compile wrote on a device; nothing of the model stays there.

    Raises:
        OutputError: `output` is not the output of a compile.
        DeviceError: the device cannot be reached or cannot run it, or computes something else.
    """
    with SshDevice(host) as device, tempfile.TemporaryDirectory() as folder:
        stage, _, latency = _run(device, output, target, threads, Path(folder), reporter, agree)
        device.remote.forget(stage.passing())
        environment = {"cpu": device.info.name, **device.info.model_dump()}
    return BenchResult(model=stage.manifest.model, latency=(latency,), not_run=(), environment=environment)


def remove_from(host: str) -> int | None:
    """Remove all that slrc brought to a device; return its size in bytes, `None` where there was nothing."""
    with Connection(host) as connection:
        return Remote(connection, device_folder()).remove()


def bundle_file(output: Path, archive: Path, target: str | None, threads: int | None, *, program: bool = False) -> str:
    """Write what a compile wrote as the tar of a bundle; return the name of its target.

    `program` adds the runner for a device without Python.

    Raises:
        OutputError: `output` is not the output of a compile, or the tar cannot be written.
    """
    chosen = choose_target(output, target)
    with tempfile.TemporaryDirectory() as folder:
        name = Report.load(output).model
        make_bundle(
            Path(folder), name, chosen, sources_of(output, chosen), [REPORTED], threads=threads, program=program
        )
        pack(Path(folder), archive)
    return str(chosen)


def _run(
    device: SshDevice,
    output: Path,
    target: str | None,
    threads: int | None,
    folder: Path,
    reporter: Reporter,
    agree: Agree | None,
) -> tuple[Stage, Result, Latency]:
    locks = agree is not None and agree(*lock_commands(device.info))
    with locked_clocks(device.connection, device.info, locks):
        if output.is_file():
            return _run_archive(device, output, folder, reporter)
        return _run_output(device, output, target, threads, folder, reporter)


def _run_archive(device: SshDevice, archive: Path, folder: Path, reporter: Reporter) -> tuple[Stage, Result, Latency]:
    """Run the bundle in a file, which says all that there is to say."""
    unpack(archive, folder)
    manifest = read_bundle(folder)
    timed = [name for run in manifest.runs[:1] for name in run.models]
    if timed != list(REPORTED.models):
        raise DeviceError(f"`{archive}` times {' and '.join(timed) or 'nothing'}, not dense and compiled")
    stage = Stage(folder, manifest)
    result = device.prove(stage, [], parse_target(manifest.target), {}, reporter)
    shapes = [torch.empty(x.shape, device="meta") for x in manifest.models[0].inputs]
    return stage, result, device.latency_of(result, manifest.target, shapes, manifest.threads or device.cores)


def _run_output(
    device: SshDevice, output: Path, target: str | None, threads: int | None, folder: Path, reporter: Reporter
) -> tuple[Stage, Result, Latency]:
    """Make the bundle of what a compile wrote, and run it."""
    report = Report.load(output)
    chosen = choose_target(output, target, device.info.architecture, device.why_not_run)
    count = threads or device.cores
    sources = sources_of(output, chosen)
    manifest = device.make_bundle(folder, report.model, chosen, sources, [reported()], threads=count)
    choice = next((t.forms for t in report.targets if t.target == str(chosen)), None)
    forms = {weight: str(form) for weight, form in choice.forms.items()} if choice else {}
    stage = Stage(folder, manifest)
    result = device.prove(stage, sources, chosen, forms, reporter)
    return stage, result, device.latency_of(result, str(chosen), sources[0].inputs, count)
