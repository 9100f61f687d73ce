"""Writing ONNX models in older opsets, in fewer operators: what comes out computes the same, and is in that opset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from slrc.backends.onnx_export import export_onnx
from slrc.backends.onnx_opset import rewrite_opset
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.backends.tensorrt.precision import convert_to_float16
from slrc.errors import BackendError
from slrc.ir.program import Program, capture


class Reductions(nn.Module):
    """Operators that opset 18 has changed: reductions, a split in equal parts, a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.conv(x).chunk(2, 1)
        y = nn.functional.interpolate(a * b, scale_factor=2.0, mode="bilinear")
        return y.mean((2, 3)) + y.amax((2, 3)) + y.amin(1, keepdim=True).mean((2, 3))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.plain = nn.LayerNorm(16, elementwise_affine=False, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(nn.functional.gelu(self.up(self.norm(x))))


def exported(model: nn.Module, x: torch.Tensor, path: Path, opset: int = 18) -> Program:
    program = capture(model, (x,), "net")
    export_onnx(program, path, opset)
    return program


def opset_of(path: Path) -> int:
    return next(o.version for o in onnx.load(path).opset_import if o.domain == "")


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def test_opset_17_has_axes_as_attributes_and_computes_the_same(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    program = exported(Reductions(), x, tmp_path / "m.onnx")
    assert any(len(n.input) == 2 for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "ReduceMean")
    rewrite_opset(tmp_path / "m.onnx", 17)
    model = onnx.load(tmp_path / "m.onnx")
    reductions = [n for n in model.graph.node if n.op_type.startswith("Reduce")]
    assert {n.op_type for n in reductions} >= {"ReduceMean", "ReduceMax", "ReduceMin"}
    assert all(len(n.input) == 1 and "axes" in {a.name for a in n.attribute} for n in reductions)
    assert (opset_of(tmp_path / "m.onnx"), model.ir_version) == (17, 8)
    for batch in (x, torch.randn(5, 3, 8, 8)):
        got = OnnxRuntimeRunner(tmp_path / "m.onnx")(batch)[0]
        assert torch.allclose(got, program.module()(batch), atol=1e-5)


@pytest.mark.parametrize(("opset", "ir_version"), [(20, 9), (21, 10)])
def test_a_newer_opset_stays_with_the_oldest_ir_version_that_has_it(opset, ir_version, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    program = exported(Reductions(), x, tmp_path / "m.onnx", opset)
    rewrite_opset(tmp_path / "m.onnx", opset)
    assert (opset_of(tmp_path / "m.onnx"), onnx.load(tmp_path / "m.onnx").ir_version) == (opset, ir_version)
    assert torch.allclose(OnnxRuntimeRunner(tmp_path / "m.onnx")(x)[0], program.module()(x), atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_layer_norm_in_parts_computes_the_same_in_float32(half, tmp_path):
    torch.manual_seed(0)
    # Float16 would lose the square of such values.
    x = 400 * torch.randn(2, 5, 8)
    program = exported(Norm(), x, tmp_path / "m.onnx")
    if half:
        convert_to_float16(tmp_path / "m.onnx")
    assert "LayerNormalization" in operators(tmp_path / "m.onnx")
    rewrite_opset(tmp_path / "m.onnx", 17, split_layer_norm=True)
    assert not operators(tmp_path / "m.onnx") & {"LayerNormalization", "Gelu"}
    got = OnnxRuntimeRunner(tmp_path / "m.onnx")(x)[0]
    assert torch.allclose(got, program.module()(x), atol=2e-2 if half else 1e-5)


def test_functions_are_inlined(tmp_path):
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets
    )
    graph = helper.make_graph([helper.make_node("Twice", ["x"], ["y"], domain="local")], "g", *values())
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    rewrite_opset(tmp_path / "m.onnx", 17, inline=True)
    model = onnx.load(tmp_path / "m.onnx")
    assert (list(model.functions), operators(tmp_path / "m.onnx")) == ([], {"Add"})
    assert OnnxRuntimeRunner(tmp_path / "m.onnx")(torch.ones(1, 4))[0].tolist() == [[2.0] * 4]


def test_a_batch_can_be_fixed(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    program = exported(Reductions(), x, tmp_path / "m.onnx")
    rewrite_opset(tmp_path / "m.onnx", 18, batches={"x": 2})
    graph = onnx.load(tmp_path / "m.onnx").graph
    dims = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert dims == [[2, 3, 8, 8], [2, 4]]
    assert torch.allclose(OnnxRuntimeRunner(tmp_path / "m.onnx")(x)[0], program.module()(x), atol=1e-5)


def values() -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    return [x], [y]


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (helper.make_node("Gelu", ["x"], ["y"]), "Gelu"),
        (helper.make_node("ReduceMax", ["x", "computed"], ["y"]), "ReduceMax"),
        (helper.make_node("ScatterElements", ["x", "i", "x"], ["y"], axis=1, reduction="max"), "ScatterElements"),
    ],
)
def test_what_opset_17_does_not_have_is_named(node, says, tmp_path):
    computed = helper.make_node("Shape", ["x"], ["computed"])
    index = numpy_helper.from_array(np.zeros((1, 4), dtype=np.int64), "i")
    graph = helper.make_graph([computed, node], "g", *values(), initializer=[index])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BackendError, match=rf"cannot be written in opset 17: .*{says}") as caught:
        rewrite_opset(tmp_path / "m.onnx", 17)
    assert caught.value.hint
