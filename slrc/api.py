"""The Python API: the stages of a compile, and `compile`, which is those in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, set_seed

from slrc import pipeline
from slrc.backends import LoweredProgram, Target, get_backend, parse_target
from slrc.compilation import Compilation, Emitted
from slrc.config import CompileConfig, make_config
from slrc.errors import BackendError, ConfigError, DeviceError, OutputError
from slrc.ir.program import Program
from slrc.ir.program import capture as capture_module
from slrc.load_workload import load_workload
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.devices import Device, local_device
from slrc.methods.settings import MethodName
from slrc.passes.allocation.check_plan import checked_plan
from slrc.pipeline import Checker as ProgramChecker
from slrc.planning import plan_from
from slrc.probes import make_probes
from slrc.progress import Quiet, Reporter
from slrc.reconstruction.reconstruct import reconstruct
from slrc.reporting.assemble import accuracy_of, assemble
from slrc.reporting.report import Int8Result, Pair, Report, TargetResult
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import AnyPattern
from slrc.sparsity.plans import Plan
from slrc.training import loop as training
from slrc.training.choose_method import choose_method
from slrc.training.run import ON_CPU
from slrc.training.trained import WEIGHTS, Trained, pruned_further, read_weights
from slrc.workload import Workload
from slrc.workspace import Workspace


def capture(workload: Workload) -> Program:
    """Trace the workload's model to a program, in evaluation mode; the model itself is not changed."""
    return capture_module(workload.model, workload.example_inputs, workload.name, workload.where)


def plan(
    program: Program,
    pattern: str | AnyPattern = "channel",
    sparsity: float | None = None,
    *,
    cache: str | Path | None = None,
    reporter: Reporter | None = None,
    workload: Workload | None = None,
    **options: Any,
) -> Plan:
    """Return what to constrain in a program and how much of it to keep. See `allocate_sparsity`.

    `options` are those of `CompileConfig` that make a plan, such as `skip=("head",)` or `permute=True`. With `speedup`
    or `latency_budget` the parts of the program are timed on the first `target`, with `threads` threads, and how much
    of each layer is kept is chosen to meet it. What was timed once is kept in `cache`. With a `workload` that has data,
    what pruning a layer costs is measured on it.
    """
    made = make_config({"pattern": pattern, "sparsity": sparsity, **options})
    return plan_from(program, made, workload, cache=Path(cache) if cache else None, reporter=reporter)


def train(workload: Workload, plan: Plan, *, checkpoints: str | Path | None = None, **options: Any) -> Trained:
    """Train the workload's model in place under the plan and prune it hard.

    `options` are those of `CompileConfig`, such as `method="slr"`, `epochs=5`, `retrain_epochs=0`. With
    `method="reconstruct"` the layers are refitted on `Workload.calibration`, and trained in `retrain_epochs` alone.
    """
    config, folder = make_config(options), Path(checkpoints) if checkpoints else None
    if choose_method(config, workload, plan) is MethodName.RECONSTRUCT:
        return reconstruct(capture(workload), workload, plan, config, checkpoints=folder)
    return training.train(workload, plan, config, checkpoints=folder)


def structure(program: Program, plan: Plan, trained: Trained | Masks, check: ProgramChecker | None = None) -> Program:
    """Turn masks into structure that is the same for every target: removed channels. Other zeros stay in weights.

    `check` is called with every transform's name and result, such as `Checker(model, probes).program`.
    """
    if isinstance(trained, Masks):
        return pipeline.structure(program, plan, trained, check)
    return pipeline.structure(program.with_tensors(trained.tensors), plan, trained.masks, check)


def form(
    program: Program, target: str = "ort", *, threads: int | None = None, check: ProgramChecker | None = None
) -> Program:
    """Give every layer of a structured program the form that is the fastest on a target. See `choose_forms`.

    Raises:
        BackendError: the target is an int8 one: what layers become depends on how the program is rounded.
    """
    parsed = parse_target(target)
    if parsed.is_integer:
        raise BackendError(f"target `{parsed}`: forms for int8 are given by `slrc.compile` alone, where it rounds")
    return pipeline.apply_forms(program, choose_forms(program, parsed, threads=threads).forms, check)


