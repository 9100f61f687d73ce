"""A sweep's worker: every point from the same dense weights, each safe on its own, and the real thing, killed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
from sample_reports import Page, make_report

import slrc
from slrc import api
from slrc.errors import ConfigError, OutputError, PlanError
from slrc.measuring.timing import Percentiles
from slrc.progress import Quiet
from slrc.quantization.choose import Calibration
from slrc.reporting.report import Corner, Int8Result, Pair, Report
from slrc.sweep.page import render_sweep, sweep_notes, sweep_table
from slrc.sweep.points import SweepFolder, SweepPoint, identity_of, parse_points
from slrc.sweep.summary import Figures, State, Summary
from slrc.sweep.work import sweep

pytest.importorskip("optuna")
MakeWorkload = Callable[..., slrc.Workload]
POINTS = parse_points("channel,block:8x1", "2,4")


class Compiler:
    """In place of `api.compile`: notes what it is given, ruins the weights, and writes a report."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.starts: list[torch.Tensor] = []
        self.started_from: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        self.dense_int8: Figures | None = None
        self.slower: dict[str, float] = {}

    def __call__(self, workload: slrc.Workload, out: Path, *, config: Any, resume: bool, reporter: Any) -> Report:
        self.calls.append((out.name, resume))
        self.started_from[out.name] = config.start_from.name if config.start_from else ""
        weight = next(workload.model.parameters())
        self.starts.append(weight.detach().clone())
        with torch.no_grad():
            weight.zero_()
        if error := self.errors.get(out.name):
            raise error
        out.mkdir(parents=True)
        report = make_report(pattern=str(config.pattern))
        dense_ms = report.latency[0].dense_ms.p50 * self.slower.get(out.name, 1.0)
        both = {
            f"{x}_ms": Percentiles(p50=ms, p90=ms)
            for x, ms in (("dense", dense_ms), ("compiled", dense_ms / config.speedup))
        }
        latency = report.latency[0].model_copy(update={**both, "speedup": config.speedup})
        final = 0.91 - 0.002 * config.speedup**2 - 0.001 * (out.name[0] == "b")
        accuracy = report.accuracy.model_copy(update={"final": final})
        start = config.model_dump(mode="json")["start_from"]
        report = report.model_copy(
            update={"latency": (latency,), "accuracy": accuracy, "config": {"start_from": start}}
        )
        if self.dense_int8 is not None:
            report = in_int8(report, self.dense_int8)
        report.save(out)
        return report


def in_int8(report: Report, dense: Figures) -> Report:
    """The same report of an int8 target: what was the dense network is that in float32, beside another in int8."""
    latency, accuracy, (target,) = report.latency[0], report.accuracy, report.targets
    assert accuracy is not None
    assert dense.ms is not None
    assert dense.size_bytes is not None
    ms = Percentiles(p50=dense.ms, p90=dense.ms)
    known = [("float32", accuracy.dense, report.size_bytes.dense, latency.dense_ms)]
    known.append(("int8", dense.metric, dense.size_bytes, ms))
    corners = [
        Corner(model="dense", precision=p, metric=metric, size_bytes=size, latency_ms=own)
        for p, metric, size, own in known
    ]
    corners += [c.model_copy(update={"model": "compiled", "metric": 0.0}) for c in corners]
    rounding = Calibration(
        scheme="asymmetric",
        samples=1,
        ranges="minmax",
        equalized=False,
        biases_corrected=False,
        loss=0.0,
        tried={},
        quantized_layers=1,
    )
    int8 = Int8Result(corners=tuple(corners), calibration=Pair(dense=rounding, compiled=rounding))
    return report.model_copy(
        update={
            "targets": (target.model_copy(update={"int8": int8}),),
            "latency": (latency.model_copy(update={"dense_ms": ms, "speedup": ms.p50 / latency.compiled_ms.p50}),),
            "size_bytes": report.size_bytes.model_copy(update={"dense": dense.size_bytes}),
        }
    )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(api, "compile", made)
    return made


def run(workload: slrc.Workload, out: Path, points: list[SweepPoint] = POINTS, **options: Any) -> Summary:
    return sweep(workload, out, points, options={"threads": 1}, **options)


