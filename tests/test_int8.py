"""Compiles for int8 targets, end to end: four corners, the proof in steps, `--max-drop`, training, and refusals."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc import pipeline
from slrc.backends import LoweredProgram, get_backend, parse_target
from slrc.backends.ort.backend import OnnxRuntime
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.backends.runner_module import RunnerModule
from slrc.config import make_config
from slrc.doctor.deadline import Deadline
from slrc.doctor.times import time_speedups
from slrc.errors import BackendError, ConfigError, VerificationError, WorkloadError
from slrc.forms.form import FormKind
from slrc.ir.nodes import op_name
from slrc.machine.processor import Processor
from slrc.measuring.clock import Clock
from slrc.measuring.devices import Measured, Timing
from slrc.measuring.jobs import Job
from slrc.measuring.timing import BLOCKS, Budget, Latency, Percentiles
from slrc.progress import Quiet
from slrc.quantization.choose import rounded_anyhow
from slrc.quantized_targets import IntegerTargets
from slrc.reporting.page import render_page
from slrc.reporting.report import Report
from slrc.reporting.tables import report_table
from slrc.sparsity.patterns import Channel

MakeWorkload = Callable[..., slrc.Workload]
OPTIONS: dict[str, Any] = {"target": "ort+int8", "method": "magnitude", "epochs": 0, "keep_ends": False, "threads": 1}


@pytest.mark.usefixtures("quick_timing")
def test_the_four_corners(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    report = slrc.compile(
        tiny_workload(), tmp_path / "out", sparsity=0.25, round_to=4, qat_epochs=1, max_drop=1.0, **OPTIONS
    )
    assert report == Report.load(tmp_path / "out")
    (target,) = report.targets
    assert (target.target, target.precision) == ("ort:int8", "int8")
    assert target.int8 is not None
    corners = {(c.model, c.precision): c for c in target.int8.corners}
    assert len(corners) == 4
    assert not any("on this CPU" in note for note in report.notes)
    assert all(c.metric is not None and c.latency_ms is not None and c.size_bytes > 0 for c in corners.values())
    assert report.accuracy is not None
    assert report.accuracy.final == corners["compiled", "int8"].metric
    assert report.latency[0].dense_ms.p50 == corners["dense", "int8"].latency_ms.p50  # type: ignore[union-attr]
    assert [r.epoch for r in target.int8.training] == [0, 1]
    steps = [c for c in report.checks if "in steps" in c.step]
    assert [c.step.split(" = ")[0] for c in steps] == ["dense, rounded", "compiled, rounded"]
    assert all(c.max_abs_error <= c.tolerance == 1 for c in steps)
    assert [c.tolerance for c in report.checks if "~ ort:int8" in c.step] == [1.0]
    folders = {p.name for p in (tmp_path / "out" / target.folder).iterdir()}
    assert folders == {"dense", "compiled", "dense-float32", "compiled-float32"}
    text = render_page(report)
    assert "Float32 against int8" in text
    assert "compiled, int8" in text
    assert report_table(report).row_count


@pytest.mark.usefixtures("quick_timing")
def test_a_drop_that_is_too_great(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    in_runtimes: list[nn.Module] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        if not isinstance(model, RunnerModule):
            return {"accuracy": 1.0}
        in_runtimes.append(model)  # the first is the compiled model in float32
        return {"accuracy": 1.0 if len(in_runtimes) == 1 else 0.5}

    with pytest.raises(VerificationError, match=r"was 1\.0000, rounded 0\.5000, and may lose 0\.1") as caught:
        slrc.compile(tiny_workload(evaluate=evaluate), tmp_path / "out", sparsity=0.25, max_drop=0.1, **OPTIONS)
    assert "--qat-epochs" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_timing")
def test_a_metric_in_int8_that_is_no_number(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    in_runtimes: list[nn.Module] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        in_runtimes.extend([model] if isinstance(model, RunnerModule) else [])
        return {"accuracy": 1.0 if len(in_runtimes) <= 1 else float("nan")}

    with pytest.raises(WorkloadError, match="returned nan for the dense model in int8"):
        slrc.compile(tiny_workload(evaluate=evaluate), tmp_path / "out", sparsity=0.25, max_drop=0.1, **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [("ort+int8", "ort:int8"), ("ort:int8", "ort:int8"), ("ort:aarch64+int8", "ort:aarch64+int8")],
)
def test_int8_targets_of_onnx_runtime(text: str, named: str) -> None:
    target = parse_target(text)
    assert (str(target), target.is_integer) == (named, True)
    assert str(target.in_float) == named.replace("+int8", "").replace(":int8", "")
    assert get_backend(target).why_not_packed(target) == get_backend(target).why_not_packed(target.in_float)


@pytest.mark.usefixtures("quick_timing")
def test_all_layers_may_stay_in_float(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    report = slrc.compile(tiny_workload(), tmp_path / "out", sparsity=0.25, int8_skip="*", max_drop=0.0, **OPTIONS)
    (target,) = report.targets
    assert target.int8 is not None
    assert target.int8.calibration.compiled.quantized_layers == 0
    assert any("no layer of the compiled model is in int8" in note for note in report.notes)


def test_a_split_layer_is_left_in_float_by_its_name(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    options = {**OPTIONS, "target": "tensorrt:10.3+int8", "pattern": "columns:2"}
    report = slrc.compile(tiny_workload(), tmp_path / "out", sparsity=0.75, int8_skip="conv2", **options)
    (target,) = report.targets
    assert target.forms is not None
    forms = {x.weight: str(x.form) for x in target.forms.layers}
    assert forms["conv2.weight"] == "float32"
    assert re.match("split|grouped", forms["conv3.weight"])
    assert target.int8 is not None
    assert target.int8.calibration.compiled.skipped == ("conv2.weight",)
    assert any("these layers stay in float32: `conv2`" in note for note in report.notes)
    assert any("ONNX files in ONNX Runtime on this CPU" in note for note in report.notes)


@pytest.mark.usefixtures("quick_timing")
@pytest.mark.parametrize(
    ("given", "why"),
    [({"int8_skip": "conv2"}, "that `conv2` would stay in float32"), ({}, "was the machine busy then?")],
)
def test_why_a_forecast_was_wrong(
    given: dict[str, str], why: str, tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(clock: Clock, jobs: Sequence[Job], budget: Budget) -> tuple[Timing, ...]:
        return tuple(Timing(float(sum(t.numel() for t in job.program(clock.target).tensors.values()))) for job in jobs)

    monkeypatch.setattr(Clock, "times", made_up)
    monkeypatch.setattr("slrc.compilation.FORECAST_TOLERANCE", -1.0)
    options = {**OPTIONS, "pattern": "channel", "latency_budget": 0.7, **given}
    report = slrc.compile(tiny_workload(), tmp_path / "out", **options)
    (note,) = [note for note in report.notes if "were predicted" in note]
    assert why in note


@pytest.mark.parametrize(("dense", "compiled", "told"), [(3.0, 2.0, False), (3.0, 0.9, True), (0.9, 2.0, True)])
def test_int8_that_is_slower_than_float32_is_told(
    dense: float, compiled: float, told: bool, tiny_workload: MakeWorkload
) -> None:
    notes, target = list[str](), parse_target("ort+int8")
    integers = IntegerTargets(tiny_workload(), make_config({"target": str(target)}), notes.append, Quiet())
    ms = {x: Percentiles(p50=x, p90=x) for x in (dense, compiled, 1.0, 1.5)}
    latency = Latency(
        target=str(target),
        threads=1,
        batch=1,
        dense_ms=ms[1.5],
        compiled_ms=ms[1.0],
        speedup=1.5,
        speedup_spread=(1.5, 1.5),
        runs=1,
    )
    others = {"dense-float32": ms[dense], "compiled-float32": ms[compiled]}
    integers.keep_times(target, Measured(latency, others=others))
    assert any("on ort:int8 int8 is slower than float32" in note for note in notes) == told
    assert [p.p50 for p in integers.corner_ms[target]] == [dense, 1.5, compiled, 1.0]


def test_int8_targets_of_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrc.backends.tensorrt.backend.find_spec", lambda name: None)
    assert parse_target("tensorrt:int8").is_integer
    assert str(parse_target("tensorrt-rtx:sm86+int8").in_float) == "tensorrt-rtx:sm86"
    with pytest.raises(BackendError, match="one precision, got fp16 and int8"):
        parse_target("tensorrt:fp16+int8")


def test_what_cannot_be_proven_here_is_told_before_training(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrc.quantized_targets.find_spec", lambda name: None)
    trained: list[int] = []
    monkeypatch.setattr("slrc.compilation.train", lambda *_, **__: trained.append(1))
    with pytest.raises(BackendError, match=r"`ort:int8`: .* `onnxruntime` is not installed"):
        slrc.compile(tiny_workload(), tmp_path / "out", sparsity=0.25, **OPTIONS)
    assert not trained


@pytest.mark.parametrize(
    ("options", "lacks", "says"),
    [({"max_drop": 0.1}, "evaluate", "needs a metric"), ({"qat_epochs": 1}, "train_batches", "needs training data")],
)
def test_data_that_options_need_is_asked_for_before_training(
    options: dict[str, Any],
    lacks: str,
    says: str,
    tiny_workload: MakeWorkload,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    monkeypatch.setattr("slrc.api.plan_from", lambda *_, **__: started.append(1))
    with pytest.raises(WorkloadError, match=says):
        slrc.compile(tiny_workload(**{lacks: None}), tmp_path / "out", sparsity=0.25, **options, **OPTIONS)
    assert not started


@pytest.mark.parametrize("text", ["ort+int4", "ort:aarch64+x86_64+int8", "ort+int8x", "+int8"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(BackendError) as caught:
        parse_target(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"qat_epochs": 2}, "`--qat-epochs` is for int8 targets"),
        ({"max_drop": 0.1}, "`--max-drop` is for int8 targets"),
        ({"int8_skip": "head"}, "`--int8-skip` is for int8 targets"),
        ({"target": "ort+int8", "int8_skip": ("auto", "head")}, "either `auto`, `none`, or names"),
        ({"target": "ort+int8", "qat_epochs": -1}, "greater than or equal to 0"),
        ({"target": "ort+int8", "max_drop": -0.1}, "greater than or equal to 0"),
        ({"target": "ort+int8", "int8": {"ranges": "median"}}, "int8.ranges"),
        ({"target": "ort+int8", "int8": {"sample": 3}}, "there is no such option"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        make_config(options)


class Residual(nn.Module):
    """A block with a shortcut, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return self.head(torch.relu(self.c(torch.relu(self.b(x))) + x).mean((2, 3)))


