"""What is emitted in integers equals the program that rounds, within a step at every value; what does not is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from slrc import pipeline
from slrc.backends.onnx_export import export_onnx
from slrc.errors import VerificationError
from slrc.forms.quantization import ASYMMETRIC, SYMMETRIC, Scheme
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.passes.quantization.find_places import is_quantizable
from slrc.probes import make_probes
from slrc.quantization.choose import rounded_anyhow
from slrc.quantization.prove import prove_integers


class Chain(nn.Module):
    """A convolution, something, a convolution; then logits."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(channels, 8, 3, stride=2, groups=1)
        self.head = nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(torch.relu(self.first(x)))).mean((2, 3)))


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu6": (functional.relu6, 8),
    "max_pool": (lambda x: functional.max_pool2d(x, 2), 8),
    "avg_pool": (lambda x: functional.avg_pool2d(x, 2), 8),
    "adaptive_pool": (lambda x: functional.adaptive_avg_pool2d(x, 4), 8),
    "zero_pad": (lambda x: functional.pad(x, (0, 1, 0, 1)), 8),
    "pad_after_pool": (lambda x: functional.pad(functional.max_pool2d(x, 2), (1, 1, 1, 1)), 8),
    "pad_with_ones": (lambda x: functional.pad(x, (1, 1, 1, 1), value=1.0), 8),
    "residual": (lambda x: x + functional.max_pool2d(x, 3, 1, 1), 8),
    "gate": (lambda x: x * functional.max_pool2d(x, 3, 1, 1), 8),
    "concatenation": (lambda x: torch.cat([x, functional.max_pool2d(x, 3, 1, 1)], 1), 16),
    "gather": (lambda x: x.index_select(1, torch.tensor([7, 0, 3, 3])), 4),
    "slice": (lambda x: x[:, 2:6], 4),
    "split": (lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1), 8),
    "shuffle": (lambda x: x.reshape(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8), 8),
    "permute": (lambda x: x.permute(0, 1, 3, 2), 8),
    "upsample": (lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"), 8),
    "silu": (functional.silu, 8),
    "hardswish": (functional.hardswish, 8),
    "leaky_relu": (functional.leaky_relu, 8),
    "sigmoid_gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 8),
    "plus_one": (lambda x: x + 1.0, 8),
    "clamp": (lambda x: torch.clamp(x, -2.0, 3.0), 8),
}


def program_of(model: nn.Module, x: Tensor) -> Program:
    torch.manual_seed(0)
    return pipeline.baseline(capture(model.eval(), (x,)))


def proven(program: Program, scheme: Scheme, folder: Path) -> tuple[list[Any], Path, Program]:
    rounded = rounded_anyhow(program, scheme)
    export_onnx(rounded, folder / "model.onnx")
    checks = prove_integers("test", rounded, folder / "model.onnx", make_probes(program), 1)
    return checks, folder / "model.onnx", rounded


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)
@pytest.mark.parametrize("name", BETWEEN)
def test_operators_between_integer_layers(name: str, scheme: Scheme, tmp_path: Path) -> None:
    between, channels = BETWEEN[name]
    torch.manual_seed(0)
    program = program_of(Chain(between, channels), torch.randn(2, 4, 8, 8))
    checks, _, rounded = proven(program, scheme, tmp_path)
    assert checks[0].max_abs_error <= checks[0].tolerance == 1
    assert all(op_name(n.args[1]) == "fake_quantize" for n in rounded.nodes if op_name(n) in ("conv2d", "linear"))


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_linear_layers_on_sequences_and_vectors(scheme: Scheme, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    for x in (torch.randn(2, 8), torch.randn(2, 5, 8)):
        proven(program_of(mlp, x), scheme, tmp_path)


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.Conv2d(4, 4, 1, groups=2)]
)
def test_other_convolutions(conv: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 9) if isinstance(conv, nn.Conv1d) else torch.randn(2, 4, 9, 9)
    proven(program_of(nn.Sequential(conv, nn.ReLU()), x), ASYMMETRIC, tmp_path)


