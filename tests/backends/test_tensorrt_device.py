"""TensorRT for a device: what each version's parser is given, layers with 2:4 weights, and what is read of an engine.

The lines of versions before 10 are written after NVIDIA's documentation and logs that others have published.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from slrc.backends import get_backend, parse_target
from slrc.backends.base import Artifact
from slrc.backends.engine_summary import EngineSummary
from slrc.backends.onnx_export import export_onnx
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.backends.tensorrt.inspect import inspect_engine, summarise
from slrc.backends.tensorrt.log import MessageLog
from slrc.backends.tensorrt.options import parse_options
from slrc.backends.tensorrt.sparse_layers import SparseLayer, sparse_layers, warnings_of
from slrc.errors import BackendError
from slrc.ir.program import Program, capture


class Block(nn.Module):
    """A convolution, a mean over its pixels, and the norm and MLP of a transformer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).mean((2, 3))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Block(), (torch.randn(2, 4, 6, 6),), "block")


def lower(program: Program, text: str, out: Path) -> Artifact:
    out.mkdir()
    target = parse_target(text)
    return get_backend(target).lower(program, target, out)


# Versions


@pytest.mark.parametrize(
    ("text", "opset", "functions", "layer_norm"),
    [
        ("tensorrt:8.5", 17, False, False),
        ("tensorrt:8.5.2.2", 17, False, False),
        ("tensorrt:8.6", 17, False, True),
        ("tensorrt:9.3", 17, True, True),
        ("tensorrt:10.3", 20, True, True),
        ("tensorrt:10.13.3", 21, True, True),
        ("tensorrt:11.4.1", 21, True, True),
        ("tensorrt", 21, True, True),
        ("tensorrt:dla", 20, True, True),
    ],
)
def test_each_version_is_given_what_its_parser_takes(text, opset, functions, layer_norm):
    parser = parse_options(parse_target(text), names_gpus=False).parser
    assert parser == (opset, functions, layer_norm)


@pytest.mark.parametrize("half", ["", "+fp16"])
@pytest.mark.parametrize(("version", "opset"), [("8.5", 17), ("8.6", 17), ("10.3", 20), ("11.1", 21)])
def test_the_file_for_a_version_is_in_its_opset_and_computes_the_same(version, opset, half, program, tmp_path):
    artifact = lower(program, f"tensorrt:{version}{half}", tmp_path / "out")
    assert (artifact.model_file, artifact.properties["opset"]) == ("model.onnx", str(opset))
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset]
    assert ("LayerNormalization" in {n.op_type for n in model.graph.node}) == (version != "8.5")
    weights = {i.data_type for i in model.graph.initializer if i.name.endswith("weight")}
    assert weights == {TensorProto.FLOAT16 if half else TensorProto.FLOAT}
    runner = get_backend(parse_target("tensorrt")).load(tmp_path / "out", stock=True)
    for batch in (2, 7):
        x = torch.randn(batch, 4, 6, 6)
        assert torch.allclose(runner(x)[0], program.module()(x), atol=1e-2 if half else 1e-5)


def test_packed_layers_are_inlined_where_the_parser_takes_no_functions(tmp_path):
    from slrc.forms.form import parse_form
    from slrc.pipeline import apply_forms

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight.view(2, 8, 36)[:, :, ::2] = 0
    x = torch.randn(1, 4, 6, 6)
    program = capture(model, (x,), "net")
    packed = apply_forms(program, {next(iter(program.layers)): parse_form("packed:8")})
    for version, has_functions in (("8.6", False), ("10.3", True)):
        lower(packed, f"tensorrt:{version}", tmp_path / version)
        onnx_model = onnx.load(tmp_path / version / "model.onnx")
        assert bool(onnx_model.functions) == has_functions
        got = OnnxRuntimeRunner(tmp_path / version / "model.onnx")(x)[0]
        assert torch.allclose(got, program.module()(x), atol=1e-5)


def test_a_dla_has_float16_and_a_fixed_batch(program, tmp_path):
    artifact = lower(program, "tensorrt:dla+10.3", tmp_path / "out")
    assert (artifact.precision, artifact.dynamic_batch, artifact.max_batch) == ("float16", False, 2)
    assert artifact.properties["batch_profile"] == "fixed"
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [2, 4, 6, 6]