class FavoursPackedIntegers(Clock):
    """Says that a network is the faster the more of its layers are packed in int8."""

    def times(self, jobs: Sequence[Job], budget: Budget) -> tuple[Timing, ...]:
        forms = [job.make().forms.values() for job in jobs]
        return tuple(Timing(10.0 - sum(f.kind is FormKind.PACKED_INT8 for f in found)) for found in forms)


@pytest.mark.usefixtures("quick_timing")
def test_a_network_pruned_in_blocks_runs_in_packed_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrc.measuring.choose_forms.Clock", FavoursPackedIntegers)
    torch.manual_seed(0)
    x = torch.randn(16, 16, 8, 8)
    data = TensorDataset(x, x.mean((2, 3))[:, :3].argmax(1))
    workload = slrc.Workload(
        Residual(),
        (x[:1],),
        train_batches=DataLoader(data, batch_size=8),
        evaluate=lambda model: {"accuracy": (model(x).argmax(1) == data.tensors[1]).float().mean().item()},
    )
    report = slrc.compile(
        workload, tmp_path / "out", pattern="block:8x4", sparsity=0.75, qat_epochs=1, int8_skip="none", **OPTIONS
    )
    (target,) = report.targets
    assert target.forms is not None
    forms = {x.weight: str(x.form) for x in target.forms.layers if x.weight != "head.weight"}
    assert forms == {f"{name}.weight": "packed-int8:4" for name in "abc"}
    folder = tmp_path / "out" / target.folder
    model = onnx.load(folder / "compiled" / "model.onnx")
    nodes = [n.op_type for n in model.graph.node]
    assert (nodes.count("BlockSparseQConv"), nodes.count("BlockSparseQConv_residual"), nodes.count("Conv")) == (2, 1, 0)
    steps = {c.step: c for c in report.checks if c.step.startswith("compiled, rounded")}
    assert any("in steps" in step and c.max_abs_error <= 1 for step, c in steps.items())
    assert any("3 nodes of slrc, bit by bit" in step for step in steps)
    values = [i for i in model.graph.initializer if i.name in ("a.values", "b.values", "c.values")]
    assert sum(i.dims[0] for i in values) <= 3 * 4 * 4 * 9 / 4  # a quarter of the blocks: training held the zeros
    assert target.int8 is not None
    assert all(c.metric is not None for c in target.int8.corners)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that ONNX Runtime's backend was given."""
    programs: list[Any] = []
    lower = OnnxRuntime.lower

    def watched(self: OnnxRuntime, program: Any, *args: Any, **kwargs: Any) -> Any:
        programs.append(program)
        return lower(self, program, *args, **kwargs)

    monkeypatch.setattr(OnnxRuntime, "lower", watched)
    return programs


