"""Nodes that cannot be run are refused with a reason."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_layers import Layer, sparse_weight
from kernel_models import feed, layer_parts, make_model, mlp_parts, planes_session, session, set_attributes
from onnx import helper, numpy_helper


def layer(shape: tuple[int, ...] = (16, 6, 3, 3)) -> Layer:
    random = np.random.default_rng(0)
    size = (1, 6, 9, 9) if len(shape) == 4 else (5, 6)
    return Layer(
        block=8,
        weight=sparse_weight(random, shape, 8, 0.5),
        x=random.standard_normal(size).astype(np.float32),
        bias=np.zeros(shape[0], np.float32),
    )


def run(library: Path, given: Layer, attributes: dict[str, Any], tensors: dict[str, Any], drop: str = "") -> None:
    """Run a layer whose attributes and initializers have been replaced; `drop` makes an initializer an input."""
    node, inputs, initializers, output = layer_parts(given)
    set_attributes(node, attributes)
    arrays = {i.name: numpy_helper.to_array(i) for i in initializers} | tensors
    feeds = feed(given)
    if drop:
        array = arrays.pop(drop)
        feeds[drop] = array
        inputs.append(helper.make_tensor_value_info(drop, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    session(make_model([(node, inputs, initializers, output)]), library).run(None, feeds)


HUGE = 2**62
ATTRIBUTES = [
    ({"block": 5}, "block must be"),
    ({"block": 0}, "block must be"),
    ({"block": -8}, "block must be"),
    ({"block": 16}, "row pointers"),
    ({"weight_shape": [0, 6, 3, 3]}, "out_channels"),
    ({"weight_shape": [-16, 6, 3, 3]}, "out_channels"),
    ({"weight_shape": [HUGE, 6, 3, 3]}, "out_channels"),
    ({"weight_shape": [24, 6, 3, 3]}, "row pointers"),
    ({"activation": "swish"}, "activation must be"),
    ({"activation": 3}, "activation"),
    ({"activation": None}, "activation"),
    ({"group": 0}, "group"),
    ({"group": -1}, "group"),
    ({"group": HUGE}, "group"),
    ({"group": 16}, "row pointers"),
    ({"weight_shape": [16, 6, 3]}, "weight_shape"),
    ({"weight_shape": [16, 6, 3, 3, 3]}, "weight_shape"),
    ({"weight_shape": [16, 6, 0, 3]}, "kernel sizes"),
    ({"weight_shape": [16, 6, HUGE, HUGE]}, "kernel sizes"),
    ({"weight_shape": [16, 6, 2, 2]}, "out of range"),
    ({"weight_shape": [16, 6, 32768, 32768]}, "window is larger"),
    ({"strides": [0, 1]}, "strides"),
    ({"strides": [HUGE, 1]}, "strides"),
    ({"dilations": [1, 0]}, "dilations"),
    ({"dilations": [9, 9]}, "window is larger"),
    ({"pads": [-1, 0, 0, 0]}, "pads"),
    ({"pads": [HUGE, 0, HUGE, 0]}, "pads"),
    ({"pads": [1, 1]}, "pads"),
    ({"strides": None}, "strides"),
    ({"weight_shape": [16.0, 6.0, float("nan"), 3.0]}, "weight_shape"),
    ({"weight_shape": None}, "weight_shape"),
    ({"block": float("nan")}, "block"),
]


@pytest.mark.parametrize(("attributes", "reason"), ATTRIBUTES)
def test_bad_attributes(library: Path, attributes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        run(library, layer(), attributes, {})


def packed_with(**changes: Any) -> list[tuple[Layer, dict[str, Any]]]:
    """The same change on a convolution and on a matrix."""
    return [
        (given, {name: change(given.packed[name].copy()) for name, change in changes.items()})
        for given in (layer(), layer((16, 6)))
    ]


def put(index: int, value: int) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


TENSORS = [
    (packed_with(columns=put(0, -1)), "negative"),
    (packed_with(columns=put(-1, 2**31 - 1)), "out of range"),
    (packed_with(columns=put(-1, 54)), "out of range"),
    (packed_with(columns=lambda a: a[:-1]), "values"),
    (packed_with(columns=lambda a: a[:0]), "values"),
    (packed_with(values=lambda a: a[:-1]), "values"),
    (packed_with(values=lambda a: a.reshape(-1)[:-1]), "values"),
    (packed_with(row_pointers=lambda a: a[:-1]), "row pointers"),
    (packed_with(row_pointers=lambda a: a[:0]), "row pointers"),
    (packed_with(row_pointers=put(0, 1)), "first row pointer"),
    (packed_with(row_pointers=put(0, -5)), "first row pointer"),
    (packed_with(row_pointers=put(-1, 2**31 - 1)), "last row pointer"),
    (packed_with(row_pointers=put(1, -7)), "row pointers must not fall"),
    (packed_with(row_pointers=put(1, 2**31 - 1)), "row pointers must not fall"),
    (packed_with(columns=lambda a: a.astype(np.int64)), "Type Error|int64"),
    (packed_with(values=lambda a: a.astype(np.float64)), "Type Error|double"),
]


@pytest.mark.parametrize(("cases", "reason"), TENSORS)
def test_bad_tensors(library: Path, cases: list[tuple[Layer, dict[str, Any]]], reason: str) -> None:
    for given, tensors in cases:
        with pytest.raises(Exception, match=reason):
            run(library, given, {}, tensors)


@pytest.mark.parametrize("name", ["values", "columns", "row_pointers", "bias"])
def test_weights_must_be_constant(library: Path, name: str) -> None:
    with pytest.raises(Exception, match=f"{name} must be a constant"):
        run(library, layer(), {}, {}, drop=name)


def test_a_bias_of_the_wrong_size(library: Path) -> None:
    with pytest.raises(Exception, match="bias values: expected 16, got 15"):
        run(library, layer(), {}, {"bias": np.zeros(15, np.float32)})


def test_inputs_of_the_wrong_shape(library: Path) -> None:
    given = layer()
    node, inputs, tensors, output = layer_parts(given)
    node.input.extend(["residual"])
    for value in inputs:
        value.type.tensor_type.ClearField("shape")
    inputs.append(helper.make_tensor_value_info("residual", 1, None))
    running = session(make_model([(node, inputs, tensors, output)]), library)
    y_shape = (1, 16, 7, 7)
    zeros = {"x": given.x, "residual": np.zeros(y_shape, np.float32)}
    assert running.run(None, zeros)[0].shape == y_shape
    for name, shape, reason in (
        ("residual", (1, 16, 7, 8), "residual must have"),
        ("residual", (1,), "residual must have"),
        ("x", (1, 6, 2, 2), "window is larger"),
        ("x", (1, 6, 0, 9), "window is larger"),
        ("x", (1, 5, 9, 9), "out of range"),
        ("x", (6, 9, 9), "4 dimensions"),
    ):
        with pytest.raises(Exception, match=reason):
            running.run(None, zeros | {name: np.zeros(shape, np.float32)})
    assert running.run(None, zeros)[0].shape == y_shape


def test_a_runtime_that_is_too_old_is_refused(library: Path) -> None:
    """A stand-in for ONNX Runtime 1.16: its table has one entry, and no newer table."""
    kernels = ctypes.CDLL(str(library))
    said: list[bytes] = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda _, text: said.append(text) or 1)
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(
        lambda: ctypes.cast(ctypes.c_char_p(b"1.16.3"), ctypes.c_void_p).value
    )
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    kernels.RegisterCustomOps.restype = ctypes.c_void_p
    assert kernels.RegisterCustomOps(None, base)
    assert b"1.17 or newer, this is 1.16.3" in said[0]


@pytest.mark.parametrize(("op_type", "least", "size"), [("MaxPool2x2", 2, 4), ("UpsampleBilinear2x", 1, 18)])
def test_planes_of_the_wrong_shape(library: Path, op_type: str, least: int, size: int) -> None:
    running = planes_session(op_type, library)
    few = f"at least {least} rows and {least} columns"
    for shape, reason in (((3, 9, 9), "4 dimensions"), ((1, 3, least - 1, 9), few), ((1, 3, 9, 0), few)):
        with pytest.raises(Exception, match=reason):
            running.run(None, {"x": np.zeros(shape, np.float32)})
    assert running.run(None, {"x": np.zeros((0, 3, 9, 9), np.float32)})[0].shape == (0, 3, size, size)


def test_layouts_of_the_wrong_shape(library: Path) -> None:
    running = planes_session("ChannelsFirst", library)
    with pytest.raises(Exception, match="4 dimensions"):
        running.run(None, {"x": np.zeros((3, 9, 9), np.float32)})
    assert running.run(None, {"x": np.zeros((1, 0, 9, 3), np.float32)})[0].shape == (1, 3, 0, 9)


def test_a_shuffle_that_does_not_fit(library: Path) -> None:
    for block in (0, -2, 257):
        with pytest.raises(Exception, match="blocksize must be 1 to 256"):
            planes_session("DepthToSpace", library, blocksize=block)
    with pytest.raises(Exception, match="blocksize"):
        planes_session("DepthToSpace", library)
    running = planes_session("DepthToSpace", library, blocksize=2)
    for shape, reason in (((4, 9, 9), "4 dimensions"), ((1, 6, 9, 9), "a multiple of blocksize")):
        with pytest.raises(Exception, match=reason):
            running.run(None, {"x": np.zeros(shape, np.float32)})
    assert running.run(None, {"x": np.zeros((1, 0, 9, 9), np.float32)})[0].shape == (1, 0, 18, 18)


def test_two_matrices_that_do_not_fit(library: Path) -> None:
    up, down = layer((16, 6)), layer((8, 16))
    assert session(make_model([mlp_parts(up, down)]), library).run(None, feed(up))[0].shape[-1] == 8
    few = replace(up, weight=up.weight[:8], bias=np.zeros(8, np.float32))
    with pytest.raises(Exception, match=r"out of range: the input has 8"):
        session(make_model([mlp_parts(few, down)]), library)
    for name in ("bias", "down_bias", "down_values"):
        node, inputs, tensors, output = mlp_parts(up, down)
        inputs.append(helper.make_tensor_value_info(name, 1, None))
        kept = [tensor for tensor in tensors if tensor.name != name]
        with pytest.raises(Exception, match=r"must be (a )?constant initializer"):
            session(make_model([(node, inputs, kept, output)]), library)