@pytest.mark.parametrize(
    ("text", "multiple"),
    [("ort", 8), ("tensorrt", 8), ("tensorrt:10.3+fp16", 8), ("tensorrt-rtx:fp16", 8), ("tensorrt:dla", 32)],
)
def test_widths_are_rounded_to_what_the_target_likes(text, multiple):
    target = parse_target(text)
    assert get_backend(target).channel_multiple(target) == multiple


def test_an_engine_is_not_loaded_where_there_is_none(program, tmp_path):
    lower(program, "tensorrt:8.5", tmp_path / "out")
    with pytest.raises(BackendError, match="holds no engine: it is built on the device") as caught:
        get_backend(parse_target("tensorrt")).load(tmp_path / "out")
    assert "slrc deploy" in str(caught.value.hint)


# Layers with 2:4 weights


def two_of_four(*shape: int) -> np.ndarray:
    """Ones `(out, in, …)` of which along the inputs the first two of each four are zero."""
    weight = np.ones(shape, dtype=np.float32)
    weight.swapaxes(0, 1).reshape(-1, 4, shape[0], *shape[2:])[:, :2] = 0
    return weight


def saved(tmp_path: Path, nodes: list[onnx.NodeProto], **weights: np.ndarray) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_layers_with_two_of_four_weights_are_found_in_an_export(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 20)
    )
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight.copy_(torch.from_numpy(two_of_four(*layer.weight.shape)))
    export_onnx(capture(model, (torch.randn(1, 8, 6, 6),), "net"), tmp_path / "m.onnx")
    found = sparse_layers(tmp_path / "m.onnx")
    assert [(x.inputs, x.outputs, x.quantised) for x in found] == [(8, 12, False), (32, 20, False)]


@pytest.mark.parametrize(
    ("node", "weight"),
    [
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), two_of_four(12, 8)),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), two_of_four(12, 8).T),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), two_of_four(12, 8).T),
        (helper.make_node("Conv", ["x", "w"], ["y"]), two_of_four(12, 8, 3, 3)),
    ],
)
def test_the_input_channels_are_where_the_operator_has_them(node, weight, tmp_path):
    node.name = "layer"
    assert sparse_layers(saved(tmp_path, [node], w=weight)) == [SparseLayer("layer", 8, 12, False)]
    along_outputs = weight.swapaxes(0, 1)[:8, :8] if node.op_type == "Conv" else np.ascontiguousarray(weight.T)
    assert sparse_layers(saved(tmp_path, [node], w=np.ascontiguousarray(along_outputs))) == []


def test_a_weight_behind_a_transpose_is_turned(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], "l"),
    ]
    assert sparse_layers(saved(tmp_path, nodes, w=two_of_four(12, 8))) == [SparseLayer("l", 8, 12, False)]


def test_a_weight_that_is_quantised_is_told(tmp_path):
    scale, zero = np.ones((), dtype=np.float32), np.zeros((), dtype=np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Gemm", ["x", "d"], ["y"], "layer", transB=1),
    ]
    layers = sparse_layers(saved(tmp_path, nodes, w=two_of_four(256, 256), s=scale, z=zero))
    assert layers == [SparseLayer("layer", 256, 256, True)]
    assert ["Quantize" in text for text in warnings_of(layers, "int8")] == [True]


@pytest.mark.parametrize(
    "weight", [np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32), two_of_four(8, 8)[:, :6]]
)
def test_other_weights_are_not_two_of_four(weight, tmp_path):
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    assert sparse_layers(saved(tmp_path, [node], w=np.ascontiguousarray(weight))) == []


def test_each_warning_names_the_layers_it_is_for():
    wide, narrow = SparseLayer("wide", 256, 512, False), SparseLayer("narrow", 128, 512, False)
    assert warnings_of([], "float32") == []
    assert warnings_of([wide], "float16") == []
    (in_float32,) = warnings_of([wide], "float32")
    assert in_float32.startswith("wide has 2:4 weights in float32")
    (few,) = warnings_of([wide, narrow], "float16")
    assert few.startswith("narrow has 2:4 weights and fewer than 256 channels")
    assert warnings_of([narrow], "float16", dla=True) == []
    (dla,) = warnings_of([SparseLayer("thin", 64, 64, False)] * 5, "float16", dla=True)
    assert dla.startswith("thin, thin, thin and 2 more have 2:4 weights and fewer than 65 channels")


