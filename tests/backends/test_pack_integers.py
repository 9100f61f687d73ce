"""Int8 layers with packed blocks, as they are emitted: which nodes, what goes into them, and that they are right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slrc import pipeline
from slrc.backends import get_backend, parse_target
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.errors import VerificationError
from slrc.forms.form import Form, FormKind
from slrc.forms.quantization import ASYMMETRIC
from slrc.ir.program import Program, capture
from slrc.probes import make_probes
from slrc.quantization.choose import rounded_anyhow
from slrc.quantization.prove import prove_integers

INT8 = parse_target("ort+int8")
pytestmark = pytest.mark.skipif(bool(get_backend(INT8).why_not_packed(INT8)), reason="needs a C++ compiler")


class Many(nn.Module):
    """Layers of every kind: windows, groups, no bias, one that is called twice, additions, tokens and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.twice = nn.Conv2d(16, 16, 1)
        self.down, self.main = nn.Conv2d(16, 24, 1, stride=2), nn.Conv2d(16, 24, (3, 1), stride=2, padding=(1, 0))
        self.up, self.head = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = functional.relu6(self.grouped(self.wide(x)) + x)
        x = self.twice(self.twice(x))
        x = torch.relu(self.main(x) + self.down(x))
        tokens = functional.gelu(self.up(x.flatten(2).transpose(1, 2)))
        return self.head(tokens.mean(1))


def network(model: nn.Module, *sizes: int) -> Program:
    return pipeline.baseline(capture(model.eval(), (torch.randn(*sizes),)))


def packed(program: Program, rows: int, kind: FormKind = FormKind.PACKED_INT8) -> dict[str, Form]:
    weights = [name for name, layer in program.layers.items() if layer.name != "first"]
    return {name: Form(kind, rows) for name in weights}


def emitted(program: Program, forms: dict[str, Form], folder: Path) -> tuple[Program, Path, Path]:
    """Return the rounding program, its file, and its kernels."""
    rounded = pipeline.pack_layers(rounded_anyhow(program, ASYMMETRIC, forms), forms)
    artifact = get_backend(INT8).lower(rounded, INT8, folder, portable=False)
    assert artifact.kernels is not None
    return rounded, folder / "model.onnx", folder / artifact.kernels


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path, Path]:
    torch.manual_seed(0)
    program = network(Many(), 2, 3, 14, 15)
    return emitted(program, packed(program, 8), tmp_path_factory.mktemp("many"))


def test_every_layer_becomes_a_node_with_what_follows_it(many: tuple[Program, Path, Path]) -> None:
    nodes = Counter(n.op_type for n in onnx.load(many[1]).graph.node)
    assert {name: count for name, count in nodes.items() if name.startswith("BlockSparseQ")} == {
        "BlockSparseQConv": 4,  # wide, twice two times, down
        "BlockSparseQConv_residual": 2,  # grouped, main
        "BlockSparseQGemm_float": 2,  # what is rounded next is a GELU's; logits
    }
    assert (nodes["Conv"], nodes["MatMul"], nodes["Gemm"], nodes["Add"], nodes["Relu"]) == (1, 0, 0, 0, 0)