def test_a_layer_of_zeros_and_a_great_bias(tmp_path: Path) -> None:
    model = Chain(functional.relu6)
    with torch.no_grad():
        model.first.weight[:4] = 0
        model.second.weight.mul_(1e-9)
        model.second.bias.copy_(torch.linspace(-100, 100, 8))
    program = program_of(model, torch.randn(2, 4, 8, 8))
    _, _, rounded = proven(program, ASYMMETRIC, tmp_path)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        exact, found = model(x), rounded.module()(x)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("what", ["scale", "weight", "zero point"])
def test_a_file_that_rounds_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = program_of(Chain(lambda x: functional.max_pool2d(x, 2)), torch.randn(2, 4, 8, 8))
    _, file, rounded = proven(program, ASYMMETRIC, tmp_path)
    model = onnx.load(file)
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    by_name = {i.name: i for i in model.graph.initializer}
    chosen = by_name[quantizers[1].input[{"scale": 1, "zero point": 2}.get(what, 1)]]
    if what == "weight":
        chosen = next(i for n, i in by_name.items() if n.endswith("first.weight_integer"))
    array = numpy_helper.to_array(chosen).copy()
    array = array * np.float32(1.05) if what == "scale" else (array + np.array(9, array.dtype)).astype(array.dtype)
    chosen.CopyFrom(numpy_helper.from_array(array, chosen.name))
    onnx.save(model, file)
    with pytest.raises(VerificationError, match="check `test"):
        prove_integers("test", rounded, file, make_probes(program), 1)


SIZES = st.sampled_from([4, 8, 12])


@st.composite
def networks(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Draw a few blocks of a convolutional network."""
    kinds = st.sampled_from(["conv", "depthwise", "residual", "pool", "branches", "relu6", "silu", "pad"])
    return [(kind, draw(SIZES)) for kind in draw(st.lists(kinds, min_size=1, max_size=5))]


class Drawn(nn.Module):
    """Runs the blocks of `networks` on images of 4 channels."""

    def __init__(self, blocks: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.blocks, width = blocks, 4
        self.layers = nn.ModuleList()
        for kind, size in blocks:
            if kind == "depthwise":
                self.layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
            elif kind == "residual":
                self.layers.append(nn.Conv2d(width, width, 3, padding=1))
            elif kind in ("conv", "branches"):
                self.layers.append(nn.Conv2d(width, size, 3, padding=1, bias=kind == "conv"))
                width = size + (width if kind == "branches" else 0)
            else:
                self.layers.append(nn.Identity())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for (kind, _), layer in zip(self.blocks, self.layers, strict=True):
            y = layer(x)
            if kind == "residual":
                x = torch.relu(y + x)
            elif kind == "branches":
                x = torch.cat([torch.relu(y), x], 1)
            elif kind == "pool":
                x = functional.max_pool2d(x, 3, 1, 1)
            elif kind == "pad":
                x = functional.pad(x, (0, 1, 0, 1))
            elif kind in ("relu6", "silu"):
                x = getattr(functional, kind)(x)
            else:
                x = functional.relu(y) if kind == "conv" else y
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_random_networks(scheme: Scheme, tmp_path: Path) -> None:
    @seeded(0)
    @settings(
        max_examples=6, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(networks())
    def check(blocks: list[tuple[str, Any]]) -> None:
        note(str(blocks))
        torch.manual_seed(len(blocks))
        program = program_of(Drawn(blocks), torch.randn(2, 4, 8, 8))
        proven(program, scheme, tmp_path)
        layers = [n for n in program.graph_module.graph.nodes if is_quantizable(n)]
        codes = [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "DequantizeLinear"]
        assert len(codes) >= 2 * len(layers)

    check()