def test_a_machine_that_is_slower_at_one_point_does_not_move_it(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    compiler.slower = {"channel-2x": 3.0}
    found = run(tiny_workload(), tmp_path / "sweep")
    assert found.dense.ms == 2.0
    assert [row.ms for row in found.rows] == [2.0 / row.speedup_asked for row in found.rows]
    assert found.recommended == "channel-2x"


def state_of(found: Summary) -> dict[str, str]:
    return {row.name: str(row.state) for row in found.rows}


def test_every_point_starts_from_the_same_weights(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    workload = tiny_workload()
    before = next(workload.model.parameters()).detach().clone()
    found = run(workload, tmp_path / "sweep")
    assert [name for name, _ in compiler.calls] == [p.name for p in POINTS]
    assert all(torch.equal(start, before) for start in compiler.starts)
    assert found.is_over
    assert set(state_of(found).values()) == {"done"}
    assert [row.is_dominated for row in found.rows] == [False, True, False, True]
    assert (found.metric, found.dense) == ("accuracy", Figures(metric=0.91, ms=2.0, size_bytes=1_563_630))
    assert found.dense_int8 is None
    assert found.recommended == "channel-2x"
    assert "2.00 times as fast" in found.recommendation
    assert Summary.model_validate_json((tmp_path / "sweep" / "summary.json").read_text()) == found
    text = (tmp_path / "sweep" / "report.html").read_text()
    page = Page(text)
    assert not page.faults
    assert "channel-2x/report.html" in page.addresses
    assert {(row.method, row.epochs) for row in found.rows} == {("slr", 2)}
    told = ("slr, 2 epochs", "accuracy of the dense network 0.9100")
    for words in (found.recommendation, "4 of 4\xa0points done", "recommended", "dominated", *told):
        assert words in " ".join(page.text.split("\n")).replace("  ", " ") or words in page.text


def test_what_is_done_is_not_done_again_and_points_may_be_added(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    run(tiny_workload(), tmp_path / "sweep", POINTS[:1])
    other = tiny_workload()
    with torch.no_grad():
        next(other.model.parameters()).add_(1.0)  # the dense start stays that of the first worker
    run(other, tmp_path / "sweep")
    assert [name for name, _ in compiler.calls] == [p.name for p in POINTS]
    assert all(torch.equal(start, compiler.starts[0]) for start in compiler.starts)


def test_a_point_that_fails_does_not_stop_the_others(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    compiler.errors = {"channel-2x": PlanError("out of reach"), "block-8x1-4x": ZeroDivisionError("a bug")}
    found = run(tiny_workload(), tmp_path / "sweep")
    assert list(state_of(found).values()) == ["failed", "done", "done", "failed"]
    assert [row.why for row in found.rows] == ["out of reach", "", "", "ZeroDivisionError: a bug"]
    assert found.is_over
    assert "<li>channel-2x failed: out of reach</li>" in render_sweep(found)
    assert sweep_notes(found) == ["channel-2x failed: out of reach", "block-8x1-4x failed: ZeroDivisionError: a bug"]
    lines = printed(found)
    assert len(lines) == 1 + 4  # nothing is folded: a line each, besides a title and names
    assert lines[-1][:2] == ["4", "block-8x1-4x"]
    run(tiny_workload(), tmp_path / "sweep")
    assert len(compiler.calls) == 4
    compiler.errors = {}
    found = run(tiny_workload(), tmp_path / "sweep", retry_failed=True)
    assert set(state_of(found).values()) == {"done"}
    assert len(compiler.calls) == 6


def test_a_run_that_was_cut_off_is_gone_on_with(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    work = tmp_path / "sweep" / "channel-2x.work"
    run(tiny_workload(), tmp_path / "sweep", POINTS[1:2])
    work.mkdir()
    (work / "run.json").write_text("{}")
    run(tiny_workload(), tmp_path / "sweep", POINTS[:1])
    assert compiler.calls == [("block-8x1-2x", False), ("channel-2x", True)]


def test_a_worker_waits_for_the_others_and_takes_what_they_leave(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    workload = tiny_workload()
    config = POINTS[0].config({"threads": 1}, None)
    folder = SweepFolder(tmp_path / "sweep", identity_of(workload.name, config, POINTS, warm_start=False))
    claim = folder.claim(POINTS[0])
    assert claim is not None
    waited = []

    def sleep(seconds: float) -> None:
        waited.append([name for name, _ in compiler.calls])
        if len(waited) == 2:
            claim.release()

    found = run(workload, tmp_path / "sweep", POINTS[:2], sleep=sleep)
    assert waited == [["block-8x1-2x"]] * 2
    assert [name for name, _ in compiler.calls] == ["block-8x1-2x", "channel-2x"]
    assert found.is_over


def warm(workload: slrc.Workload, out: Path, points: list[SweepPoint], **options: Any) -> Summary:
    given = {"threads": 1, "method": "gradual", **options}
    return sweep(workload, out, points, options=given, warm_start=True)


def test_points_start_from_the_next_slower_one(tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler) -> None:
    compiler.errors = {"block-8x1-3x": PlanError("out of reach")}
    points = parse_points("channel,block:8x1", "2,3,5")
    found = warm(tiny_workload(), tmp_path / "sweep", points)
    expected = {
        **{"channel-2x": "", "channel-3x": "channel-2x", "channel-5x": "channel-3x"},
        **{"block-8x1-2x": "", "block-8x1-3x": "block-8x1-2x", "block-8x1-5x": "block-8x1-2x"},
    }
    assert compiler.started_from == expected
    assert found.is_over
    assert {row.name: row.start for row in found.rows} == {**expected, "block-8x1-3x": ""}
    started = [f"{name} started from {start}" for name, start in expected.items() if start and name != "block-8x1-3x"]
    assert sorted(sweep_notes(found)) == sorted([*started, "block-8x1-3x failed: out of reach"])
    assert "<li>channel-5x started from channel-3x</li>" in render_sweep(found)
    assert all(torch.equal(start, compiler.starts[0]) for start in compiler.starts)  # the model given is the dense one


def test_a_warm_start_fixes_the_speed_ups_and_needs_training(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    out = tmp_path / "sweep"
    with pytest.raises(ConfigError, match=r"`--warm-start` needs .*`reconstruct`, which is the default"):
        warm(tiny_workload(), out, POINTS, method=None)
    with pytest.raises(ConfigError, match="and `--method reconstruct` refits"):
        warm(tiny_workload(), out, POINTS, method="reconstruct")
    assert not out.exists()
    warm(tiny_workload(), out, POINTS)
    with pytest.raises(OutputError, match=r"`warm_start` was \[2.0, 4.0\], now \[2.0, 3.0, 4.0\]"):
        warm(tiny_workload(), out, parse_points("channel", "2,3,4"))
    with pytest.raises(OutputError, match=r"`warm_start` was \[2.0, 4.0\], now None"):
        sweep(tiny_workload(), out, POINTS, options={"threads": 1, "method": "gradual"})
    found = warm(tiny_workload(), out, parse_points("channel,block:8x1,block:4x1", "2,4"))
    assert found.rows[-1].start == "block-4x1-2x"


def lines_of(found: Summary) -> list[str]:
    console = Console(file=StringIO(), width=80, markup=False, highlight=False)
    console.print(sweep_table(found))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def printed(found: Summary) -> list[list[str]]:
    return [line.split() for line in lines_of(found)[2:]]


def test_points_that_were_trained_differently_are_told_apart(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    found = run(tiny_workload(), tmp_path / "sweep", POINTS[:2])
    first, second = found.rows
    assert lines_of(found)[0].rstrip().endswith(" on ort: slr, 2 epochs")
    other = found.model_copy(update={"rows": (first, second.model_copy(update={"method": "magnitude", "epochs": 0}))})
    assert lines_of(other)[0].rstrip().endswith(" on ort")
    assert sweep_notes(other) == [f"{first.name}: slr, 2 epochs", f"{second.name}: magnitude, no training"]


def test_dense_int8_stands_beside_dense_float32(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    compiler.dense_int8 = Figures(metric=0.907, ms=1.5, size_bytes=400_000)
    found = run(tiny_workload(), tmp_path / "sweep", POINTS)
    assert found.dense == Figures(metric=0.91, ms=2.0, size_bytes=1_563_630)
    assert found.dense_int8 == compiler.dense_int8
    assert [p.name for p in found.points][:3] == ["dense", "dense-int8", "channel-2x"]
    assert found.recommended == "channel-2x"
    assert "1.50 times as fast as the dense network in int8" in found.recommendation
    lines = printed(found)
    assert lines[0] == ["0", "dense", "0.9100", "2.000", "ms", "1.564", "MB"]
    assert lines[1] == ["1", "dense-int8", "0.9070", "1.500", "ms", "0.400", "MB"]
    assert lines[2][:2] == ["2", "channel-2x"]
    assert sweep_notes(found) == ["speed-ups are those over dense-int8"]
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert not Page(text).faults
    assert '<td>1</td><th scope="row" class="name">dense-int8</th>' in text
    assert '<td>2</td><th scope="row" class="name"><a href="channel-2x/report.html">' in text
    assert f'aria-label="accuracy against milliseconds of {len(POINTS) + 2} networks"' in text
    assert ">dense-int8</text>" in text  # what its mark means


def test_dense_int8_is_recommended_where_pruning_gains_nothing(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    compiler.dense_int8 = Figures(metric=0.907, ms=0.9, size_bytes=400_000)
    found = run(tiny_workload(), tmp_path / "sweep", POINTS[:2])
    assert found.recommended == "dense-int8"
    assert "Take dense-int8: it runs 2.22 times as fast as the dense network" in found.recommendation
    assert printed(found)[1][-1] == "recommended"
    assert "<strong>recommended</strong>" in render_sweep(found)
    assert [row.is_dominated for row in found.rows] == [True, True]


def test_another_model_or_other_options_are_refused(
    tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler
) -> None:
    run(tiny_workload(), tmp_path / "sweep", POINTS[:1])
    with pytest.raises(OutputError, match="not the one that the sweep"):
        run(tiny_workload(model=torch.nn.Linear(4, 2)), tmp_path / "sweep", POINTS[:1])
    with pytest.raises(OutputError, match="`epochs` was None, now 3"):
        sweep(tiny_workload(), tmp_path / "sweep", POINTS, options={"threads": 1, "epochs": 3}, reporter=Quiet())


def test_states_of_a_sweep_under_way(tiny_workload: MakeWorkload, tmp_path: Path, compiler: Compiler) -> None:
    seen: list[list[str]] = []
    whole = compiler.__call__

    def look(*args: Any, **kwargs: Any) -> Report:
        path = tmp_path / "sweep" / "summary.json"
        if path.exists():
            seen.append([row["state"] for row in json.loads(path.read_text())["rows"]])
        return whole(*args, **kwargs)

    api.compile = look  # type: ignore[assignment]  # the fixture puts it back
    run(tiny_workload(), tmp_path / "sweep", POINTS[:3])
    assert seen == [[State.DONE, State.WAITING, State.WAITING], [State.DONE, State.DONE, State.WAITING]]


# The clock says that time is proportional to the size of the weights; one process kills itself in the second epoch.
REAL = """

import os, signal
from pathlib import Path
from slrc.measuring.clock import Clock, Timing

Clock.times = lambda clock, jobs, budget: tuple(
    Timing(float(sum(t.numel() for t in job.program(clock.target).tensors.values()))) for job in jobs
)
_whole = workload


def workload():
    def loss(model, batch):
        if os.environ.get("KILL") and list(Path("sweep").glob("*.work/checkpoints/0*")):
            os.kill(os.getpid(), signal.SIGKILL)
        return slrc.cross_entropy(model, batch)

    made = _whole()
    made.loss, made.distill = loss, slrc.soft_divergence
    return made
"""


def test_a_worker_is_killed_and_two_others_finish_the_sweep(
    start_process: Callable[..., Any], tmp_path: Path, workload_source: str
) -> None:
    (tmp_path / "tinynet.py").write_text(workload_source + REAL)
    command = ["slrc", "sweep", "tinynet.py", "--speedups", "1.25,1.5", "--patterns", "channel", "--threads", "1"]
    command += ["--epochs", "2", "--method", "gradual", "--round-to", "1", "--prune-ends"]
    code = f"sys.argv[:] = {command!r}; sys.path.insert(0, ''); from slrc.cli import main; main()"
    killed = start_process(code, tmp_path, KILL="1").finish()
    assert killed.code == -signal.SIGKILL, killed.err
    root = tmp_path / "sweep"
    assert (root / "channel-1.25x.work" / "checkpoints").exists()

    workers = [start_process(code, tmp_path) for _ in range(2)]
    done = [worker.finish() for worker in workers]
    assert [d.code for d in done] == [0, 0], done
    said = "".join(d.err for d in done)
    for name in ("channel-1.25x", "channel-1.5x"):
        assert said.count(f"point {name}\n") == 1
        assert Report.load(root / name).curve[-1].epoch == 2
    assert said.count("going on after gradual epoch 1") == 1
    summary = Summary.model_validate_json((root / "summary.json").read_text())
    assert summary.is_over
    assert not list(root.glob("*.work"))
    dense = load_file(root / "dense.safetensors")
    assert dense
    assert "dense" in done[0].out
    assert (root / "report.html").exists()
