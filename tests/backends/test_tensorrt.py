"""TensorRT backends: targets, what they take, and engines built without a GPU."""

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from slrc.backends import get_backend, parse_target
from slrc.backends.base import Artifact
from slrc.backends.tensorrt import TensorRT, TensorRTRTX
from slrc.backends.tensorrt.build import build_engine
from slrc.backends.tensorrt.log import message_log
from slrc.errors import BackendError
from slrc.ir.program import Program, capture

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
FLOAT16_TOLERANCE = 5e-3


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class SplitConvNet(nn.Module):
    """A convolution in two parts, each of which gathers its own input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.parts = nn.ModuleList(nn.Conv2d(4, 8, 3, padding=1) for _ in range(2))
        self.register_buffer("kept", torch.tensor([[0, 3, 5, 9], [1, 2, 5, 15]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return torch.cat([p(x.index_select(1, k)) for p, k in zip(self.parts, self.kept, strict=True)], 1)


def captured(model: nn.Module, batch: int = 2) -> Program:
    torch.manual_seed(0)
    return capture(model, (torch.randn(batch, 3, 16, 16),), "net")


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return captured(ConvNet())


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx")


def lower(program: Program, text: str, out: Path) -> Artifact:
    target = parse_target(text)
    return get_backend(target).lower(program, target, out)


# Targets and availability


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensorrt:foo", "unknown option `foo`: expected `fp32`, `fp16` or `int8`, a version such as `10.3`, `dla`"),
        ("tensorrt:8.4", "TensorRT 8.5 is the oldest"),
        ("tensorrt:8.6+10.3", "one version, got 8.6 and 10.3"),
        ("tensorrt:dla+fp32", "a DLA computes in float16, got `fp32`"),
        ("tensorrt:dla+int8", "a DLA computes in float16, got `int8`"),
        ("tensorrt:10.13+dla", "10.8 to 11.4.0 builds nothing for a DLA"),
        ("tensorrt-rtx:10.3", "unknown option `10.3`"),
        ("tensorrt-rtx:dla", "unknown option `dla`"),
        ("tensorrt-rtx:foo", "unknown option `foo`.*such as `sm86`"),
        ("tensorrt-rtx:SM86", "unknown option `SM86`"),
        ("tensorrt-rtx:fp16+fp32", "one precision, got fp16 and fp32"),
        ("tensorrt:sm86", "builds for the GPU present, got `sm86`(.|\n)*hint: .*`tensorrt-rtx:sm86`"),
    ],
)
def test_bad_options_are_rejected_without_the_package(text, says, monkeypatch):
    monkeypatch.setattr("slrc.backends.tensorrt.backend.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=says) as caught:
        parse_target(text)
    assert caught.value.hint


def test_an_unknown_compute_capability_lists_the_known_ones(trt):
    with pytest.raises(BackendError, match=r"does not build for `sm42`: expected one of sm75, .*sm86") as caught:
        parse_target("tensorrt-rtx:sm42")
    assert caught.value.hint


def test_a_compute_capability_passes_where_the_package_cannot_be_asked(monkeypatch):
    monkeypatch.setattr("slrc.backends.tensorrt.backend.find_spec", lambda name: None)
    assert parse_target("tensorrt-rtx:sm86+fp16").options == ("sm86", "fp16")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_onnx_file_for_a_device_is_written(program, tmp_path):
    available = TensorRT().available()
    assert available.why_not_emit == ""
    assert "`tensorrt` is not installed: pip install tensorrt" in available.why_not_run
    artifact = lower(program, "tensorrt", tmp_path)
    assert (artifact.model_file, artifact.engine) == ("model.onnx", None)
    assert "builder" not in artifact.properties
    with pytest.raises(BackendError, match="holds no engine: it is built on the device"):
        TensorRT().load(tmp_path)


def test_missing_tensorrt_rtx_names_the_extra(monkeypatch):
    monkeypatch.setattr("slrc.backends.tensorrt.backend.find_spec", lambda name: None)
    assert "pip install 'slrc[tensorrt-rtx]'" in TensorRTRTX().available().why_not_emit


def test_a_folder_named_tensorrt_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert "not installed" in TensorRT().available().why_not_run


@no_gpu
def test_tensorrt_does_not_run_without_a_gpu(monkeypatch):
    monkeypatch.setattr("slrc.backends.tensorrt.backend.find_spec", lambda name: SimpleNamespace(origin=name))
    assert "GPU" in TensorRT().available().why_not_run


def test_what_is_for_a_device_does_not_run_here_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(TensorRT, "_why_no_gpu", lambda self: "")
    assert TensorRT().available(parse_target("tensorrt:fp16")).why_not_run == ""
    for text in ("tensorrt:10.3", "tensorrt:dla"):
        assert "on the device" in TensorRT().available(parse_target(text)).why_not_run


@no_gpu
def test_tensorrt_rtx_emits_without_a_gpu_but_does_not_run(trt):
    available = TensorRTRTX().available()
    assert available.why_not_emit == ""
    assert "GPU" in available.why_not_run


# What the backend cannot take


def test_check_names_double_precision_and_takes_a_plain_network(program):
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double().sum(1).float()

    assert TensorRTRTX().check(program) == []
    reasons = TensorRTRTX().check(captured(Double()))
    assert reasons
    assert all("float64" in r for r in reasons)


# Engines


@pytest.fixture(scope="module")
def engine(trt, program, tmp_path_factory):
    """The folder of an engine for one GPU, built once; read-only."""
    folder = tmp_path_factory.mktemp("engine")
    lower(program, "tensorrt-rtx:sm86", folder)
    return folder


def test_builds_an_engine_for_a_named_gpu(trt, engine):
    artifact = Artifact.read(engine)
    assert (artifact.target, artifact.model_file) == ("tensorrt-rtx:sm86", "model.engine")
    assert (artifact.precision, artifact.dynamic_batch) == ("float32", True)
    assert artifact.inputs == ("x",)
    assert len(artifact.outputs) == 1
    assert artifact.properties["builder"] == f"tensorrt-rtx {trt.__version__}"
    assert artifact.properties["compute_capabilities"] == "sm86"
    assert artifact.properties["batch_profile"] == "x: 1 to 32, tuned for 2"
    assert artifact.engine is not None
    assert artifact.engine.layers >= sum(artifact.engine.precisions.values()) >= 2
    assert set(artifact.engine.precisions) == {"float32"}
    data = (engine / "model.engine").read_bytes()
    assert len(data) > trt.Runtime(message_log(trt).ilogger).engine_header_size
    assert b"trt" in data[:4]


@no_gpu
def test_a_runtime_refuses_an_engine_without_a_gpu_and_says_why(trt, engine):
    log = message_log(trt)
    log.clear()
    assert trt.Runtime(log.ilogger).deserialize_cuda_engine((engine / "model.engine").read_bytes()) is None
    assert "cuda" in log.last_error.lower()


def test_names_every_gpu_but_turing_by_default(trt, program, tmp_path):
    capabilities = lower(program, "tensorrt-rtx", tmp_path).properties["compute_capabilities"].split()
    assert {"sm86", "sm89", "sm120"} <= set(capabilities)
    assert "sm75" not in capabilities


def test_builds_a_split_convolution_in_half_precision(trt, tmp_path):
    program = captured(SplitConvNet(), batch=48)
    artifact = lower(program, "tensorrt-rtx:sm75+sm86+fp16", tmp_path)
    assert artifact.precision == "float16"
    assert artifact.properties["compute_capabilities"] == "sm75 sm86"
    assert artifact.properties["batch_profile"] == "x: 1 to 48, tuned for 48"
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert sum(node.op_type == "Gather" for node in graph.node) >= 2
    assert TensorProto.FLOAT not in {i.data_type for i in graph.initializer}
    assert artifact.engine is not None
    assert artifact.engine.precisions["float16"] > artifact.engine.precisions["float32"]
    assert (tmp_path / "model.engine").stat().st_size > 0


def test_builds_a_network_with_a_fixed_batch(trt, tmp_path):
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.view(2, 3, 16, 16))

    x = torch.randn(2, 3, 16, 16)
    program = Program(torch.export.export(Fixed(), (x,)).run_decompositions({}), (x,))
    artifact = lower(program, "tensorrt-rtx:sm86", tmp_path)
    assert not artifact.dynamic_batch
    assert artifact.properties["batch_profile"] == "fixed"


def test_what_the_parser_cannot_take_is_named_with_node_and_operator(trt, tmp_path):
    nodes = [
        helper.make_node("Strange", ["x"], ["h"], name="first", domain="local"),
        helper.make_node("Odd", ["h"], ["y"], name="second", domain="local"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BackendError, match=r"node `first` \(Strange\): ") as caught:
        build_engine(trt, tmp_path / "m.onnx", tmp_path / "m.engine", {}, ["sm86"])
    assert caught.value.hint
    assert not (tmp_path / "m.engine").exists()


def test_what_the_builder_cannot_do_is_said_in_its_words(trt, program, tmp_path):
    with pytest.raises(BackendError, match=r"Turing \(SM75\)") as caught:
        lower(program, "tensorrt-rtx:sm75", tmp_path)
    assert "fp16" in str(caught.value.hint)


def test_building_is_quiet(trt, program, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG, "slrc.backends.tensorrt")
    lower(program, "tensorrt-rtx:sm86", tmp_path)
    assert caplog.records
    assert max(r.levelno for r in caplog.records if r.name.startswith("slrc")) <= logging.INFO
    assert capfd.readouterr() == ("", "")


# Running


def test_the_tolerance_follows_the_precision(program):
    def artifact(precision: str) -> Artifact:
        return Artifact(
            target="tensorrt", model_file="m", precision=precision, dynamic_batch=True, inputs=(), outputs=()
        )

    half, full = (TensorRT().tolerance(artifact(p)) for p in ("float16", "float32"))
    assert half > full > 0


@no_gpu
def test_load_without_a_gpu_says_so(engine):
    with pytest.raises(BackendError, match="cannot run here: there is no CUDA GPU") as caught:
        TensorRTRTX().load(engine)
    assert caught.value.hint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("text", ["tensorrt", "tensorrt-rtx", "tensorrt-rtx:fp16"])
def test_an_engine_agrees_with_the_program(text, program, tmp_path):
    backend = get_backend(parse_target(text))
    if why := backend.available().why_not_run:
        pytest.skip(why)
    lower(program, text, tmp_path)
    runner = backend.load(tmp_path)
    tolerance = FLOAT16_TOLERANCE if "fp16" in text else 1e-4
    for batch in (2, 1, 32):
        x = torch.randn(batch, 3, 16, 16)
        runner.prepare(x)()
        assert torch.allclose(runner(x)[0], program.module()(x), atol=tolerance)
    with pytest.raises(BackendError, match="cannot have shape"):
        runner(torch.randn(33, 3, 16, 16))
