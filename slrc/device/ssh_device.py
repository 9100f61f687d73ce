"""A device that is reached over ssh: it runs bundles, and so times programs as this machine does."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slrc import __version__
from slrc.backends import LoweredProgram, Target
from slrc.backends.ort.backend import family_of_target
from slrc.backends.tensorrt.options import parse_options
from slrc.device.blame import blame
from slrc.device.build_bundle import REPORTED, Source, make_bundle
from slrc.device.bundle import PROGRAM, RUNNER, Manifest, Run
from slrc.device.failures import LinkLostError, job_failure
from slrc.device.probe import DeviceInfo, probe
from slrc.device.remote import Remote, Stage, device_folder
from slrc.device.results import ComparedOutput, Result, TimedRun
from slrc.device.ssh import Connection
from slrc.errors import DeviceError
from slrc.kernels.build import TILE_SETS
from slrc.measuring import timing
from slrc.measuring.devices import Candidate, Device, Measured, Timing
from slrc.measuring.timing import Budget, Latency, latency_of, percentiles
from slrc.progress import Quiet, Reporter
from slrc.verify import Check

ENGINES = "env SLRC_ENGINES=../../engines"
"""Where the runner keeps engines, as seen from a job's folder: other jobs find them there."""
DIFFERING = 1
"""The runner's status where outputs differ, or a model cannot run."""


