"""Random block-sparse int8 layers, their ONNX models, and exact integers in numpy as the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from any_layer import AnyLayer, pick, random_planes
from numpy.typing import NDArray
from onnx import TensorProto, helper

from slrc.backends.int8_onnx import Int8Layer, Residual, Window, function_of, node_of
from slrc.forms.packed_int8 import PackedInt8


@dataclass(frozen=True, kw_only=True)
class QLayer(AnyLayer):
    """One random layer with its input."""

    bias: NDArray[np.int32]
    scale: NDArray[np.float32]
    x_zero_point: int = 0
    y_zero_point: int | None = 0
    """`None` if the output is float32."""
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    slope: float | None = None

    @cached_property
    def emitted(self) -> Int8Layer:
        """What an emitter is given."""
        return Int8Layer(
            packed=PackedInt8.of(torch.from_numpy(self.weight), self.block, self.groups),
            weight_shape=self.weight.shape,
            bias=torch.from_numpy(self.bias),
            scale=torch.from_numpy(self.scale),
            x_zero_point=self.x_zero_point,
            y_zero_point=self.y_zero_point,
            window=None if self.is_matrix else Window(self.strides, self.pads, self.dilations, self.groups),
            residual=None
            if self.residual is None
            else Residual("residual", self.residual_scale, self.residual_zero_point),
            slope=self.slope,
        )

    @cached_property
    def expected(self) -> NDArray[Any]:
        """Exact integers, then float32 operations one by one."""
        sums = self.sums(torch.from_numpy(self.x).double() - self.x_zero_point).numpy()
        along = (-1,) if self.is_matrix else (-1, 1, 1)
        integers = sums.astype(np.int64) + self.bias.astype(np.int64).reshape(along)
        assert np.abs(integers).max(initial=0) < 2**31
        real = integers.astype(np.int32).astype(np.float32) * self.scale.reshape(along)
        if self.residual is not None:
            shifted = self.residual.astype(np.float32) - np.float32(self.residual_zero_point)
            real = real + shifted * np.float32(self.residual_scale)
        if self.slope is not None:
            real = np.where(real < 0, real * np.float32(self.slope), real)
        if self.y_zero_point is None:
            return real
        return np.clip(np.rint(real) + self.y_zero_point, 0, 255).astype(np.uint8)

    def feed(self, name: str = "") -> dict[str, NDArray[Any]]:
        """Return the run-time inputs."""
        return {name + "x": self.x} | ({} if self.residual is None else {name + "residual": self.residual})


def quantized_weight(
    random: np.random.Generator, shape: tuple[int, ...], block: int, sparsity: float, groups: int = 1, cols: int = 4
) -> NDArray[np.int8]:
    """Return a weight of which about `sparsity` of the blocks of `block` outputs × `cols` channels are zero."""
    per_group, channels, taps = shape[0] // groups, shape[1], int(np.prod(shape[2:]))
    keep = random.random((groups, -(-per_group // block), -(-channels // cols), taps)) >= sparsity
    mask = keep.repeat(block, axis=1)[:, :per_group].repeat(cols, axis=2)[:, :, :channels].reshape(shape)
    return (random.integers(-127, 128, shape) * mask).astype(np.int8)


def _finish(random: np.random.Generator, layer: dict[str, Any], y_shape: tuple[int, ...]) -> QLayer:
    """Add what both kinds of layers have; some outputs saturate, and some are halves that are rounded to even."""
    outputs, width = layer["weight"].shape[0], np.prod(layer["weight"].shape[1:])
    whole = random.random() < 0.2
    scale = (
        2.0 ** random.integers(-14, -6, outputs) if whole else random.uniform(0.2, 1.0, outputs) / 50 / np.sqrt(width)
    )
    quantized = random.random() < 0.7
    return QLayer(
        **layer,
        bias=random.integers(-100000, 100000, outputs).astype(np.int32) // pick(random, 1, 10),
        scale=scale.astype(np.float32),
        x_zero_point=int(pick(random, 0, 128, 255, random.integers(256))),
        y_zero_point=int(pick(random, 0, 128, 255, random.integers(256))) if quantized else None,
        residual=random.integers(0, 256, y_shape).astype(np.uint8) if random.random() < 0.4 else None,
        residual_scale=float(np.float32(pick(random, 1.0, 0.5, random.uniform(0.1, 2.0)))),
        residual_zero_point=int(pick(random, 0, 128, random.integers(256))),
        slope=float(np.float32(pick(random, 0.1, 0.0, 1.5, -0.5))) if random.random() < 0.25 else None,
    )


def random_qconv(random: np.random.Generator) -> QLayer:
    """Any window that fits, depthwise layers too; planes from one pixel to a few thousand; empty rows and layers."""
    block = pick(random, 1, 4, 8, 16)
    groups = int(random.integers(1, 20)) if block == 1 else pick(random, 1, 1, 1, 2, 3)
    per_group = block * int(random.integers(1, 4)) - (int(random.integers(block)) if random.random() < 0.3 else 0)
    outputs, inputs = groups * per_group, groups * (1 if block == 1 else int(random.integers(1, 24)))
    pointwise = random.random() < 0.25
    kernel = (1, 1) if pointwise else (int(random.integers(1, 6)), int(random.integers(1, 6)))
    strides = (1, 1) if pointwise or random.random() < 0.5 else (int(random.integers(1, 4)), int(random.integers(1, 4)))
    dilations = (int(random.integers(1, 4)), int(random.integers(1, 4))) if random.random() < 0.3 else (1, 1)
    pads = (0, 0, 0, 0) if pointwise or random.random() < 0.2 else tuple(int(p) for p in random.integers(0, 4, 4))
    if not pointwise and random.random() < 0.3:  # outputs of the input's size
        kernel, strides, dilations, pads = (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)
    if block == 1:  # of depthwise layers, whose words are neighbours along a row
        dilations = (dilations[0], 1)
        if not pointwise:
            kernel, strides = (kernel[0], int(random.integers(1, 14))), (strides[0], int(random.integers(1, 5)))
    batch, size, out_size = random_planes(random, kernel, strides, dilations, pads)
    sparsity, cols = pick(random, 0.0, 0.5, 0.75, 0.9, 0.97, 1.0), pick(random, 1, 4, 4)
    layer = {
        "block": block,
        "weight": quantized_weight(random, (outputs, inputs // groups, *kernel), block, sparsity, groups, cols),
        "x": random.integers(0, 256, (batch, inputs, *size)).astype(np.uint8),
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
        "groups": groups,
    }
    return _finish(random, layer, (batch, outputs, *out_size))


def random_qgemm(random: np.random.Generator) -> QLayer:
    """From one token to some hundred, inputs and outputs of any size."""
    block, outputs, inputs = pick(random, 4, 8, 16), int(random.integers(1, 70)), int(random.integers(1, 200))
    tokens = int(random.integers(1, pick(random, 2, 6, 40, 250)))
    layer = {
        "block": block,
        "weight": quantized_weight(random, (outputs, inputs), block, pick(random, 0.0, 0.5, 0.75, 0.9, 1.0)),
        "x": random.integers(0, 256, (tokens, inputs)).astype(np.uint8),
    }
    return _finish(random, layer, (tokens, outputs))


def qmodel(layers: dict[str, QLayer], functions: bool) -> onnx.ModelProto:
    """Return a model of independent layers, each with its name before its values; with what they mean, or without."""
    nodes, tensors, inputs, outputs, used = [], [], [], [], {}
    for name, layer in layers.items():
        node, initializers = node_of(layer.emitted, name + "x", name + "y", name + "node")
        if layer.residual is not None:
            node.input[-1] = name + "residual"
        nodes.append(node)
        tensors.append(initializers)
        inputs += [helper.make_tensor_value_info(n, TensorProto.UINT8, a.shape) for n, a in layer.feed(name).items()]
        kind = TensorProto.FLOAT if layer.y_zero_point is None else TensorProto.UINT8
        outputs.append(helper.make_tensor_value_info(name + "y", kind, layer.expected.shape))
        used[node.op_type] = None
    graph = helper.make_graph(nodes, "layers", inputs, outputs, [*chain(*tensors)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.slrc", 1)]
    meanings = [function_of(op_type, 18) for op_type in used] if functions else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=meanings)


class Int8Blocks(ctypes.Structure):
    """`SlrcInt8Blocks`."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("value_count", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("column_count", ctypes.c_int64),
        ("row_pointers", ctypes.c_void_p),
        ("row_pointer_count", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_count", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scale_count", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("out_channels", ctypes.c_int64),
        ("x_zero_point", ctypes.c_int64),
        ("y_zero_point", ctypes.c_int64),
        ("residual_zero_point", ctypes.c_int64),
        ("residual_scale", ctypes.c_float),
        ("slope", ctypes.c_float),
    )


class Int8Kernels:
    """The C functions of a built library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.slrc_int8_instruction_set.restype = ctypes.c_char_p
        self.library.slrc_instruction_set.restype = ctypes.c_char_p

    @property
    def instruction_set(self) -> str:
        """The set that the library chose when it was first asked."""
        return str(self.library.slrc_int8_instruction_set().decode())

    @property
    def float32_instruction_set(self) -> str:
        """The set that float32 layers use."""
        return str(self.library.slrc_instruction_set().decode())

    def run(self, layer: QLayer) -> NDArray[Any]:
        """Compute a layer."""
        emitted = layer.emitted
        arrays = [*(t.numpy() for t in vars(emitted.packed).values()), layer.bias, layer.scale]
        zero_point = -1 if layer.y_zero_point is None else layer.y_zero_point
        blocks = Int8Blocks(
            *(part for array in arrays for part in (array.ctypes.data, array.size)),
            layer.block, layer.weight.shape[0], layer.x_zero_point, zero_point, layer.residual_zero_point,
            layer.residual_scale, 1.0 if layer.slope is None else layer.slope,
        )  # fmt: skip
        return layer.run(self.library.slrc_int8_conv, self.library.slrc_int8_gemm, blocks, layer.expected)
