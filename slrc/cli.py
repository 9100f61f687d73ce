"""The command line. Results go to stdout, progress and errors to stderr; a user's mistake exits with 2."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from slrc.cli_errors import told_errors
from slrc.cli_options import (
    DEVICE,
    DebugOption,
    DeviceOption,
    Given,
    JsonOption,
    LockOption,
    ModelArgument,
    TargetOption,
    takes,
)
from slrc.cli_output import console, is_main_process, reporter
from slrc.config import make_config
from slrc.errors import ConfigError, OutputError
from slrc.machine.memory import keep_freed_memory
from slrc.methods.settings import MethodName
from slrc.options import options, planning_options

app = typer.Typer(
    name="slrc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it reads without colour, and needs no rich
    help="A compiler for sparse neural networks: it trains, prunes, emits, proves and measures.",
    epilog="MODEL is a file with a function workload(), package.module:function, torchvision:NAME or timm:NAME.",
)

NOT_OF_A_SWEEP = ("pattern", "sparsity", "allocate", "speedup", "latency_budget", "permute", "plan")


@app.command("compile")
@takes(*options())
def compile_command(
    model: ModelArgument,
    given: Given,
    config: Annotated[
        Path | None, typer.Option(help="a TOML file with the same options and more; the command line wins")
    ] = None,
    out: Annotated[Path, typer.Option(help="the output folder")] = Path("build"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="throw an interrupted run away")] = False,
    debug: DebugOption = False,
) -> None:
    """Train MODEL under a sparsity pattern, prune it, emit it, prove it equal and measure it.

    The output folder holds the report (html and json), the plan, the masks, the slim PyTorch program and the targets.

    Training takes as many threads as OMP_NUM_THREADS says, else all cores it may use; they sleep where they wait for
    each other, unless OMP_WAIT_POLICY says otherwise.
    """
    made = make_config(given, config)  # what is wrong with an option is said before torch is loaded
    from slrc import api
    from slrc.reporting.tables import report_table

    report = api.compile(model, out, config=made, resume=resume, overwrite=overwrite, reporter=reporter())
    if is_main_process():
        console().print(report_table(report))
        console().print(f"report: {out / 'report.html'}", soft_wrap=True)


@app.command("sweep")
@takes(*(name for name in options() if name not in NOT_OF_A_SWEEP))
def sweep_command(
    model: ModelArgument,
    given: Given,
    speedups: Annotated[str, typer.Option(help="how many times as fast as dense to become, one after another")] = "2,3",
    patterns: Annotated[str, typer.Option(help="what may survive; auto mixes patterns")] = "auto",
    config: Annotated[Path | None, typer.Option(help="a TOML file with options of a compile")] = None,
    out: Annotated[Path, typer.Option(help="the folder that all workers share")] = Path("sweep"),
    storage: Annotated[
        str | None, typer.Option(help="URL of a database for Optuna (default: a journal file in the folder)")
    ] = None,
    accept: Annotated[
        float, typer.Option(help="share of the dense metric that a recommended model may lose", min=0, max=1)
    ] = 0.01,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="try points again that failed")] = False,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="train each point from the next slower one of its pattern")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Compile MODEL at several speed-ups and patterns, and show accuracy against latency.

    The same command goes on with an interrupted sweep; given in several processes at once, they share the points. Each
    point is a compile of its own, in a folder of its own.
    """
    from slrc.sweep.points import parse_points

    points = parse_points(patterns, speedups)
    configs = [point.config(given, config) for point in points]  # wrong options are told before torch is loaded
    if warm_start:
        configs[0].check_can_start("--warm-start", MethodName.RECONSTRUCT)  # the default for a speed
    from slrc.sweep.page import sweep_notes, sweep_table
    from slrc.sweep.work import sweep

    found = sweep(
        model,
        out,
        points,
        options=given,
        config_file=config,
        storage=storage,
        accepted=accept,
        retry_failed=retry_failed,
        warm_start=warm_start,
        reporter=reporter(),
    )
    console().print(sweep_table(found))
    for text in (*sweep_notes(found), found.recommendation):
        console().print(text, soft_wrap=True)
    console().print(f"report: {out / 'report.html'}", soft_wrap=True)


@app.command()
@takes(*planning_options(), "target", "threads")
def inspect(
    model: ModelArgument,
    given: Given,
    plan_out: Annotated[Path | None, typer.Option(help="write the plan here, to edit and give to --plan")] = None,
    debug: DebugOption = False,
) -> None:
    """Show what is prunable and what is pinned, and why: layers, groups, parameters, multiply-accumulates.

    Nothing is timed unless --speedup or --latency-budget asks for it: without them --pattern channel is shown.
    """
    config = make_config(given)
    if config.leaves_all_open:
        config = make_config({"pattern": "channel", **given})
    from slrc import api
    from slrc.load_workload import load_workload
    from slrc.passes.analysis.label_indices import label_indices
    from slrc.planning import plan_from
    from slrc.reporting.tables import inspect_tables

    workload = load_workload(model)
    program = api.capture(workload)
    plan = plan_from(program, config, workload, reporter=reporter())
    for table in inspect_tables(program, plan, label_indices(program, plan.attention, plan.layer_norm)):
        console().print(table)
    if plan_out is not None:
        try:
            plan.save(plan_out)
        except OSError as error:
            raise OutputError(f"cannot write `{plan_out}`: {error.strerror}") from None
        console(stderr=True).print(f"plan: {plan_out}", soft_wrap=True)