class SshDevice(Device):
    """A device, connected and asked what it is. To be closed, as by `with`.

    Args:
        host: what `ssh` is to be given.

    Raises:
        DeviceError: it cannot be reached.
    """

    def __init__(self, host: str) -> None:
        folder = device_folder()
        self.connection = Connection(host)
        try:
            self.info = probe(self.connection, folder)
        except BaseException:
            self.connection.close()
            raise
        self.name = host
        self.remote = Remote(self.connection, folder)

    def __enter__(self) -> SshDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    @property
    def cores(self) -> int:
        """All cores that the system there offers."""
        return self.info.cores

    def conditions(self) -> Mapping[str, Any]:
        """Return the device's name, its processor, and what changes its speed."""
        info = self.info
        said = info.model_dump(include={"architecture", "kernel", "governor", "power_mode", "gpu", "onnxruntime"})
        return {"device": self.name, "cpu": info.name, **said, "tensorrt": info.tensorrt, "slrc": __version__}

    def why_not_run(self, target: Target) -> str:
        """A target needs the processor that it is for, and its runtime."""
        if target.backend == "tensorrt":
            return self._why_no_tensorrt(parse_options(target, names_gpus=False).oldest)
        if target.backend != "ort":
            return f"`{target.backend}` is not run over ssh"
        if (family := family_of_target(target)) != self.info.architecture:
            return f"it is for {family}, and `{self.name}` is {self.info.architecture}"
        return "" if self.info.without_python else self.info.why_no_onnxruntime

    def make_bundle(self, folder: Path, model: str, target: Target, *others: Any, **options: Any) -> Manifest:
        """Fill an empty folder with a bundle, and, where there is no Python, with the runner that needs none."""
        program = target.backend == "ort" and self.info.without_python
        return make_bundle(folder, model, target, *others, program=program, **options)

    def resolve(self, target: Target) -> Target:
        """Return the target for the processor or the TensorRT there, where the one given names none."""
        if target.backend == "tensorrt" and self.info.tensorrt and not parse_options(target, names_gpus=False).version:
            return Target("tensorrt", (".".join(self.info.tensorrt.split(".")[:2]), *target.options))
        family = self.info.architecture
        if target.backend != "ort" or family_of_target(target) == family or {*target.options} & TILE_SETS.keys():
            return target
        return Target("ort", (family, *target.options)) if family in TILE_SETS else target

    def times(self, target: Target, candidates: Sequence[Candidate], threads: int, budget: Budget) -> Sequence[Timing]:
        """Send all in one bundle and time them there, in one process."""
        if not candidates:
            return []
        sources = [Source(f"m{i}", c.folder, c.inputs) for i, c in enumerate(candidates)]
        run = Run(
            models=tuple(s.name for s in sources),
            seconds=budget.seconds * timing.PATIENCE,
            least_rounds=budget.least_rounds,
            race=budget.race,
        )
        with tempfile.TemporaryDirectory() as folder:
            manifest = self.make_bundle(Path(folder), "parts", target, sources, [run], threads=threads, expected=False)
            stage = Stage(Path(folder), manifest)
            result = self.run(stage)
            self.remote.forget(stage.passing())
        return [result.timing(0, source.name) for source in sources]

    def latency(
        self,
        dense: LoweredProgram,
        compiled: LoweredProgram,
        inputs: Sequence[Tensor],
        threads: int | None,
        forms: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
        others: Mapping[str, LoweredProgram] | None = None,
    ) -> Measured:
        """Send all in a bundle, prove them equal there, and time them."""
        count, target = threads or self.cores, compiled.target
        sent = {"dense": dense, "compiled": compiled, **(others or {})}
        sources = [Source(name, lowered.folder, inputs) for name, lowered in sent.items()]
        run = reported().model_copy(update={"models": tuple(sent)})
        with tempfile.TemporaryDirectory() as folder:
            manifest = self.make_bundle(Path(folder), "pair", target, sources, [run], threads=count)
            stage = Stage(Path(folder), manifest)
            result = self.prove(stage, sources, target, forms or {}, reporter)
            self.remote.forget(stage.passing())
        compared = [_check(f"{target}, {output.model}: here = on {self.name}", output) for output in result.outputs]
        engines = result.engine("dense"), result.engine("compiled")
        beside = {name: percentiles(result.runs[0].ms(name)) for name in others or {}}
        return Measured(self.latency_of(result, str(target), inputs, count), tuple(compared), engines, beside)

    def prove(
        self,
        stage: Stage,
        sources: Sequence[Source],
        target: Target,
        forms: Mapping[str, str],
        reporter: Reporter | None = None,
    ) -> Result:
        """Run a bundle there, and make sure that every model returns what it must.

        Args:
            stage: the bundle.
            sources: its models; without one, no layer of it is named.
            target: what they are for.
            forms: of layers of the compiled model that are not dense, by the name of their weight.
            reporter: where progress goes.

        Raises:
            DeviceError: it cannot run there, or a model returns something else; its layer and form are named.
        """
        result = self.run(stage, reporter)
        by_name = {source.name: source for source in sources}

        def blamed(model: str) -> str:
            if (source := by_name.get(model)) is None:
                return ""
            return blame(self, source.folder, target, source.inputs, forms if model == "compiled" else {})

        try:
            require_equal(self.name, result, blamed)
        except DeviceError:
            self.remote.forget(stage.paths)
            raise
        return result

    def latency_of(self, result: Result, target: str, inputs: Sequence[Tensor], threads: int) -> Latency:
        """Return what a runner's first run says of dense and compiled."""
        run = result.runs[0]
        blocks = [(block.ms["dense"], block.ms["compiled"]) for block in run.kept]
        said, states = caveats(self.info, result, run), {"before": result.before, "after": result.after}
        return latency_of(target, blocks, inputs, threads, device=self.name, caveats=said, states=states)

    def check(self, manifest: Manifest) -> None:
        """Make sure that a bundle can run there, before anything of it is sent.

        Raises:
            DeviceError: it is for another processor, or the system or runtime there is too old.
        """
        needs, info = manifest.requires, self.info
        if needs.tensorrt:
            if why_not := self._why_no_tensorrt(_numbers(needs.tensorrt)):
                hint = f"compile with `--device {self.name}`, which asks for its version first"
                raise DeviceError(f"device `{self.name}`: {why_not}", hint=hint)
            return
        if needs.architecture not in ("", info.architecture):
            what = f"the bundle is for {needs.architecture}, and the device is {info.architecture}"
            hint = f"compile with `--target ort:{info.architecture}`"
        elif info.without_python and PROGRAM not in manifest.files:
            what = "there is no Python with ONNX Runtime, and the bundle has no runner without"
            hint = "make it with `slrc bundle --without-python`"
        elif info.why_no_onnxruntime and not info.without_python:
            what = f"there is no ONNX Runtime: {info.why_no_onnxruntime}"
            hint = (
                f"install it there: `ssh {self.name} 'python3 -m venv {self.remote.folder}/venv && "
                f"{self.remote.folder}/venv/bin/pip install onnxruntime'`, or, without Python, put its "
                f"libonnxruntime.so into {self.remote.folder}"
            )
        elif info.glibc and needs.glibc and _numbers(info.glibc) < _numbers(needs.glibc):
            what = f"its glibc is {info.glibc}, and the kernels need {needs.glibc}"
            hint = "use a newer system there, or compile with `--target ort:stock`"
        elif info.onnxruntime and _numbers(info.onnxruntime) < _numbers(needs.onnxruntime):
            what = f"its onnxruntime is {info.onnxruntime}, and opset {needs.opset} needs {needs.onnxruntime}"
            hint = "install a newer onnxruntime there"
        else:
            return
        raise DeviceError(f"device `{self.name}`: {what}", hint=hint)

    def _why_no_tensorrt(self, oldest: tuple[int, ...]) -> str:
        """Return why models for the parser of a version of TensorRT do not run there; empty if they do."""
        if not self.info.trtexec:
            return "there is no trtexec: TensorRT is not installed"
        if _numbers(self.info.tensorrt) < oldest:
            there, needed = self.info.tensorrt, ".".join(map(str, oldest))
            return f"its TensorRT is {there}, and the models are for {needed}"
        return "" if self.info.python else "there is no python3"

    def run(self, stage: Stage, reporter: Reporter | None = None) -> Result:
        """Run a bundle there and return what it found; one that was started before the link was lost is found again.

        Where anything but the link fails, nothing of it stays there.

        Raises:
            DeviceError: it cannot run there.
            LinkLostError: the link was lost; a second call goes on.
        """
        self.check(stage.manifest)
        reporter, remote = reporter or Quiet(), self.remote
        try:
            state = remote.state(stage)
            if state not in ("running", "ended"):
                sent = remote.send(stage, self.info.free_bytes or None)
                reporter.note(f"{self.name}: {sent} of {len(stage.paths)} files sent")
                remote.place(stage, f"jobs/{stage.id}")
                remote.start(stage, self._command(stage.manifest))
            else:
                reporter.note(f"{self.name}: a job of an earlier run is {state}")
                stage.sent = tuple(stage.paths)
            code = remote.wait(stage)
            with tempfile.TemporaryDirectory() as folder:
                said = remote.collect(stage, Path(folder))
                return self._read(Path(folder), code, said)
        except LinkLostError:
            raise
        except DeviceError:
            remote.drop_job(stage)
            remote.forget(stage.paths)
            raise

    def _command(self, manifest: Manifest) -> str:
        """Return what runs a bundle in its folder there."""
        if manifest.target.startswith("ort") and self.info.without_python:
            return f"chmod +x {PROGRAM} && ./{PROGRAM} {shlex.quote(self.info.libonnxruntime)}"
        return f"{ENGINES} {shlex.quote(self.info.python)} {RUNNER}"

    def _read(self, folder: Path, code: int, said: str) -> Result:
        if code not in (0, DIFFERING, 2, 3):
            raise job_failure(self.name, "running", code, said)
        result = Result.read(folder)
        if failure := result.failure:
            raise DeviceError(f"device `{self.name}`: {failure.what}", hint=failure.hint or None)
        return result


