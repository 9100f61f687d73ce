"""The command line. Results go to stdout, progress and errors to stderr; a user's mistake exits with 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slrc.errors import OutputError, SlrcError

if TYPE_CHECKING:
    from rich.console import Console

    from slrc.progress import Reporter

app = typer.Typer(
    name="slrc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A compiler for sparse neural networks: it trains, prunes, emits, proves and measures.",
    epilog="MODEL is a file with a function workload(), package.module:function, torchvision:NAME or timm:NAME.",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="file.py, package.module:function, torchvision:NAME or timm:NAME")
]
PatternOption = Annotated[
    str | None,
    typer.Option(help="unstructured, block:RxC, columns:R, channel or N:M (default: channel)"),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(help="share of the constrained weights to prune, in [0, 1) (default: 0.5)"),
]
AllocateOption = Annotated[
    str | None,
    typer.Option(help="uniform per layer, global by magnitude, or latency by what widths cost (default: uniform)"),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        help="for --allocate latency: the share of the dense latency to meet on the first target, such as 0.5"
    ),
]
SkipOption = Annotated[list[str] | None, typer.Option(metavar="NAME", help="layers to leave alone; globs; repeatable")]
ThreadsOption = Annotated[int | None, typer.Option(help="threads of the runtime (default: all cores)")]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        help="ort, ort:aarch64, ort:stock, tensorrt-rtx:sm86 or tensorrt, see `targets`; repeatable (default: ort)"
    ),
]
ConfigOption = Annotated[Path | None, typer.Option(help="a TOML file with the same options; the command line wins")]
PlanOption = Annotated[Path | None, typer.Option(help="a plan to use instead of --pattern and --sparsity")]
KeepEndsOption = Annotated[
    bool | None,
    typer.Option("--keep-ends/--prune-ends", help="leave the first layer and the classifier alone (default: keep)"),
]
INTERRUPTED = 130
RoundToOption = Annotated[
    int | None, typer.Option(help="channel: round kept widths up to a multiple of this (default: 8)")
]
AttentionOption = Annotated[
    str | None, typer.Option(help="channel: prune whole heads, or the width of every head (default: heads)")
]
LayerNormOption = Annotated[
    str | None,
    typer.Option(help="channel: keep what layer and RMS norms normalise over, or narrow it exactly (default: keep)"),
]
PermuteOption = Annotated[
    bool | None,
    typer.Option(
        "--permute/--no-permute",
        help="block:Rx1: reorder channels so that alike outputs share blocks; the network computes the same "
        "(default: no-permute)",
    ),
]
DEBUG_HELP = "show the whole trace of an error"


@app.command("compile")
def compile_command(
    model: ModelArgument,
    pattern: PatternOption = None,
    sparsity: SparsityOption = None,
    allocate: AllocateOption = None,
    latency_budget: BudgetOption = None,
    method: Annotated[
        str | None,
        typer.Option(help="slr, admm, gradual, ac-dc, group-lasso or magnitude (default: slr, without data magnitude)"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="epochs of sparse training (default: 10)")] = None,
    retrain_epochs: Annotated[
        int | None, typer.Option(help="epochs of masked retraining afterwards (default: 0)")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="training in fp32, bf16 or fp16 (default: fp32)")] = None,
    target: TargetOption = None,
    skip: SkipOption = None,
    keep_ends: KeepEndsOption = None,
    round_to: RoundToOption = None,
    attention: AttentionOption = None,
    layer_norm: LayerNormOption = None,
    permute: PermuteOption = None,
    plan: PlanOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    seed: Annotated[int | None, typer.Option(help="of every random choice (default: 0)")] = None,
    out: Annotated[Path, typer.Option(help="the output folder")] = Path("build"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="throw an interrupted run away")] = False,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False,
) -> None:
    """Train MODEL under a sparsity pattern, prune it, emit it, prove it equal and measure it.

    The output folder holds the report (html and json), the plan, the masks, the slim PyTorch program and the targets.
    """
    from slrc import api
    from slrc.config import make_config
    from slrc.reporting.tables import report_table

    given = {
        "pattern": pattern,
        "sparsity": sparsity,
        "allocate": allocate,
        "latency_budget": latency_budget,
        "method": method,
        "epochs": epochs,
        "retrain_epochs": retrain_epochs,
        "precision": precision,
        "target": tuple(target) if target else None,
        "skip": tuple(skip) if skip else None,
        "keep_ends": keep_ends,
        "round_to": round_to,
        "attention": attention,
        "layer_norm": layer_norm,
        "permute": permute,
        "plan": plan,
        "threads": threads,
        "seed": seed,
    }
    made = make_config({k: v for k, v in given.items() if v is not None}, config)
    report = api.compile(model, out, config=made, resume=resume, overwrite=overwrite, reporter=_reporter())
    if _is_main_process():
        _console().print(report_table(report))
        _console().print(f"report: {out / 'report.html'}", soft_wrap=True)


@app.command()
def inspect(
    model: ModelArgument,
    pattern: PatternOption = None,
    sparsity: SparsityOption = None,
    allocate: AllocateOption = None,
    latency_budget: BudgetOption = None,
    skip: SkipOption = None,
    keep_ends: KeepEndsOption = None,
    round_to: RoundToOption = None,
    attention: AttentionOption = None,
    layer_norm: LayerNormOption = None,
    permute: PermuteOption = None,
    target: TargetOption = None,
    threads: ThreadsOption = None,
    plan_out: Annotated[Path | None, typer.Option(help="write the plan here, to edit and give to --plan")] = None,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False,
) -> None:
    """Show what is prunable and what is pinned, and why: layers, groups, parameters, multiply-accumulates."""
    from slrc import api
    from slrc.config import make_config
    from slrc.passes.analysis.label_indices import label_indices
    from slrc.reporting.tables import inspect_tables
    from slrc.workload import load_workload

    given = {
        "pattern": pattern,
        "sparsity": sparsity,
        "allocate": allocate,
        "latency_budget": latency_budget,
        "keep_ends": keep_ends,
        "round_to": round_to,
        "attention": attention,
        "layer_norm": layer_norm,
        "permute": permute,
        "target": tuple(target) if target else None,
        "threads": threads,
    }
    config = make_config({**{k: v for k, v in given.items() if v is not None}, "skip": tuple(skip or ())})
    workload = load_workload(model)
    program = api.capture(workload)
    plan = api.plan_from(program, config, reporter=_reporter())
    for table in inspect_tables(program, plan, label_indices(program, plan.attention, plan.layer_norm)):
        _console().print(table)
    if plan_out is not None:
        try:
            plan.save(plan_out)
        except OSError as error:
            raise OutputError(f"cannot write `{plan_out}`: {error.strerror}") from None
        _console(stderr=True).print(f"plan: {plan_out}", soft_wrap=True)


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what `slrc compile --out` wrote")],
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False,
) -> None:
    """Measure a compiled model again: compiled against dense, in turns, in one process."""
    from slrc.reporting.bench import bench_output
    from slrc.reporting.tables import latency_table

    result = bench_output(folder, threads, _reporter())
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        _console().print(latency_table(result))


@app.command()
def targets(debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False) -> None:
    """Show which backends can emit and run here, and why the others cannot."""
    from slrc.reporting.tables import targets_table

    _console().print(targets_table())


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the file to write, such as model.py")],
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False,
) -> None:
    """Write a small, runnable workload to start from."""
    if file.exists():
        raise OutputError(f"`{file}` exists: it will not be replaced", hint="choose another name")
    template = Path(__file__).parent / "templates" / "workload.py.txt"
    try:
        file.write_text(template.read_text())
    except OSError as error:
        raise OutputError(f"cannot write `{file}`: {error.strerror}") from None
    _console().print(f"wrote {file}; next: slrc compile {file}", soft_wrap=True)


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
    """Run the command line: known errors print as one message with a hint, unknown ones ask for a report."""
    debug = "--debug" in sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SlrcError as error:
        _fail(error.message, error.hint, 2, debug)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:  # what typer makes of Ctrl-C
            raise
        hint = "`slrc compile --resume` goes on after the last whole epoch, if there was one"
        _fail("interrupted", hint, INTERRUPTED, debug)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        _fail(
            f"internal error: {type(error).__name__}: {first}",
            "this is a bug in slrc: please report it with the output of `--debug`",
            1,
            debug,
        )


def _fail(message: str, hint: str | None, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else ""))
    sys.exit(code)


def _reporter() -> Reporter:
    """Progress bars, from one process of a distributed run."""
    from slrc.progress import Bars, Quiet

    return Bars(_console(stderr=True)) if _is_main_process() else Quiet()


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    # No markup: names and paths may hold brackets.
    return Console(stderr=stderr, markup=False, highlight=False)