def test_it_is_proven_step_by_step_and_the_functions_give_the_same_bits(many: tuple[Program, Path, Path]) -> None:
    program, file, kernels = many
    steps, outputs, alike = prove_integers("test", program, file, make_probes(program), 1, kernels)
    assert steps.max_abs_error <= 1
    assert "8 nodes of slrc" in alike.step
    (plain,) = OnnxRuntimeRunner(file, 1)(*program.flat_inputs())
    (fast,) = OnnxRuntimeRunner(file, 1, kernels)(*program.flat_inputs())
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
    assert outputs.max_rel_error < 1e-4


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_kernel_that_returns_something_else_is_found(
    everywhere: bool, many: tuple[Program, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, file, kernels = many
    init, call = OnnxRuntimeRunner.__init__, OnnxRuntimeRunner.__call__

    def marked(self: Any, path: Path, threads: int | None = None, kernels: Path | None = None) -> None:
        init(self, path, threads, kernels)
        self.is_stock = kernels is None

    def off_by_one(self: Any, *inputs: Tensor) -> list[Tensor]:
        found = call(self, *inputs)
        shown = [k for k, t in enumerate(found) if t.dtype == torch.uint8 and (everywhere or t.shape[1] == 24)]
        for k in shown if everywhere else shown[:1]:
            found[k] = found[k] ^ 1 if self.is_stock else found[k]
        return found

    monkeypatch.setattr(OnnxRuntimeRunner, "__init__", marked)
    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", off_by_one)
    with pytest.raises(VerificationError, match=r"the kernel that computes .* differs from what the file says"):
        prove_integers("test", program, file, make_probes(program)[:1], 1, kernels)


class Small(nn.Module):
    """A residual block between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.b, self.c = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.c(torch.relu(self.b(x) + x))


def test_packed_layers_in_both_types_stand_beside_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = network(Small(), 1, 4, 8, 8)
    forms = {"b.weight": Form(FormKind.PACKED, 8), "c.weight": Form(FormKind.PACKED_INT8, 4)}
    rounded, file, kernels = emitted(program, forms, tmp_path)
    ops = [n.op_type for n in onnx.load(file).graph.node]
    assert "BlockSparseConv_relu_residual" in ops
    assert "BlockSparseQConv" in ops
    steps, *_ = prove_integers("test", rounded, file, make_probes(program), 1, kernels)
    assert steps.max_abs_error <= 1


def test_a_network_all_in_float32_rounds_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = network(Small(), 1, 4, 8, 8)
    forms = {name: Form(FormKind.FLOAT32) for name in program.layers}
    rounded = rounded_anyhow(program, ASYMMETRIC, forms)
    artifact = get_backend(INT8).lower(rounded, INT8, tmp_path)
    assert artifact.kernels is None
    assert not {"QuantizeLinear", "DequantizeLinear"} & {
        n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node
    }
    steps, *_ = prove_integers("test", rounded, tmp_path / "model.onnx", make_probes(program), 1)
    assert "0 rounded values" in steps.step


class Stem(nn.Module):
    """A first layer, pools of several kinds behind it, and a depthwise layer."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.image, self.pool = nn.Conv2d(3, 16, 7, stride=2, padding=3), pool
        self.depthwise, self.last = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.relu6(self.depthwise(self.pool(torch.relu(self.image(x))))))


@pytest.mark.parametrize(
    ("pool", "own"),
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d((2, 3), (2, 1)), True),
        (nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)), True),
        (nn.MaxPool2d(3, (65, 1), 1), False),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.MaxPool2d(3, 2, 1, dilation=2), False),
        (nn.AvgPool2d(2), False),
    ],
)
def test_pools_between_packed_layers_stay_in_their_layout(pool: nn.Module, own: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = network(Stem(pool), 2, 3, 27, 30)
    forms = {w: Form(FormKind.PACKED_INT8, 1 if x.groups > 1 else 8) for w, x in program.layers.items()}
    rounded, file, kernels = emitted(program, forms, tmp_path)
    nodes = Counter(n.op_type for n in onnx.load(file).graph.node)
    count = len(pool) if isinstance(pool, nn.Sequential) else 1
    assert nodes["MaxPoolBytes"] == (count if own else 0)
    assert nodes["BlockSparseQConv"] + nodes["BlockSparseQConv_float"] == 3
    steps, *_ = prove_integers("test", rounded, file, make_probes(program), 1, kernels)
    assert steps.max_abs_error <= 1


class Leaky(nn.Module):
    """LeakyReLUs behind a layer, behind an addition, behind a pool, and before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.a(x), 0.1)
        x = functional.leaky_relu(self.b(x) + x)
        return functional.leaky_relu(self.c(functional.max_pool2d(x, 2)), 0.2)


def test_a_leaky_relu_behind_a_packed_layer_goes_into_its_node(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = network(Leaky(), 2, 3, 12, 14)
    forms = {w: Form(FormKind.PACKED_INT8, 4) for w in program.layers}
    rounded, file, kernels = emitted(program, forms, tmp_path)
    nodes = onnx.load(file).graph.node
    counts = Counter(n.op_type for n in nodes)
    assert (counts["BlockSparseQConv_leakyrelu"], counts["BlockSparseQConv_leakyrelu_residual"]) == (2, 1)
    assert (counts["MaxPoolBytes"], counts["LeakyRelu"]) == (1, 0)
    assert sorted(a.f for n in nodes for a in n.attribute if a.name == "slope") == pytest.approx([0.01, 0.1, 0.2])
    steps, *_ = prove_integers("test", rounded, file, make_probes(program), 1, kernels)
    assert steps.max_abs_error <= 1