def require_equal(host: str, result: Result, blame: Callable[[str], str] = lambda model: "") -> None:
    """Make sure that every model ran, and that what it returned is what it must.

    Args:
        host: the device's name.
        result: what its runner found.
        blame: finds the layer by which a model differs.

    Raises:
        DeviceError: one did not run, or returned something else.
    """
    for model, reason in result.why_not.items():
        raise DeviceError(f"device `{host}`: the {model} model cannot run there: {reason}")
    for output in result.outputs:
        if not output.passed:
            layer = blame(output.model)
            raise DeviceError(
                f"device `{host}`: output `{output.output}` of the {output.model} model differs there by "
                f"{output.error:.1e} of the largest value, tolerance {output.tolerance:.0e}"
                + (f"; the first to differ is {layer}" if layer else ""),
                hint="this is a bug in slrc or in the runtime there: please report it with the model",
            )


def _check(step: str, output: ComparedOutput) -> Check:
    return Check(
        step=step,
        inputs=("example",),
        max_abs_error=output.largest,
        max_rel_error=output.error,
        tolerance=output.tolerance,
        passed=output.passed,
    )


def reported() -> Run:
    """Return the run of a report, as long as measurements take now."""
    return REPORTED.model_copy(update={"seconds": REPORTED.seconds * timing.PATIENCE})


def caveats(info: DeviceInfo, result: Result, run: TimedRun) -> tuple[str, ...]:
    """Return what makes the figures of a run less than they seem."""
    found = []
    if info.emulated:
        found.append("emulated: the times say nothing of a real device")
    rejected = sum(1 for block in run.blocks if block.drift)
    if rejected:
        kept = "" if len(run.kept) < len(run.blocks) else "; too few were left, so all were counted"
        found.append(f"{rejected} of {len(run.blocks)} blocks rejected: {run.rejected[0]}{kept}")
    governor, throttled = result.before.get("governor"), str(result.after.get("throttled", ""))
    if governor and governor != "performance":
        found.append(f"clocks are not locked: governor {governor}")
    if not any("mhz" in block.before for block in run.blocks):
        found.append("the system does not tell the clock")
    if throttled.partition("=")[2] not in ("", "0x0"):
        found.append(f"it was throttled ({throttled})")
    return tuple(found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
