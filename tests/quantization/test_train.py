"""Quantisation-aware training: scales and weights move, zeros stay, and the file has exactly what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import slrc
from slrc import pipeline
from slrc.backends.onnx_export import export_onnx
from slrc.config import make_config
from slrc.forms.quantization import ASYMMETRIC
from slrc.forms.quantize_ops import fake_quantize
from slrc.options import Int8Settings
from slrc.passes.quantization.insert_quantizers import QuantizeBiases
from slrc.probes import make_probes
from slrc.quantization.choose import Quantized, quantize
from slrc.quantization.prove import prove_integers
from slrc.quantization.train import train_rounded
from slrc.reconstruction.calibration import calibration_inputs

MakeWorkload = Callable[..., slrc.Workload]


def quantized(workload: slrc.Workload, settings: Int8Settings | None = None) -> tuple[Any, Quantized]:
    program = pipeline.baseline(slrc.capture(workload))
    with torch.no_grad():
        program.tensors["conv2.weight"][:8, ::2] = 0
    inputs = calibration_inputs(program, workload, 48, 0)
    return program, quantize(program, ASYMMETRIC, inputs, settings or Int8Settings(), skip=("none",), logits=True)


def test_what_is_trained_is_what_is_emitted(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    workload = tiny_workload()
    program, found = quantized(workload)
    before = found.program(biases=False)
    config = make_config({"target": "ort+int8", "epochs": 3, "retrain_epochs": 1, "qat_epochs": 2})
    after, trained = train_rounded(before, workload, config, program.module())
    assert [r.epoch for r in trained.curve if r.phase == "retrain"] == [1, 2]  # none of those that prune
    assert torch.equal(before.tensors["conv2.weight"] == 0, after.tensors["conv2.weight"] == 0)
    scales = [n for n in after.tensors if n.endswith("scale")]
    moved = [n for n in scales if not torch.equal(before.tensors[n], after.tensors[n])]
    assert len(moved) == len(scales) >= 8
    emitted = QuantizeBiases()(after).program
    export_onnx(emitted, tmp_path / "model.onnx")
    prove_integers("trained", emitted, tmp_path / "model.onnx", make_probes(program), 1)
    stored = [numpy_helper.to_array(i) for i in onnx.load(tmp_path / "model.onnx").graph.initializer]
    for name in scales:
        own = after.tensors[name].numpy()
        assert any(x.shape == own.shape and (x == own).all() for x in stored), name


def test_fixed_scales_stay(tiny_workload: MakeWorkload) -> None:
    workload = tiny_workload()
    program, found = quantized(workload)
    before = found.program(biases=False)
    config = make_config({"target": "ort+int8", "qat_epochs": 1, "int8": {"learn_scales": False}})
    after, _ = train_rounded(before, workload, config, program.module())
    assert all(torch.equal(before.tensors[n], after.tensors[n]) for n in after.tensors if n.endswith("scale"))
    assert not torch.equal(before.tensors["conv3.weight"], after.tensors["conv3.weight"])


def test_gradients_go_straight_through_and_to_the_scale() -> None:
    x = torch.tensor([-3.0, -0.26, 0.1, 0.26, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = fake_quantize(x, scale, 0, 0, -4, 4)
    assert y.tolist() == [-2.0, -0.5, 0.0, 0.5, 2.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    # Clipped ones give the ends, others what rounding added: −4 + (−1 + 0.52) + (0 − 0.2) + (1 − 0.52) + 4.
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(-0.2 / (5 * 4) ** 0.5, abs=1e-6)