@app.command()
@takes(
    *("target", "threads", "precision", "distill", "epochs", "steps", "retrain_epochs"),
    *("skip", "keep_ends", "round_to", "attention", "layer_norm"),
)
def doctor(
    model: ModelArgument,
    given: Given,
    seconds: Annotated[float, typer.Option(help="how long it may take, once Python has started", min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    debug: DebugOption = False,
) -> None:
    """Examine MODEL before anybody trains: whether a compile would work, what it could reach, how long it would take.

    Each check fails on its own. The exit code is 2 if one of them did. What there was no time for is marked. The first
    examination compiles the block-sparse kernels, which takes a minute more.
    """
    config = make_config(given)
    from slrc.doctor.examine import examine
    from slrc.reporting.doctor_tables import doctor_tables

    found = examine(model, config, seconds=seconds, reporter=reporter())
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        for table in doctor_tables(found):
            console().print(table)
    if not found.is_healthy:
        raise typer.Exit(2)


@app.command()
@takes("threads")
def bench(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what `slrc compile --out` wrote")],
    given: Given,
    host: DeviceOption = None,
    which: TargetOption = None,
    lock_clocks: LockOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a compiled model again: compiled against dense, in turns, in one process, here or on a device.

    It takes as many threads as the compile did unless `--threads` says otherwise; on a device all cores.
    """
    threads = make_config(given).threads
    if host is None and (which is not None or lock_clocks):
        option = "--lock-clocks" if which is None else "--target"
        raise ConfigError(f"`{option}` is for a device", hint="add `--device user@name`")
    if host is None:
        from slrc.reporting.bench import bench_output

        result = bench_output(folder, threads, reporter())
    else:
        from slrc.device.deploy import bench_on_device

        result = bench_on_device(folder, host, which, threads, reporter(), _agree if lock_clocks else None)
    from slrc.reporting.tables import latency_table

    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        console().print(latency_table(result))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="what `slrc compile --out` wrote")],
    html: Annotated[Path | None, typer.Option(help="write a page too")] = None,
    debug: DebugOption = False,
) -> None:
    """Set compiled models side by side: accuracy, latency, size, how much of each layer is pruned."""
    from slrc.reporting.compare import compare as read
    from slrc.reporting.compare import compare_tables, render_comparison

    found = read(folders)
    for table in compare_tables(found):
        console().print(table)
    for note in found.notes:
        console(stderr=True).print(f"note: {note}", soft_wrap=True)
    if html is not None:
        _write(html, render_comparison(found))


@app.command()
@takes("threads")
def deploy(
    host: Annotated[str, DEVICE],
    given: Given,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="what `slrc compile` wrote, or a file of `slrc bundle`"),
    ] = None,
    which: TargetOption = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="remove all that slrc brought to the device, and end its jobs there")
    ] = False,
    lock_clocks: LockOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a compiled model to a device, prove it equal there, measure it, and bring the numbers back.

    The device needs an ssh server and a Python with onnxruntime. What was sent once is not sent again, and a job that
    runs when the link is lost is found by the same command. The model stays in .slrc/models in the home folder there.
    """
    from slrc.device import deploy as devices

    if remove:
        size = devices.remove_from(host)
        console().print(f"{host}: " + ("there was nothing of slrc" if size is None else f"{size / 1e6:.1f} MB removed"))
        return
    if folder is None:
        raise ConfigError("`slrc deploy` needs the folder of a compiled model", hint="such as `slrc deploy build`")
    threads, agree = make_config(given).threads, _agree if lock_clocks else None
    result = devices.deploy_output(folder, host, which, threads, reporter(), agree)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        from slrc.device.tables import deployment_table

        console().print(deployment_table(result))


@app.command()
@takes("threads")
def bundle(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what `slrc compile --out` wrote")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write, such as model.tar")],
    given: Given,
    which: TargetOption = None,
    without_python: Annotated[
        bool, typer.Option("--without-python", help="add a runner for devices without Python, for ONNX Runtime")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Write a compiled model as one file for a device: models, kernels, inputs, expected outputs and a runner.

    There: `mkdir model && tar -xf model.tar -C model && python3 model/bench.py`, or, where there is no Python,
    `model/bench libonnxruntime.so model`.
    """
    threads = make_config(given).threads
    from slrc.device.deploy import bundle_file

    chosen = bundle_file(folder, out, which, threads, program=without_python)
    console().print(f"wrote {out} for {chosen}", soft_wrap=True)


@app.command()
def targets(host: DeviceOption = None, debug: DebugOption = False) -> None:
    """Show which backends can emit and run here, and why the others cannot; or what a device is and has."""
    if host is None:
        from slrc.reporting.tables import targets_table

        console().print(targets_table())
        return
    from slrc.device.ssh_device import SshDevice
    from slrc.device.tables import device_table

    with SshDevice(host) as found:
        console().print(device_table(found.info))


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the file to write, such as model.py")],
    debug: DebugOption = False,
) -> None:
    """Write a small, runnable workload to start from."""
    if file.exists():
        raise OutputError(f"`{file}` exists: it will not be replaced", hint="choose another name")
    template = Path(__file__).parent / "templates" / "workload.py.txt"
    try:
        file.write_text(template.read_text())
    except OSError as error:
        raise OutputError(f"cannot write `{file}`: {error.strerror}") from None
    console().print(f"wrote {file}; next: slrc compile {file}", soft_wrap=True)


def _agree(lock: str, restore: str) -> bool:
    return typer.confirm(f"On the device `{lock}` will be run, and afterwards `{restore}`. Go on?", err=True)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write `{file}`: {error.strerror}") from None
    console(stderr=True).print(f"page: {file}", soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        from slrc import __version__

        typer.echo(f"slrc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv[1:]
    if debug:
        os.environ["SLRC_DEBUG"] = "1"
    else:
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch 2.11, on its copies
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    with told_errors(debug):
        app()
