"""What every backend that reads ONNX shares."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from slrc.backends import onnx_export
from slrc.ir.program import capture


def test_torchs_translations_are_read_once_and_left_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    own = ONNXRegistry.from_torchlib

    def counted(opset_version: int) -> ONNXRegistry:
        read.append(opset_version)
        return own(opset_version)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    monkeypatch.setattr(onnx_export, "_TRANSLATIONS", {})
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.randn(2, 4),))
    for name in ("first", "second"):
        onnx_export.export_onnx(program, tmp_path / f"{name}.onnx")
    assert read == [onnx_export.OPSET]
    assert ONNXRegistry.from_torchlib is counted
    first, second = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("first", "second"))
    assert [n.op_type for n in first.node] == [n.op_type for n in second.node]
    (kept,) = onnx_export._TRANSLATIONS.values()
    assert not [x for translations in kept.functions.values() for x in translations if x.is_custom]
