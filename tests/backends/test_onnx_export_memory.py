"""Exports that spare a trace: the same model, value by value, as without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import slrc
from slrc.backends import onnx_export, onnx_export_memory
from slrc.backends.onnx_export import export_onnx
from slrc.ir.program import Program


class Mixed(nn.Module):
    """Integers and floats meet, and a number stands where a tensor could."""

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(x.shape[-1])
        return (x * count + 1).clamp(min=0) / 3 + x.double()


class Named(nn.Module):
    """Names of Python's functions, of an input and of what is returned."""

    def forward(self, input: Tensor, slice: Tensor) -> tuple[Tensor, Tensor]:
        return input.sum(1), (input * slice).abs()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x) + x, self.conv(x).split(2, 1)[1]], 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.own(x, x, x, need_weights=False)[0])


def images(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), *layers), torch.randn(2, 4, 12, 12)


CASES = {
    "pool to one": images(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    "pool to two": images(nn.AdaptiveAvgPool2d(2)),
    "activations": images(nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.PReLU(), nn.Sigmoid()),
    "transposed": images(nn.ConvTranspose2d(8, 4, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")),
    "pixels": images(nn.PixelShuffle(2), nn.MaxPool2d(2), nn.ZeroPad2d(1)),
    "mixed types": (Mixed(), torch.randn(2, 5)),
    "residual": (Residual(), torch.randn(2, 4, 6, 6)),
    "attention": (Attention(), torch.randn(2, 5, 16)),
}


def test_names_of_pythons_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    captured = slrc.capture(slrc.Workload(model=Named().eval(), example_inputs=(x, x)))
    for program in (captured, captured.rewrite(lambda module: True)[0]):
        spared = exported(program, tmp_path / "spared.onnx")
        assert [value.name for value in onnx.load(tmp_path / "spared.onnx").graph.input] == ["input", "slice"]
        with monkeypatch.context() as patched:
            patched.setattr(onnx_export, "spared", nothing_spared)
            assert spared == exported(program, tmp_path / "plain.onnx")


@contextmanager
def nothing_spared() -> Iterator[None]:
    yield


def shape_of(path: Path) -> list[Any]:
    """Return all of a model but the names of its values: nodes in order, with what and where their inputs are from."""
    model = onnx.load(path)
    numbers: dict[str, Any] = {"": None}
    for value in model.graph.input:
        numbers[value.name] = value.SerializeToString()
    for constant in model.graph.initializer:
        numbers[constant.name] = (tuple(constant.dims), constant.data_type, constant.raw_data)
    nodes = []
    for node in model.graph.node:
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        nodes.append((node.domain, node.op_type, [numbers[x] for x in node.input], attributes))
        numbers |= {name: (len(nodes), place) for place, name in enumerate(node.output)}
    return [*nodes, [(numbers[x.name], x.type.SerializeToString()) for x in model.graph.output]]


def exported(program: Program, path: Path) -> list[Any]:
    export_onnx(program, path)
    return shape_of(path)


@pytest.mark.parametrize("case", CASES)
def test_a_spared_trace_changes_nothing_but_names(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = CASES[case]
    program = slrc.capture(slrc.Workload(model=module.eval(), example_inputs=(x,)))
    before = str(program.exported.graph)
    spared = exported(program, tmp_path / "spared.onnx")
    assert str(program.exported.graph) == before
    monkeypatch.setattr(onnx_export, "spared", nothing_spared)
    assert spared == exported(program, tmp_path / "plain.onnx")


def test_operators_that_onnx_has_are_not_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _fx_passes

    traced = []
    own = _fx_passes.decompose_with_registry
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", lambda p, r: traced.append(p) or own(p, r))
    for case in ("pool to one", "pool to two"):
        module, x = CASES[case]
        export_onnx(slrc.capture(slrc.Workload(model=module.eval(), example_inputs=(x,))), tmp_path / "model.onnx")
        assert len(traced) == (case == "pool to two")


def test_torchs_translations_are_read_once_and_left_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    own = ONNXRegistry.from_torchlib

    def counted(opset_version: int) -> ONNXRegistry:
        read.append(opset_version)
        return own(opset_version)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    monkeypatch.setattr(onnx_export_memory, "_TRANSLATIONS", {})
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    program = slrc.capture(slrc.Workload(model=module, example_inputs=(torch.randn(2, 4),)))
    for name in ("first", "second"):
        export_onnx(program, tmp_path / f"{name}.onnx")
    assert read == [onnx_export.OPSET]
    assert ONNXRegistry.from_torchlib is counted
    first, second = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("first", "second"))
    assert [n.op_type for n in first.node] == [n.op_type for n in second.node]
    (kept,) = onnx_export_memory._TRANSLATIONS.values()
    assert not [x for translations in kept.functions.values() for x in translations if x.is_custom]
