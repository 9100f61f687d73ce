"""Ranges, rewrites and layers in float: what is tried, what is taken, and that rewrites compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc import pipeline
from slrc.errors import ConfigError, WorkloadError
from slrc.forms.form import FLOAT32, Form, FormKind, parse_form
from slrc.forms.quantization import ASYMMETRIC, SYMMETRIC, Range
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.options import Int8Settings
from slrc.quantization.choose import quantize
from slrc.quantization.equalize import corrected_biases, equalized
from slrc.quantization.observe import Observed, observe
from slrc.quantization.ranges import RangeMethod, range_of

MakeWorkload = Callable[..., slrc.Workload]


class Projected(nn.Module):
    """A residual block whose shortcut is a layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x) + self.b(x)).mean((2, 3)))


class Uneven(nn.Module):
    """Two layers whose channels in between differ by a factor of a thousand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def uneven() -> tuple[Program, list[list[Tensor]]]:
    torch.manual_seed(0)
    model, factor = Uneven().eval(), torch.logspace(-1.5, 1.5, 8)
    with torch.no_grad():
        model.first.weight.mul_(factor.reshape(-1, 1, 1, 1))
        model.first.bias.mul_(factor)
        model.second.weight.div_(factor.reshape(1, -1, 1, 1))
    return pipeline.baseline(capture(model, (torch.randn(2, 4, 8, 8),))), [
        [x] for x in torch.randn(32, 4, 8, 8).split(4)
    ]


def observed(values: Tensor, bins: int = 512) -> Observed:
    low, high = float(values.min()), float(values.max())
    return Observed(Range(min(low, 0.0), high), torch.histc(values, bins, min(low, 0.0), high).double(), None, None)


def test_ranges_of_a_value_with_an_outlier() -> None:
    values = torch.cat([torch.linspace(0, 1, 9999), torch.tensor([100.0])])
    seen = observed(values)
    assert range_of(seen, RangeMethod.MINMAX, ASYMMETRIC, 99.99) == Range(0.0, 100.0)
    assert range_of(seen, RangeMethod.PERCENTILE, ASYMMETRIC, 99.9).high < 2
    assert 0.5 < range_of(seen, RangeMethod.MSE, ASYMMETRIC, 99.9).high <= 100


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_zero_is_exact_and_a_constant_has_a_scale(scheme: Any) -> None:
    for limits in (Range(0.0, 0.0), Range(-1.0, 3.0), Range(2.0, 3.0), Range(-5.0, -4.0)):
        scale, zero_point = scheme.scale_of(limits)
        assert float(scale) > 0
        assert scheme.lowest <= zero_point <= scheme.highest


def test_equalised_channels_compute_the_same_and_lose_less(uneven: Any) -> None:
    program, inputs = uneven
    names = {n.name for n in program.nodes if op_name(n) == "relu"} | {"x"}
    tensors = equalized(program, observe(program, names, inputs))
    assert {"first.weight", "first.bias", "second.weight"} <= tensors.keys()
    other = program.with_tensors(tensors)
    torch.testing.assert_close(other.module()(*inputs[0]), program.module()(*inputs[0]), rtol=1e-4, atol=1e-5)
    found = quantize(program, ASYMMETRIC, inputs, Int8Settings(), skip=("none",))
    assert found.calibration.equalized
    assert found.calibration.loss < 0.5 * min(found.calibration.tried[m] for m in RangeMethod)


def test_a_bias_makes_up_for_rounded_weights(uneven: Any) -> None:
    program, inputs = uneven
    seen = observe(program, {"x", "relu", "relu_1", "mean"}, [[x.abs() + 1] for batch in inputs for x in batch])
    tensors = corrected_biases(program, seen, ("head.weight",))
    assert tensors.keys() == {"first.bias", "second.bias"}
    assert not torch.equal(tensors["first.bias"], program.tensors["first.bias"])


def test_a_layer_in_float_keeps_its_own_bias() -> None:
    torch.manual_seed(0)
    model = Uneven().eval()
    with torch.no_grad():
        for layer in (model.first, model.second, model.head):  # what is lost of small weights of one sign adds up
            layer.weight.uniform_(0, 0.02)
            layer.weight.flatten(1)[:, 0] = 1.0
    program = pipeline.baseline(capture(model, (torch.rand(2, 4, 8, 8),)))
    inputs = [[x] for x in torch.rand(16, 4, 8, 8).split(4)]
    settings = Int8Settings(equalize=False, correct_bias=True, ranges="minmax")
    whole = quantize(program, ASYMMETRIC, inputs, settings, skip=("none",)).calibration
    asked = settings.model_copy(update={"loss": 0.5 * whole.loss})
    found = quantize(program, ASYMMETRIC, inputs, asked)
    assert 0 < len(found.spared) < 3
    for name in ("first", "second", "head"):
        changed = not torch.equal(found.source.tensors[f"{name}.bias"], program.tensors[f"{name}.bias"])
        assert changed == (f"{name}.weight" not in found.spared)
    layers = found.calibration.layers
    for layer in layers:  # what one alone does is measured without the others' corrections
        others = [x.name for x in layers if x is not layer]
        alone = quantize(program, ASYMMETRIC, inputs, settings, skip=others).calibration
        assert layer.loss == pytest.approx(alone.loss)


@pytest.mark.parametrize(("share", "left"), [(0.5, 1), (1e-9, 0)])
def test_as_many_layers_stay_in_float_as_it_takes(share: float, left: int, uneven: Any) -> None:
    program, inputs = uneven
    settings = Int8Settings(equalize=False, correct_bias=False, ranges="minmax")
    whole = quantize(program, ASYMMETRIC, inputs, settings, skip=("none",)).calibration.loss
    asked = settings.model_copy(update={"loss": share * whole})
    found = quantize(program, ASYMMETRIC, inputs, asked)
    layers = found.calibration.layers
    assert found.calibration.loss <= asked.loss
    assert found.calibration.quantized_layers == left
    assert {x.name for x in layers} == {"first", "second", "head"}
    assert [x.loss for x in layers] == sorted((x.loss for x in layers), reverse=True)
    assert {f"{x.name}.weight" for x in layers[: 3 - left]} == set(found.calibration.skipped)
    rounded = [n for n in found.program().nodes if op_name(n) in ("conv2d", "linear")]
    in_float = {str(n.args[1].target) for n in rounded if n.args[1].op == "get_attr"}  # type: ignore[union-attr]
    assert in_float == set(found.calibration.skipped)


@pytest.mark.parametrize(("skip", "left"), [(("none",), 3), (("second",), 2), (("*",), 0), (("f*", "head"), 1)])
def test_layers_that_are_named_stay_in_float(uneven: Any, skip: Sequence[str], left: int) -> None:
    program, inputs = uneven
    found = quantize(program, ASYMMETRIC, inputs[:2], Int8Settings(ranges="minmax"), skip=tuple(skip))
    assert found.calibration.quantized_layers == left


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)
@pytest.mark.parametrize("in_float", ["a", "b"])
def test_one_of_two_layers_that_are_added_stays_in_float(scheme: Any, in_float: str) -> None:
    torch.manual_seed(0)
    program = pipeline.baseline(capture(Projected().eval(), (torch.randn(2, 4, 8, 8),)))
    packed = Form(FormKind.PACKED_INT8, 4)
    forms = {"a.weight": packed, "b.weight": packed, f"{in_float}.weight": FLOAT32}
    found = quantize(program, scheme, [[torch.randn(4, 4, 8, 8)]], Int8Settings(), skip=("none",), forms=forms)
    assert found.calibration.skipped == (f"{in_float}.weight",)
    assert found.calibration.loss < 0.1


@pytest.mark.parametrize(("form", "parts"), [("split:2", 2), ("grouped:2", 1)])
def test_a_split_layer_is_one_layer_and_has_its_own_name(form: str, parts: int, uneven: Any) -> None:
    program, inputs = uneven
    weight = program.tensors["second.weight"].clone()
    weight[:4, ::2], weight[4:, 1::2] = 0, 0
    forms = {"second.weight": parse_form(form)}
    split = pipeline.split_layers(program.with_tensors({"second.weight": weight}), forms)
    settings = Int8Settings(equalize=False, correct_bias=False, ranges="minmax", loss=1e-15)
    named = quantize(split, ASYMMETRIC, inputs, settings, skip=("second",), forms=forms)
    assert named.spared == named.calibration.skipped == ("second.weight",)
    assert named.calibration.quantized_layers == 2
    assert len(named.quantization.skipped) == parts
    assert not {"second.weight"} & set(named.quantization.skipped)
    found = quantize(split, ASYMMETRIC, inputs, settings, forms=forms)
    assert {x.name for x in found.calibration.layers} == {"first", "second", "head"}
    assert "second.weight" in found.spared


def test_a_name_of_no_layer(uneven: Any) -> None:
    program, inputs = uneven
    with pytest.raises(ConfigError, match="`--int8-skip third` names no layer") as caught:
        quantize(program, ASYMMETRIC, inputs[:1], Int8Settings(), skip=("third",))
    assert "first" in str(caught.value.hint)


def test_values_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    program = capture(model, (torch.ones(2, 2),))
    with pytest.raises(WorkloadError, match="is not finite on the calibration data"):
        quantize(program, ASYMMETRIC, [[torch.full((2, 2), float("inf"))]], Int8Settings())