def test_forms_for_an_int8_target_are_timed_in_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: list[Any]
) -> None:
    monkeypatch.setattr("slrc.measuring.timing.PATIENCE", 0.0)
    program = pipeline.baseline(slrc.capture(slrc.Workload(Residual().eval(), (torch.randn(1, 16, 8, 8),))))
    clock = Clock(parse_target("ort+int8"), 1, tmp_path)
    (timing,) = clock.times([Job.of_whole(program)], Budget(0.01, 2))
    assert 0 < timing.ms < float("inf")
    assert any(op_name(n) == "fake_quantize" for n in lowered[0].nodes)


def emitted(text: str, out: Path) -> LoweredProgram:
    torch.manual_seed(0)
    program = pipeline.baseline(slrc.capture(slrc.Workload(Residual().eval(), (torch.randn(1, 16, 8, 8),))))
    target = parse_target(text)
    return pipeline.lower(rounded_anyhow(program, get_backend(target).scheme), target, out)


def test_speedups_that_doctor_shows_for_an_int8_target_are_of_rounding_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: list[Any]
) -> None:
    monkeypatch.setattr("slrc.doctor.times.PART", Budget(0.0, 1))
    monkeypatch.setattr("slrc.doctor.times.WHOLE", Budget(0.0, BLOCKS))
    monkeypatch.setattr("slrc.doctor.times.SPARSITIES", (0.5,))
    program = pipeline.baseline(slrc.capture(slrc.Workload(Residual().eval(), (torch.randn(1, 16, 8, 8),))))
    config, target = make_config({"target": "ort+int8"}), parse_target("ort+int8")
    (point,) = time_speedups(program, (Channel(),), config, target, 1, Deadline(60.0, time.monotonic), Quiet())
    assert point.speedup is not None, point
    assert len(lowered) == 2
    assert all(any(op_name(n) == "fake_quantize" for n in p.nodes) for p in lowered)


