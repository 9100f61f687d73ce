"""Packed layers in ONNX: with the kernels and in a stock runtime they compute what the program does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import slrc
from slrc.backends import Availability, parse_target
from slrc.backends.onnx_export import OPSET
from slrc.backends.ort import OnnxRuntime
from slrc.backends.packed_onnx import CONV, GEMM, MLP, POOL, UPSAMPLE, function_of, planes_function
from slrc.errors import BackendError
from slrc.forms.activations import ACTIVATIONS
from slrc.forms.form import DEPTHWISE, Form, FormKind
from slrc.ir.program import Program, capture
from slrc.kernels import build as kernels
from slrc.pipeline import apply_forms
from slrc.verify import compare, outputs_of

TOLERANCE = 1e-5


class Net(nn.Module):
    """Every activation, with and without a residual; convolutions of many kinds, a pool, matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        layers = range(2 * len(ACTIVATIONS))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=k % 2 == 0) for k in layers)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, dilation=2, padding=(2, 1), groups=2)
        self.depthwise = nn.Conv2d(24, 48, 3, padding=1, groups=24)
        self.uneven = nn.Conv2d(48, 20, (1, 3))
        self.tokens = nn.ModuleList(nn.Linear(20, 20, bias=k % 2 == 0) for k in layers)
        self.up, self.down, self.last = nn.Linear(20, 36), nn.Linear(36, 20), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for k, conv in enumerate(self.convs):
            act = list(ACTIVATIONS.values())[k // 2]
            x = act(conv(x) + x, 0.2) if k % 2 else act(conv(x), 0.2)
        y = functional.max_pool2d(self.uneven(self.depthwise(self.grouped(x))), 2)
        z = y.flatten(2).transpose(1, 2)
        for k, linear in enumerate(self.tokens):
            act = list(ACTIVATIONS.values())[k // 2]
            z = act(linear(z) + z, 0.2) if k % 2 else act(linear(z), 0.2)
        z = z + self.down(functional.gelu(self.up(z)))
        return y, self.last(functional.silu(self.up(z))[..., :20])


def sparse(model: nn.Module, rows: int = 4) -> nn.Module:
    """Zero three blocks of four, all of some rows, and all of one layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and name not in ("stem.weight", "depthwise.weight"):
                mask = torch.rand(p.shape[0] // rows, p[0].numel(), generator=generator) < 0.25
                mask[-1] &= "convs.3" not in name
                mask &= "convs.5" not in name
                p.mul_(mask.repeat_interleave(rows, dim=0).reshape(p.shape)).mul_(2.0)
    return model


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    masked = capture(sparse(Net()).eval(), (torch.randn(2, 3, 12, 11),))
    forms = {w: Form(FormKind.PACKED, 4 if k % 2 else 8) for k, w in enumerate(masked.layers) if w != "stem.weight"}
    forms["depthwise.weight"] = DEPTHWISE
    return apply_forms(masked, forms)


@pytest.fixture(scope="module")
def artifact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    try:
        return slrc.lower(program, "ort", folder).folder
    except BackendError as error:
        if "no C++ compiler" in error.message:
            pytest.skip(error.message)
        raise


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_computes_what_the_program_does(program: Program, artifact: Path, stock: bool, batch: int) -> None:
    x = torch.randn(batch, 3, 12, 11, generator=torch.Generator().manual_seed(1))
    runner = OnnxRuntime().load(artifact, threads=1, stock=stock)
    compare("program = ort", outputs_of(program.module(), (x,)), runner(x), TOLERANCE)


def test_the_kernels_run_and_a_stock_runtime_sees_dense_layers(artifact: Path, tmp_path: Path) -> None:
    for stock in (False, True):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        if not stock:
            options.register_custom_ops_library(str(next(artifact.glob("*.so"))))
        ort.InferenceSession(str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        assert sum(n.domain == "ai.slrc" for n in nodes) == (0 if stock else 7 + 4 * len(ACTIVATIONS))
        assert not {n.op_type for n in nodes} & {"ScatterND", "CumSum", "ScatterElements"}


def test_the_file_is_as_small_as_its_weights(program: Program, artifact: Path, tmp_path: Path) -> None:
    model = onnx.load(artifact / "model.onnx")
    assert {n.op_type.split("_")[0] for n in model.graph.node if n.domain == "ai.slrc"} == {CONV, GEMM, MLP, POOL}
    assert {f.domain for f in model.functions} == {"ai.slrc"}
    stored = sum(np.prod(i.dims) * 4 for i in model.graph.initializer)
    kept = sum(t.numel() * t.element_size() for t in program.tensors.values())
    assert stored == pytest.approx(kept, rel=0.05)


def test_a_transposed_convolution_is_a_packed_one_and_a_shuffle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.ConvTranspose2d(3, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3, 2, 1, 1)
    model = nn.Sequential(*layers, nn.Tanh(), nn.ConvTranspose2d(8, 8, 3, padding=1)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight *= (torch.rand(layer.weight[:, ::8].shape) < 0.5).repeat_interleave(8, dim=1)
    masked = capture(model, (torch.randn(2, 3, 5, 6),))
    formed = apply_forms(masked, dict.fromkeys(masked.layers, Form(FormKind.PACKED, 8)))
    try:
        folder = slrc.lower(formed, "ort", tmp_path).folder
    except BackendError as error:
        pytest.skip(error.message)
    nodes = [n.op_type.split("_")[0] for n in onnx.load(folder / "model.onnx").graph.node]
    assert (nodes.count(CONV), nodes.count("DepthToSpace"), nodes.count("ConvTranspose")) == (3, 2, 0)
    for stock in (False, True):
        runner = OnnxRuntime().load(folder, threads=1, stock=stock)
        compare("masked = ort", outputs_of(model, masked.example_inputs), runner(*masked.example_inputs), TOLERANCE)


def test_the_manifest_names_the_kernels(artifact: Path) -> None:
    manifest = slrc.backends.Artifact.read(artifact)
    assert manifest.kernels is not None
    assert (artifact / manifest.kernels).stat().st_size > 10_000


def test_kernels_that_are_gone_are_reported(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes())
    (tmp_path / "manifest.json").write_text((artifact / "manifest.json").read_text())
    with pytest.raises(BackendError, match="cannot load"):
        OnnxRuntime().load(tmp_path)
    assert OnnxRuntime().load(tmp_path, stock=True)(torch.randn(1, 3, 12, 11))


@pytest.mark.parametrize("op_type", [CONV, GEMM, MLP])
def test_every_function_is_valid_onnx(op_type: str) -> None:
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 10, {"": OPSET}
    for activation in ACTIVATIONS:
        for residual in (False, True):
            function = function_of(op_type, activation, residual, OPSET)
            assert function.domain == "ai.slrc"
            assert function.name.startswith(f"{op_type}_{activation}")
            onnx.checker.check_function(function, context)
    for op_type in (POOL, UPSAMPLE):
        onnx.checker.check_function(planes_function(op_type, OPSET), context)


def test_tensorrt_parses_it(artifact: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network()
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse((artifact / "model.onnx").read_bytes())
    assert parsed, [parser.get_error(k).desc() for k in range(parser.num_errors)]
    kinds = [network.get_layer(k).type for k in range(network.num_layers)]
    assert kinds.count(trt.LayerType.CONVOLUTION) == 4 + 2 * len(ACTIVATIONS)


def test_a_target_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, own, other = OnnxRuntime(), parse_target("ort:x86_64"), parse_target("ort:aarch64")
    assert other.folder == "ort-aarch64"
    for machine, here, elsewhere in (("x86_64", own, other), ("AMD64", own, other), ("arm64", other, own)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert backend.available(here) == backend.available(parse_target("ort")) == Availability("", "")
        assert backend.available(elsewhere).why_not_emit == ""
        expected = f"it is for {elsewhere.options[0]}, and this machine is {machine}"
        assert backend.available(elsewhere).why_not_run == expected
    with pytest.raises(BackendError, match="`ort` takes a processor, x86_64 or aarch64, `stock` and `int8`"):
        parse_target("ort:riscv64")


def test_a_stock_runtime_loads_no_kernels() -> None:
    target = parse_target("ort:stock")
    assert OnnxRuntime().available(target).why_not_run == ""
    assert "stock" in OnnxRuntime().why_not_packed(target)
    assert parse_target("ort:aarch64+stock").options == ("aarch64", "stock")


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_candidates", lambda family: iter([("no-such-compiler",)]))
    reason = OnnxRuntime().why_not_packed(parse_target("ort"))
    assert "no C++ compiler for" in reason
    assert "pip install ziglang" in reason


def test_other_runtimes_have_no_kernels() -> None:
    backend = slrc.backends.get_backend(parse_target("tensorrt-rtx"))
    assert "no kernels for packed blocks" in backend.why_not_packed(parse_target("tensorrt-rtx"))
