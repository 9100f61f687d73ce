"""Int8 nodes that cannot be run are refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from int8_layers import QLayer, qmodel, quantized_weight
from kernel_models import session, set_attributes
from onnx import helper, numpy_helper

from slrc.kernels.build import build

HUGE = 2**62


def layer(shape: tuple[int, ...] = (16, 8, 3, 3)) -> QLayer:
    random = np.random.default_rng(0)
    conv = len(shape) == 4
    return QLayer(
        block=8,
        weight=quantized_weight(random, shape, 8, 0.5),
        x=random.integers(0, 256, (1, 8, 9, 9) if conv else (5, 8)).astype(np.uint8),
        bias=np.zeros(shape[0], np.int32),
        scale=np.full(shape[0], 1e-3, np.float32),
        residual=np.zeros((1, 16, 7, 7) if conv else (5, 16), np.uint8),
        slope=0.5,
    )


def changed(given: QLayer, attributes: dict[str, Any], tensors: dict[str, Any], drop: str = "") -> onnx.ModelProto:
    """Return the layer's model with other attributes and initializers; `drop` makes an initializer an input."""
    model = qmodel({"": given}, functions=False)
    node = model.graph.node[0]
    set_attributes(node, attributes)
    for initializer in list(model.graph.initializer):
        name = initializer.name.removeprefix("node.")
        if name in tensors:
            initializer.CopyFrom(numpy_helper.from_array(np.asarray(tensors[name]), initializer.name))
        if name == drop:
            model.graph.input.append(
                helper.make_tensor_value_info(initializer.name, initializer.data_type, list(initializer.dims))
            )
            model.graph.initializer.remove(initializer)
    return model


def test_the_layer_itself_runs(library: Path) -> None:
    for given in (layer(), layer((16, 8))):
        y = session(changed(given, {}, {}), library).run(None, given.feed())[0]
        np.testing.assert_array_equal(y, given.expected)


def test_a_library_that_was_built_without_int8_says_so(library: Path) -> None:
    with pytest.raises(Exception, match="built without those of int8 layers"):
        session(changed(layer(), {}, {}), build())


ATTRIBUTES = [
    ({"block": 1}, "row pointers"),
    ({"block": 5}, "block must be 1, 4, 8 or 16"),
    ({"block": HUGE}, "block must be 1, 4, 8 or 16"),
    ({"block": None}, "block"),
    ({"block": 16}, "row pointers"),
    ({"weight_shape": [0, 8, 3, 3]}, "out_channels"),
    ({"weight_shape": [HUGE, 8, 3, 3]}, "out_channels"),
    ({"weight_shape": [16, 8, 3]}, "weight_shape"),
    ({"weight_shape": [16, 8, 2, 2]}, "residual must have"),
    ({"weight_shape": [16, 8, HUGE, 3]}, "kernel sizes"),
    ({"x_zero_point": -1}, "x_zero_point must be 0 to 255, got -1"),
    ({"x_zero_point": 256}, "x_zero_point must be 0 to 255, got 256"),
    ({"x_zero_point": None}, "x_zero_point"),
    ({"y_zero_point": -1}, "y_zero_point"),
    ({"y_zero_point": HUGE}, "y_zero_point"),
    ({"y_zero_point": None}, "y_zero_point"),
    ({"residual_zero_point": 300}, "residual_zero_point must be 0 to 255, got 300"),
    ({"residual_scale": float("nan")}, "residual_scale must be finite"),
    ({"residual_scale": float("inf")}, "residual_scale must be finite"),
    ({"residual_scale": None}, "residual_scale"),
    ({"slope": float("nan")}, "slope must be finite"),
    ({"slope": None}, "slope"),
    ({"group": 0}, "group"),
    ({"group": 16}, "row pointers"),
    ({"strides": [0, 1]}, "strides"),
    ({"pads": [-1, 0, 0, 0]}, "pads"),
    ({"dilations": [9, 9]}, "window is larger"),
]