@pytest.mark.parametrize(("version", "opset"), [("8.5", 17), ("10.3", 20)])
def test_a_tensorrt_of_a_device_is_given_integers_in_its_opset(version: str, opset: int, tmp_path: Path) -> None:
    lowered = emitted(f"tensorrt:{version}+int8", tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert (lowered.artifact.precision, model.opset_import[0].version) == ("int8", opset)
    assert sum(n.op_type == "DequantizeLinear" for n in model.graph.node) >= 7
    (y,) = get_backend(lowered.target).load(tmp_path, threads=1, stock=True)(torch.randn(1, 16, 8, 8))
    assert y.isfinite().all()


def test_onnx_runtime_runs_layers_and_additions_in_integers(tmp_path: Path) -> None:
    emitted("ort+int8", tmp_path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "model.onnx"), options)
    found = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (found.count("QLinearConv"), found.count("QLinearAdd"), found.count("QGemm")) == (3, 1, 1)
    assert not {"Conv", "Gemm", "Add", "Relu"} & set(found)
    names = {i.name for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert not any(n.endswith((".weight", ".bias")) for n in names)


def test_sums_do_not_overflow_without_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There ONNX Runtime makes weights unsigned: it has to take the file."""
    emitted("ort+int8", tmp_path)
    x = torch.randn(1, 16, 8, 8)
    (plain,) = OnnxRuntimeRunner(tmp_path / "model.onnx", 1)(x)
    monkeypatch.setattr("slrc.backends.ort.run.processor", lambda: Processor("", frozenset()))
    (exact,) = OnnxRuntimeRunner(tmp_path / "model.onnx", 1)(x)
    torch.testing.assert_close(plain, exact, rtol=0.05, atol=0.02)


def test_tensorrt_rtx_builds_convolutions_in_int8_with_no_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    emitted("tensorrt-rtx:sm86+int8", tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    made = {o: n for n in model.graph.node for o in n.output}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    for node in convolutions:  # input and weight are dequantised, the bias is a float, and what follows is no rounding
        assert [made[i].op_type for i in node.input[:2]] == ["DequantizeLinear"] * 2
        assert node.input[2] not in made
        assert {n.op_type for n in model.graph.node if node.output[0] in n.input} <= {"Relu", "Add"}
    (addition,) = (n for n in model.graph.node if n.op_type == "Add")
    assert sorted(made[i].op_type for i in addition.input) == ["Conv", "DequantizeLinear"]
    text = (tmp_path / "model.engine").read_bytes().decode("latin-1")
    types = dict(
        re.findall(r'tensor=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*?name="([^"]+)"[^{}]*(?:\{[^{}]*\}[^{}]*)*?type=(\w+)', text)
    )
    inputs = re.findall(r'corrltn=\{ name="node_conv[^"]*"[^\n]*? input=\{([^}]*)\}', text)
    assert len(inputs) == len(convolutions) == 3
    for names in inputs:
        value, weight = re.findall(r'"([^"]+)"', names)[:2]
        assert (types[value], types[weight]) == ("int8", "int8")
