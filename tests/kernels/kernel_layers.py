"""Random block-sparse layers, their packed form, the C entry points, and torch as the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from slrc.forms.activations import ACTIVATIONS
from slrc.forms.packed_weight import PackedWeight


@dataclass(frozen=True)
class Layer:
    """One random layer with its input. `weight` is `(out, in/groups, kh, kw)`, or `(out, in)` of a matrix."""

    block: int
    weight: NDArray[np.float32]
    x: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    residual: NDArray[np.float32] | None = None
    activation: str = "none"
    slope: float = 0.1
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    packed: dict[str, NDArray[Any]] = field(init=False)
    """`values`, `columns` and `row_pointers`."""

    def __post_init__(self) -> None:
        packed = PackedWeight.of(torch.from_numpy(self.weight), self.block, self.groups)
        object.__setattr__(self, "packed", {name: tensor.numpy() for name, tensor in vars(packed).items()})

    def expected(self) -> NDArray[np.float32]:
        """Return what torch computes, in double precision, rounded; computed once."""
        return self._expected

    @cached_property
    def _expected(self) -> NDArray[np.float32]:
        x, weight = torch.from_numpy(self.x).double(), torch.from_numpy(self.weight).double()
        bias = None if self.bias is None else torch.from_numpy(self.bias).double()
        if weight.dim() == 2:
            y = functional.linear(x, weight, bias)
        else:
            top, left, bottom, right = self.pads
            padded = functional.pad(x, (left, right, top, bottom))
            y = functional.conv2d(padded, weight, bias, self.strides, 0, self.dilations, self.groups)
        if self.residual is not None:
            y = y + torch.from_numpy(self.residual).double()
        return ACTIVATIONS[self.activation](y, self.slope).float().numpy()


def sparse_weight(
    random: np.random.Generator, shape: tuple[int, ...], block: int, sparsity: float, groups: int = 1
) -> NDArray[np.float32]:
    """Return a weight scaled for unit outputs, of which about `sparsity` of the blocks are zero."""
    per_group, columns = shape[0] // groups, int(np.prod(shape[1:]))
    keep = random.random((groups, -(-per_group // block), columns)) >= sparsity
    mask = keep.repeat(block, axis=1)[:, :per_group].reshape(shape)
    scale = 1 / np.sqrt(max(1.0, columns * (1 - sparsity)))
    return (random.standard_normal(shape) * mask * scale).astype(np.float32)


def _pick(random: np.random.Generator, *choices: Any) -> Any:
    return choices[random.integers(len(choices))]


def random_conv(random: np.random.Generator) -> Layer:
    """Any window that fits; planes from one pixel to a few thousand; empty rows and empty layers among them."""
    pointwise = random.random() < 0.2  # read in place
    depthwise = random.random() < 0.3
    groups = int(random.integers(2, 40)) if depthwise else _pick(random, 1, 1, 1, 2, 3)
    block = 1 if depthwise else _pick(random, 1, 4, 8, 16)
    outputs = groups * (
        block * int(random.integers(1, 4)) - (int(random.integers(block)) if random.random() < 0.3 else 0)
    )
    inputs = groups * (1 if depthwise else int(random.integers(1, 12)))
    kernel = (
        (int(random.integers(1, 6)), int(random.integers(1, 6))) if not pointwise and random.random() < 0.8 else (1, 1)
    )
    strides = (
        (int(random.integers(1, 4)), int(random.integers(1, 4))) if not pointwise and random.random() < 0.5 else (1, 1)
    )
    dilations = (int(random.integers(1, 4)), int(random.integers(1, 4))) if random.random() < 0.3 else (1, 1)
    pads = tuple(int(p) for p in random.integers(0, 4, 4)) if not pointwise and random.random() < 0.8 else (0, 0, 0, 0)
    size = [int(random.integers(1, _pick(random, 5, 20, 70))) for _ in range(2)]
    for axis in range(2):
        size[axis] = max(size[axis], (kernel[axis] - 1) * dilations[axis] + 1 - pads[axis] - pads[axis + 2], 1)
    batch = int(random.integers(1, 4))
    out_size = [
        (size[a] + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1 for a in range(2)
    ]
    sparsity = _pick(random, 0.0, 0.5, 0.75, 0.9, 0.97, 1.0) if not depthwise or random.random() < 0.3 else 0.0
    weight = sparse_weight(random, (outputs, inputs // groups, *kernel), block, sparsity, groups)
    return Layer(
        block=block,
        weight=weight,
        x=random.standard_normal((batch, inputs, *size)).astype(np.float32),
        bias=random.standard_normal(outputs).astype(np.float32) if random.random() < 0.5 else None,
        residual=random.standard_normal((batch, outputs, *out_size)).astype(np.float32)
        if random.random() < 0.3
        else None,
        activation=_pick(random, *ACTIVATIONS),
        strides=strides,
        pads=pads,  # type: ignore[arg-type]
        dilations=dilations,
        groups=groups,
    )


def random_gemm(random: np.random.Generator) -> Layer:
    """From one token to some hundred, inputs and outputs of any size."""
    block = _pick(random, 1, 4, 8, 16)
    outputs = int(random.integers(1, 70))
    inputs, tokens = int(random.integers(1, 200)), int(random.integers(1, _pick(random, 2, 6, 40, 250)))
    return Layer(
        block=block,
        weight=sparse_weight(random, (outputs, inputs), block, _pick(random, 0.0, 0.5, 0.75, 0.9, 1.0)),
        x=random.standard_normal((tokens, inputs)).astype(np.float32),
        bias=random.standard_normal(outputs).astype(np.float32) if random.random() < 0.5 else None,
        residual=random.standard_normal((tokens, outputs)).astype(np.float32) if random.random() < 0.3 else None,
        activation=_pick(random, *ACTIVATIONS),
    )


class Blocks(ctypes.Structure):
    """`SlrcBlocks`."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("value_count", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("column_count", ctypes.c_int64),
        ("row_pointers", ctypes.c_void_p),
        ("row_pointer_count", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_count", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("out_channels", ctypes.c_int64),
        ("activation", ctypes.c_char_p),
        ("slope", ctypes.c_float),
    )


