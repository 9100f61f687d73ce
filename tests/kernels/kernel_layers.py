"""Random block-sparse layers, their packed form, the C entry points, and torch as the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from any_layer import AnyLayer, pick, random_planes
from numpy.typing import NDArray

from slrc.forms.activations import ACTIVATIONS
from slrc.forms.packed_weight import PackedWeight


@dataclass(frozen=True, kw_only=True)
class Layer(AnyLayer):
    """One random layer with its input."""

    bias: NDArray[np.float32] | None = None
    activation: str = "none"
    slope: float = 0.1
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
        bias = None if self.bias is None else torch.from_numpy(self.bias).double()
        y = self.sums(torch.from_numpy(self.x).double(), bias)
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


def random_conv(random: np.random.Generator) -> Layer:
    """Any window that fits; planes from one pixel to a few thousand; empty rows and empty layers among them."""
    pointwise = random.random() < 0.2  # read in place
    depthwise = random.random() < 0.3
    groups = int(random.integers(2, 40)) if depthwise else pick(random, 1, 1, 1, 2, 3)
    block = 1 if depthwise else pick(random, 1, 4, 8, 16)
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
    batch, size, out_size = random_planes(random, kernel, strides, dilations, pads)
    sparsity = pick(random, 0.0, 0.5, 0.75, 0.9, 0.97, 1.0) if not depthwise or random.random() < 0.3 else 0.0
    weight = sparse_weight(random, (outputs, inputs // groups, *kernel), block, sparsity, groups)
    return Layer(
        block=block,
        weight=weight,
        x=random.standard_normal((batch, inputs, *size)).astype(np.float32),
        bias=random.standard_normal(outputs).astype(np.float32) if random.random() < 0.5 else None,
        residual=random.standard_normal((batch, outputs, *out_size)).astype(np.float32)
        if random.random() < 0.3
        else None,
        activation=pick(random, *ACTIVATIONS),
        strides=strides,
        pads=pads,  # type: ignore[arg-type]
        dilations=dilations,
        groups=groups,
    )


def random_gemm(random: np.random.Generator) -> Layer:
    """From one token to some hundred, inputs and outputs of any size."""
    block = pick(random, 1, 4, 8, 16)
    outputs = int(random.integers(1, 70))
    inputs, tokens = int(random.integers(1, 200)), int(random.integers(1, pick(random, 2, 6, 40, 250)))
    return Layer(
        block=block,
        weight=sparse_weight(random, (outputs, inputs), block, pick(random, 0.0, 0.5, 0.75, 0.9, 1.0)),
        x=random.standard_normal((tokens, inputs)).astype(np.float32),
        bias=random.standard_normal(outputs).astype(np.float32) if random.random() < 0.5 else None,
        residual=random.standard_normal((tokens, outputs)).astype(np.float32) if random.random() < 0.3 else None,
        activation=pick(random, *ACTIVATIONS),
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
        """Compute a layer."""
        blocks = Blocks(
            *(part for array in layer.packed.values() for part in (array.ctypes.data, array.size)),
            None if layer.bias is None else layer.bias.ctypes.data, 0 if layer.bias is None else layer.bias.size,
            layer.block, layer.weight.shape[0], layer.activation.encode(), layer.slope,
        )  # fmt: skip
        conv, gemm = self.library.slrc_block_sparse_conv, self.library.slrc_block_sparse_gemm
        return layer.run(conv, gemm, blocks, layer.expected())
