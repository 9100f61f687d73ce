"""Half precision for TensorRT, decided in the graph of an ONNX file."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from slrc.backends.onnx_export import export_onnx
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.backends.tensorrt.precision import convert_to_float16
from slrc.ir.program import Program, capture

FLOAT16_TOLERANCE = 5e-3


def captured(model: nn.Module) -> Program:
    return capture(model, (torch.randn(2, 3, 16, 16),), "net")


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return captured(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *pooled))


def test_half_precision_is_decided_in_the_graph(program, tmp_path):
    export_onnx(program, tmp_path / "full.onnx")
    export_onnx(program, tmp_path / "half.onnx")
    convert_to_float16(tmp_path / "half.onnx")
    full, half = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("full", "half"))

    weights = {i.name: i.data_type for i in full.initializer if i.data_type == TensorProto.FLOAT}
    assert weights
    assert {i.name: i.data_type for i in half.initializer if i.name in weights} == dict.fromkeys(
        weights, TensorProto.FLOAT16
    )
    for values in (half.input, half.output):
        assert {v.type.tensor_type.elem_type for v in values} == {TensorProto.FLOAT}
    assert [v.name for v in half.input] == [v.name for v in full.input]
    assert [v.name for v in half.output] == [v.name for v in full.output]

    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        expected, got = (OnnxRuntimeRunner(tmp_path / f"{name}.onnx")(x)[0] for name in ("full", "half"))
        assert torch.allclose(expected, got, atol=FLOAT16_TOLERANCE)
        assert not torch.equal(expected, got)


def test_half_precision_looks_inside_the_models_functions(tmp_path):
    """A constant in a function's body would stay float32 beside float16 inputs."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    half = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [], [0.5]))
    function = helper.make_function(
        "local", "Halve", ["a"], ["b"], [half, helper.make_node("Mul", ["a", "c"], ["b"])], opsets[:1]
    )
    graph = helper.make_graph(
        [helper.make_node("Halve", ["x"], ["y"], domain="local")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    convert_to_float16(tmp_path / "m.onnx")
    assert not onnx.load(tmp_path / "m.onnx").functions
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert OnnxRuntimeRunner(tmp_path / "m.onnx")(x)[0].tolist() == [[0.5, 1.0, 1.5, 2.0]]


def test_half_precision_leaves_the_scales_of_a_resize_alone(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.GroupNorm(2, 8))
    program = captured(model)
    export_onnx(program, tmp_path / "m.onnx")
    convert_to_float16(tmp_path / "m.onnx")
    types = {i.name: i.data_type for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert list(types.values()).count(TensorProto.FLOAT) == 1
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(OnnxRuntimeRunner(tmp_path / "m.onnx")(x)[0], program.module()(x), atol=1e-2)


def test_weights_in_a_file_of_their_own_stay_there(program, tmp_path, monkeypatch):
    for module in ("onnx_export", "tensorrt.precision"):
        monkeypatch.setattr(f"slrc.backends.{module}.EXTERNAL_DATA_BYTES", 0)
    export_onnx(program, tmp_path / "m.onnx")
    full_bytes = (tmp_path / "m.onnx.data").stat().st_size
    convert_to_float16(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size < full_bytes
    x = torch.randn(2, 3, 16, 16)
    got = OnnxRuntimeRunner(tmp_path / "m.onnx")(x)[0]
    assert torch.allclose(got, program.module()(x), atol=FLOAT16_TOLERANCE)