def test_the_compiled_model_carries_its_warnings(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(two_of_four(16, 8, 1, 1)))
    program = capture(model, (torch.randn(1, 8, 4, 4),), "net")
    assert len(lower(program, "tensorrt:10.3", tmp_path / "full").warnings) == 2
    assert len(lower(program, "tensorrt:10.3+fp16", tmp_path / "half").warnings) == 1
    assert Artifact.read(tmp_path / "half").warnings[0].startswith("node_conv2d has 2:4 weights and fewer than 256")


# What is read of an engine

NEW = """Layers:
Name: __myl_Cast_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,8], Datatype: Float, Format: (Linear) } \
], Constants: [], Outputs: [ { Name: a, Dimensions: [1,8], Datatype: Half, Format: (NHWC) }], TacticName: t
Name: conv_myl0_1, LayerType: correlation, Inputs: [ { Name: a, Datatype: Half }], Constants: [ { Name: c, Datatype: \
Float }], Outputs: [ { Name: b, Dimensions: [1,8], Datatype: Half, Format: (NHWC) }], TacticName: sm87_xmma
I/O Tensors:
 Name: x, IOMode: Input, DataType: Float"""
OLD = """Layers:
Name: conv1 + PWN(relu), LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, Dimensions: [1,8,4,4], \
Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: y, Location: Device, Dimensions: [1,8,4,4], \
Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], ParameterType: Convolution, TacticName: sm80_xmma
Bindings:
x"""
FOUND = "(Sparsity) Found 39 layer(s) eligible to use sparse tactics"
CHOSE = "(Sparsity) Chose {} layer(s) using sparse tactics"
OLD_SPARSITY = """(Sparsity) Layers eligible for sparse math: conv1, conv2 + relu2, conv3
(Sparsity) TRT inference plan picked sparse implementation for layers: conv2 + relu2, conv3"""


@pytest.mark.parametrize(
    ("layers", "log", "expected"),
    [
        (NEW, "", EngineSummary(layers=2, precisions={"float16": 2})),
        (
            NEW,
            f"{FOUND}\n{CHOSE.format(7)}\n{FOUND}: conv1, conv2\n{CHOSE.format(12)}: conv1",
            EngineSummary(layers=2, precisions={"float16": 2}, sparse_eligible=39, sparse_chosen=12),
        ),
        (
            OLD,
            OLD_SPARSITY,
            EngineSummary(layers=1, precisions={"float16": 1}, sparse_eligible=3, sparse_chosen=2),
        ),
        (
            OLD,
            f"{FOUND}\n{CHOSE.format(0)}",
            EngineSummary(layers=1, precisions={"float16": 1}, sparse_eligible=39, sparse_chosen=0),
        ),
        ("nothing of the kind", FOUND, None),
    ],
)
def test_layers_and_sparse_layers_are_read_in_the_words_of_each_version(layers, log, expected):
    assert summarise(layers, log) == expected


def test_a_summary_reads_well():
    summary = EngineSummary(layers=5, precisions={"float32": 1, "float16": 4})
    assert str(summary) == "5 layers (4 float16, 1 float32)"
    assert str(summary.model_copy(update={"sparse_eligible": 4, "sparse_chosen": 0})).endswith(
        "2:4: 4 eligible, 0 chosen"
    )


@pytest.mark.parametrize("gpu", [True, False])
def test_the_engine_is_asked_where_it_can_be_loaded_else_the_log_is_read(gpu, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(trt.ICudaEngine, "create_engine_inspector")
    assert hasattr(trt.EngineInspector, "get_engine_information")
    asked = SimpleNamespace(get_engine_information=lambda form: {trt.LayerInformationFormat.ONELINE: OLD}[form])
    loaded = SimpleNamespace(create_engine_inspector=lambda: asked) if gpu else None
    fake = SimpleNamespace(
        LayerInformationFormat=trt.LayerInformationFormat,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: loaded),
    )
    (tmp_path / "model.engine").write_bytes(b"engine")
    log = MessageLog()
    for text in ("Graph optimization time: 0.1 seconds.", NEW, FOUND, CHOSE.format(3)):
        log.record("VERBOSE", text)
    summary = inspect_engine(fake, tmp_path / "model.engine", log)
    assert summary is not None
    assert (summary.layers, summary.sparse_eligible, summary.sparse_chosen) == (1 if gpu else 2, 39, 3)