class Window(ctypes.Structure):
    """`SlrcWindow`."""

    _fields_ = (
        ("kernel", ctypes.c_int64 * 2),
        ("strides", ctypes.c_int64 * 2),
        ("pads", ctypes.c_int64 * 4),
        ("dilations", ctypes.c_int64 * 2),
        ("group", ctypes.c_int64),
    )


class Kernels:
    """The C functions of a built library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.slrc_instruction_set.restype = ctypes.c_char_p
        self.library.slrc_peak_gflops.restype = ctypes.c_double
        self.library.slrc_peak_gflops.argtypes = [ctypes.c_double]

    @property
    def instruction_set(self) -> str:
        """The set that the library chose when it was first asked."""
        return self.library.slrc_instruction_set().decode()

    def run(self, layer: Layer) -> NDArray[np.float32]:
        """Compute a layer; the result stands between two guard zones, which are checked."""
        error = ctypes.create_string_buffer(512)
        blocks = Blocks(
            *(part for array in layer.packed.values() for part in (array.ctypes.data, array.size)),
            None if layer.bias is None else layer.bias.ctypes.data, 0 if layer.bias is None else layer.bias.size,
            layer.block, layer.weight.shape[0], layer.activation.encode(), layer.slope,
        )  # fmt: skip
        shape = layer.expected().shape
        guard, size = 64, int(np.prod(shape))
        held = np.full(size + 2 * guard, np.float32(7.5))
        y = held[guard : guard + size]
        y[:] = np.nan
        residual = None if layer.residual is None else ctypes.c_void_p(layer.residual.ctypes.data)
        pointers = (ctypes.c_void_p(layer.x.ctypes.data), residual, ctypes.c_void_p(y.ctypes.data))
        if layer.weight.ndim == 2:
            tokens, inputs = (ctypes.c_int64(d) for d in layer.x.shape)
            failed = self.library.slrc_block_sparse_gemm(
                ctypes.byref(blocks), pointers[0], tokens, inputs, pointers[1], pointers[2], error, ctypes.c_size_t(512)
            )
        else:
            window = Window(layer.weight.shape[2:], layer.strides, layer.pads, layer.dilations, layer.groups)
            shapes = [(ctypes.c_int64 * 4)(*s) for s in (layer.x.shape, shape)]
            failed = self.library.slrc_block_sparse_conv(
                ctypes.byref(blocks), ctypes.byref(window), pointers[0], shapes[0], pointers[1], pointers[2], shapes[1],
                error, ctypes.c_size_t(512),
            )  # fmt: skip
        if failed:
            raise ValueError(error.value.decode())
        assert (held[:guard] == 7.5).all()
        assert (held[guard + size :] == 7.5).all()
        return y.reshape(shape)