def lower(program: Program, target: str, out: str | Path) -> LoweredProgram:
    """Emit a program for a target, such as `ort` or `tensorrt-rtx:sm86`, into the folder `out`.

    Raises:
        BackendError: the target is unknown or cannot take the program.
        OutputError: the folder cannot be written.
    """
    return pipeline.lower(program, parse_target(target), Path(out))


def compile(
    model: str | Workload,
    out: str | Path = "build",
    *,
    config: CompileConfig | None = None,
    config_file: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Report:
    """Capture, plan, train, structure, lower, prove and measure; the result appears in `out` whole or not at all.

    Args:
        model: a workload, or what the command line takes for MODEL.
        out: the output folder.
        config: the options; or give them one by one, as in `compile("model.py", sparsity=0.75)`.
        config_file: a TOML file with options; those given here win.
        resume: go on with an interrupted run of the same options.
        overwrite: start anew though an interrupted run is in the way.
        reporter: where progress goes.
        options: fields of `CompileConfig`.
    """
    if config is not None and (options or config_file):
        raise ConfigError("give either `config`, or options and `config_file`, not both")
    config = config or make_config(options, Path(config_file) if config_file else None)
    with _device(config) as device:
        return _compile(model, out, config, device, resume=resume, overwrite=overwrite, reporter=reporter)


def _compile(
    model: str | Workload,
    out: str | Path,
    config: CompileConfig,
    device: Device,
    *,
    resume: bool,
    overwrite: bool,
    reporter: Reporter | None,
) -> Report:
    targets = [_emittable(device.resolve(parse_target(text))) for text in config.target]
    if config.device is not None:
        _require_one_runs(device, targets)
    loaded_plan = Plan.load(config.plan) if config.plan else None
    spec = model if isinstance(model, str) else model.name
    identity = {
        "model": spec,
        **config.model_dump(mode="json"),
        "plan": _identify(config.plan, loaded_plan),
        "start_from": _identify_start(config.start_from),
    }
    processes = PartialState(cpu=ON_CPU)
    if config.qat_epochs and processes.num_processes > 1:
        raise ConfigError(
            f"quantisation-aware training runs in one process, got {processes.num_processes}",
            hint="compile in one process, or leave `--qat-epochs` out",
        )
    restarted = _was_restarted(processes)
    if _may_meet_the_ended():
        (reporter or Quiet()).note(
            "note: restarted processes may wait for those that have ended: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    with processes.main_process_first():
        leads = processes.is_main_process
        workspace = Workspace(Path(out), identity, resume=resume, overwrite=overwrite, restarted=restarted, leads=leads)
    try:
        set_seed(config.seed)
        with processes.main_process_first():  # the first one fills caches
            workload = load_workload(model) if isinstance(model, str) else model
            run = Compilation(workload, config, targets, workspace, reporter or Quiet(), device)
            run.restore_dense()
            run.integers.require_data()
            if config.start_from is not None:  # better said now than after planning
                choose_method(config, workload, loaded_plan)
                read_weights(config.start_from, workload.model)
        program = capture(workload)
        with processes.main_process_first():  # a resumed run goes by the plan that it began with
            chosen = workspace.keep_plan(
                lambda: (
                    checked_plan(program, loaded_plan)
                    if loaded_plan
                    else plan_from(program, config, workload, reporter=reporter, device=device)
                )
            )
        if config.start_from is not None:
            start = read_weights(config.start_from, workload.model)
            if further := pruned_further(config.start_from, start, chosen):
                run.note(further)
        dense = pipeline.baseline(program)
        probes = make_probes(program) if leads else []
        dense_lowered = run.lower_dense(program, dense, probes) if leads else []
        trained = run.train(program, chosen)
        if not leads:
            processes.wait_for_everyone()
            return Report.load(Path(out))
        chosen = trained.plan
        check, metric = run.evaluate_masked(program, trained, probes)
        slim = structure(program, chosen, trained, check.program)
        emitted = run.lower(dense_lowered, slim, check)
        proven = [x for pair in emitted if (x := run.prove(slim, pair, metric, check)) is not None]
        final = proven[-1] if proven else _value(workload.measure(slim.module()))
        latency = [
            run.measure(slim, pair, chosen.latency, check) for pair in emitted if not run.why_not_run(pair.target)
        ]
        rounded = [run.int8_result(pair, metric, trained.dense, check) for pair in emitted]
        if (in_int8 := _rounded_metric(rounded)) is not None:
            final = in_int8
        report = assemble(
            model=workload.name,
            config=config.model_dump(mode="json"),
            dense=dense,
            slim=slim,
            plan=chosen,
            trained=trained,
            macs=emitted[0].program.macs,
            accuracy=accuracy_of(metric, trained, final),
            targets=[_result(pair, run, own) for pair, own in zip(emitted, rounded, strict=True)],
            latency=latency,
            checks=run.checks(check),
            notes=run.notes,
        )
        report = run.publish(report, chosen, trained, slim)
        processes.wait_for_everyone()
    finally:
        workspace.close()
    return report


def _may_meet_the_ended() -> bool:
    """Tell whether torchrun's restarts meet in the store of the run before, which has the old addresses in it."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _was_restarted(processes: PartialState) -> bool:
    """Tell whether torchrun has started these processes anew, after one of them ended. Each machine counts its own."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return count > 0 if processes.num_processes == 1 else any(gather_object([count > 0]))


def _value(metric: tuple[str, float] | None) -> float | None:
    return None if metric is None else metric[1]


def _rounded_metric(rounded: Sequence[Int8Result | None]) -> float | None:
    """Return the compiled int8 model's metric, where the last target is one."""
    return rounded[-1].corners[-1].metric if rounded and rounded[-1] is not None else None


def _result(pair: Emitted, run: Compilation, int8: Int8Result | None) -> TargetResult:
    dense, compiled = pair.own
    built = run.engines.get(pair.target, (None, None))
    dense_engine, compiled_engine = built[0] or dense.artifact.engine, built[1] or compiled.artifact.engine
    return TargetResult(
        target=str(pair.target),
        folder=pair.target.folder,
        size_bytes=Pair(dense=dense.size_bytes, compiled=compiled.size_bytes),
        precision=compiled.artifact.precision,
        not_run=run.why_not_run(pair.target),
        engine=Pair(dense=dense_engine, compiled=compiled_engine) if dense_engine and compiled_engine else None,
        forms=pair.choice,
        int8=int8,
    )


@contextmanager
def _device(config: CompileConfig) -> Iterator[Device]:
    """Open the device that a compile measures on: this machine, or one that is asked for."""
    if config.device is None:
        yield local_device()
        return
    from slrc.device.ssh_device import SshDevice

    with SshDevice(config.device) as device:
        yield device


def _require_one_runs(device: Device, targets: Sequence[Target]) -> None:
    """Make sure that a device that was asked for runs something: better said now than after training."""
    reasons = [device.why_not_run(target) for target in targets]
    if all(reasons):
        raise DeviceError(
            f"device `{device.name}`: target `{targets[0]}` cannot run there: {reasons[0]}",
            hint=f"`slrc targets --device {device.name}` shows what is there",
        )


def _emittable(target: Target) -> Target:
    """Return a target that can be emitted here: better said now than after training."""
    if reason := get_backend(target).available(target).why_not_emit:
        raise BackendError(f"target `{target}` cannot be built here: {reason}", hint="see `slrc targets`")
    return target


def _identify(path: Path | None, plan: Plan | None) -> str | None:
    """Name a given plan by its file and content, so that a resumed run notices an edit."""
    return f"{path} ({sha256(plan.model_dump_json().encode()).hexdigest()[:12]})" if plan else None


def _identify_start(folder: Path | None) -> str | None:
    """Name the weights that training starts from by their folder's name and content: where it lies may change."""
    if folder is None:
        return None
    path = folder / WEIGHTS
    if not path.is_file():
        raise OutputError(
            f"`{folder}` has no {WEIGHTS} to start from", hint="give the folder that `slrc compile --out` wrote"
        )
    with path.open("rb") as file:
        return f"{folder.resolve().name} ({file_digest(file, 'sha256').hexdigest()[:12]})"