@pytest.mark.parametrize(("attributes", "reason"), ATTRIBUTES)
def test_bad_attributes(library: Path, attributes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        session(changed(layer(), attributes, {}), library).run(None, layer().feed())


def put(name: str, index: int, value: float) -> dict[str, Any]:
    array = getattr(layer(), name) if name in ("bias", "scale") else getattr(layer().emitted.packed, name).numpy()
    array = array.copy()
    array.reshape(-1)[index] = value
    return {name: array}


def packed(name: str) -> np.ndarray:
    return getattr(layer().emitted.packed, name).numpy()


TENSORS = [
    (put("columns", 0, -1), "negative"),
    (put("columns", -1, 18), "out of range"),
    (put("columns", -1, 2**31 - 1), "out of range"),
    ({"columns": packed("columns")[:-1]}, "values"),
    ({"values": packed("values")[:-1]}, "values"),
    ({"values": packed("values")[:, :, :3]}, "values"),
    (put("values", 3, -128), "values must be -127 to 127, got -128"),
    ({"values": packed("values").astype(np.uint8)}, "Type Error|uint8"),
    (put("row_pointers", 0, 1), "first row pointer"),
    (put("row_pointers", 1, -7), "row pointers must not fall"),
    (put("row_pointers", -1, 2**31 - 1), "last row pointer"),
    ({"bias": np.zeros(15, np.int32)}, "bias values: expected 16, got 15"),
    ({"scale": np.zeros(17, np.float32)}, "scales: expected 16, got 17"),
    (put("scale", 5, np.nan), "scales must be finite, unlike that of out channel 5"),
    (put("scale", 15, np.inf), "scales must be finite, unlike that of out channel 15"),
]


@pytest.mark.parametrize(("tensors", "reason"), TENSORS)
def test_bad_tensors(library: Path, tensors: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        session(changed(layer(), {}, tensors), library).run(None, layer().feed())


@pytest.mark.parametrize("name", ["values", "columns", "row_pointers", "bias", "scale"])
def test_all_but_x_and_the_residual_must_be_constant(library: Path, name: str) -> None:
    with pytest.raises(Exception, match=f"{name} must be a constant initializer"):
        session(changed(layer(), {}, {}, drop=name), library)


def test_inputs_of_the_wrong_shape(library: Path) -> None:
    given = layer()
    model = qmodel({"": given}, functions=False)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.ClearField("shape")
    running = session(model, library)
    for name, shape, reason in (
        ("residual", (1, 16, 7, 8), "residual must have"),
        ("x", (1, 8, 2, 2), "window is larger"),
        ("x", (1, 3, 9, 9), "out of range"),
        ("x", (8, 9, 9), "4 dimensions"),
    ):
        with pytest.raises(Exception, match=reason):
            running.run(None, given.feed() | {name: np.zeros(shape, np.uint8)})
    np.testing.assert_array_equal(running.run(None, given.feed())[0], given.expected)


def test_weights_past_the_last_channel_multiply_nothing(library: Path) -> None:
    """As in the function, which cuts them off."""
    given = replace(layer((16, 7)), x=layer((16, 8)).x[:, :7].copy(), x_zero_point=9)
    values = given.emitted.packed.values.numpy().copy()
    values[given.emitted.packed.columns.numpy() == 1, :, 3] = 100
    y = session(changed(given, {}, {"values": values}), library).run(None, given.feed())[0]
    np.testing.assert_array_equal(y, given.expected)


def depthwise(**changes: Any) -> QLayer:
    random = np.random.default_rng(0)
    given = replace(
        layer((8, 1, 3, 3)),
        block=1,
        weight=quantized_weight(random, (8, 1, 3, 3), 1, 0.3, 8),
        x=random.integers(0, 256, (1, 8, 9, 9)).astype(np.uint8),
        groups=8,
        residual=None,
    )
    return replace(given, **changes)


DEPTHWISE = [
    ({"strides": [1, 5]}, {}, "stride along a row must be 1 to 4 and its dilation 1, got 5 and 1"),
    ({"dilations": [1, 2]}, {}, "got 1 and 2"),
    ({"group": 4, "weight_shape": [4, 2, 3, 3]}, {}, "row pointers"),
    ({"weight_shape": [8, 1, 2, 3]}, {}, "out of range"),
    ({"weight_shape": [8, 1, 2**13, 2**13]}, {}, "at most 1024 columns"),
    ({"weight_shape": [8, 1, 2**5, 2**5 + 1], "pads": [2**5] * 4}, {}, "at most 1024 columns, got 1056"),
    ({}, {"columns": depthwise().emitted.packed.columns.numpy().clip(0, 7)}, "must rise"),
    ({}, {"columns": depthwise().emitted.packed.columns.numpy()[::-1].copy()}, "must rise"),
    ({}, {"columns": np.full_like(depthwise().emitted.packed.columns.numpy(), -1)}, "negative"),
]


@pytest.mark.parametrize(("attributes", "tensors", "reason"), DEPTHWISE)
def test_bad_depthwise_layers(library: Path, attributes: dict[str, Any], tensors: dict[str, Any], reason: str) -> None:
    given = depthwise()
    np.testing.assert_array_equal(session(changed(given, {}, {}), library).run(None, given.feed())[0], given.expected)
    with pytest.raises(Exception, match=reason):
        session(changed(given, attributes, tensors), library).run(None, given.feed())


def test_blocks_of_one_output_are_for_depthwise_layers(library: Path) -> None:
    given = depthwise(weight=quantized_weight(np.random.default_rng(0), (8, 2, 3, 3), 1, 0.0, 4), groups=4)
    with pytest.raises(Exception, match="whose groups have one input channel, got 8 channels in 4 groups"):
        session(changed(given, {}, {}), library).run(None, given.feed())
    matrix = replace(layer((16, 8)), block=1, residual=None)
    with pytest.raises(Exception, match="are for depthwise layers"):
        session(changed(matrix, {}, {}), library)
