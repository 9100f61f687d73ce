"""`limits.why_not` and the library agree on what the kernels take, on both sides of every limit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_layer import Window
from kernel_layers import Blocks, Kernels, Layer

from slrc.kernels.limits import (
    BLOCKS,
    MOST_BLOCKS,
    MOST_COLUMNS,
    MOST_INPUT,
    MOST_STRIDE,
    MOST_WINDOW,
    why_not,
    why_not_int8,
    why_not_pool,
)


@dataclass(frozen=True)
class Shape:
    """A layer without its numbers."""

    weight: tuple[int, ...]
    block: int = 8
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (1, 1)

    def why_not(self) -> str:
        return why_not(
            self.weight,
            self.block,
            strides=self.strides,
            pads=self.pads,
            dilations=self.dilations,
            groups=self.groups,
            input_size=self.size,
        )

    def refusal(self, kernels: Kernels) -> str:
        """What the library says; it looks at sizes alone."""
        rows = self.groups * -(-self.weight[0] // self.groups // self.block)
        count = rows * int(np.prod(self.weight[1:], dtype=object))
        blocks = Blocks(None, count * self.block, None, count, None, rows + 1, None, 0, self.block, self.weight[0])
        window, shape = None, (1, self.weight[1])
        if len(self.weight) == 4:
            window = ctypes.byref(Window(self.weight[2:], self.strides, self.pads * 2, self.dilations, self.groups))
            shape = (1, self.weight[1] * self.groups, *self.size)
        error = ctypes.create_string_buffer(512)
        failed = kernels.library.slrc_check_sizes(
            ctypes.byref(blocks), window, (ctypes.c_int64 * len(shape))(*shape), error, ctypes.c_size_t(512)
        )
        assert bool(failed) == bool(error.value)
        return error.value.decode()


def shapes() -> Iterator[Shape]:
    yield from (Shape((34, 5), block) for block in range(1, 20))
    yield from (Shape((34, 5), block) for block in (32, 64))
    for axis in (0, 1):
        for most, name in ((MOST_STRIDE, "strides"), (MOST_WINDOW, "pads"), (MOST_WINDOW, "dilations")):
            for value in (1, 2, most - 1, most, most + 1, most + 16, 2 * most):
                sizes: Any = (1, value) if axis else (value, 1)
                yield Shape((16, 4, 3, 3), **{name: sizes})
        for value in (MOST_WINDOW - 1, MOST_WINDOW, MOST_WINDOW + 1):
            yield Shape((8, 4, 1, value) if axis else (8, 4, value, 1))
    for columns in (MOST_COLUMNS - 1, MOST_COLUMNS, MOST_COLUMNS + 1):
        yield Shape((8, columns))
        yield Shape((8, columns, 1, 1))
        yield Shape((16, columns, 1, 1), groups=2)
        yield Shape((8, columns // 12, 4, 3))
        yield Shape((8, columns // 12 + 1, 4, 3))
    for blocks in (MOST_BLOCKS - 1, MOST_BLOCKS, MOST_BLOCKS + 1):
        for block in BLOCKS:
            yield from (Shape((blocks * block - short, 1), block) for short in (0, block - 1))
        yield Shape((3 * blocks, 1, 1, 1), 4, groups=blocks)
        yield Shape((8, blocks // 9, 3, 3))
    for wider in (-1, 0, 1):
        side = 2**15  # of a square of MOST_INPUT
        yield Shape((8, 1, 3, 3), size=(side - 3, side - 17 + wider))
        yield Shape((8, 1, 3, 3), size=(side - 3 + wider, side - 17))
        yield Shape((8, 16, 3, 3), size=(side // 4 - 3, side // 4 - 17 + wider))
        yield Shape((8, 16, 3, 3), groups=2, size=(side // 4 - 3, side // 4 - 17 + wider))
        yield Shape((8, 1, 3, 3), strides=(2, 3), pads=(5, 7), size=(side - 6 - 10 + wider, side - 51 - 14))
        yield Shape((8, MOST_INPUT // (4 * 18) + wider, 1, 1))


def test_python_and_the_library_take_the_same_sizes(library: Path) -> None:
    kernels = Kernels(library)
    taken = []
    for shape in shapes():
        said, refusal = shape.why_not(), shape.refusal(kernels)
        assert bool(said) == bool(refusal), f"{shape}: Python says `{said}`, the library `{refusal}`"
        taken.append(not said)
    assert any(taken)
    assert sum(a != b for a, b in pairwise(taken)) > 20  # limits are crossed


def test_int8_layers_count_four_channels_as_one() -> None:
    most = MOST_INPUT // (4 * 18)
    assert why_not((8, most + 1, 1, 1), 8)
    assert why_not_int8((8, 4 * most, 1, 1), 8) == ""
    assert "an input of" in why_not_int8((8, 4 * most + 1, 1, 1), 8)
    assert "weights of each output" in why_not_int8((8, MOST_COLUMNS + 1), 8)
    assert "int8 blocks of 1 output " in why_not_int8((8, 8), 1)
    assert "int8 blocks of 1 output " in why_not_int8((8, 2, 3, 3), 1, groups=4)
    assert why_not_int8((8, 1, 3, 3), 1, groups=8, strides=(9, 4), dilations=(3, 1)) == ""
    assert "along a row" in why_not_int8((8, 1, 3, 3), 1, groups=8, strides=(1, 5))
    assert "along a row" in why_not_int8((8, 1, 3, 3), 1, groups=8, dilations=(1, 2))
    assert why_not_int8((8, 1, 32, 32), 1, groups=8) == ""
    assert "of depthwise int8 layers up to 1024" in why_not_int8((8, 1, 32, 33), 1, groups=8)


@pytest.mark.parametrize(
    ("kernel", "strides", "size"),
    [
        ((64, 64), (64, 64), (128, 128)),
        ((65, 65), (65, 65), (130, 130)),
        ((1, 1), (64, 65), (65, 66)),
        ((2, MOST_WINDOW), (1, 1), (2, MOST_WINDOW)),
        ((2, MOST_WINDOW + 1), (1, 1), (2, MOST_WINDOW + 1)),
        ((2**12, 2**12), (1, 1), (2**12, 2**12)),
        ((2**12, 2**12 + 1), (1, 1), (2**12, 2**12 + 1)),
    ],
)
def test_python_and_the_library_take_the_same_pools(
    library: Path, kernel: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]
) -> None:
    window = Window(kernel, strides, (0, 0, 0, 0), (1, 1), 1)
    out = [(n - k) // s + 1 for n, k, s in zip(size, kernel, strides, strict=True)]
    x, y, error = (
        np.full((1, 1, *size), 7, np.uint8),
        np.zeros((1, 1, *out), np.uint8),
        ctypes.create_string_buffer(512),
    )
    failed = ctypes.CDLL(str(library)).slrc_max_pool_bytes(
        ctypes.byref(window), x.ctypes.data_as(ctypes.c_void_p), (ctypes.c_int64 * 4)(*x.shape),
        y.ctypes.data_as(ctypes.c_void_p), error, ctypes.c_size_t(512),
    )  # fmt: skip
    assert bool(failed) == bool(why_not_pool(kernel, strides=strides, input_size=size)), error.value
    assert bool(failed) or (y == 7).all()
    assert "stride" in why_not_int8((8, 8, 3, 3), 8, strides=(MOST_STRIDE + 1, 1))


@pytest.mark.parametrize(
    "shape",
    [
        Shape((16, 4), 1),
        Shape((16, 4), 2),
        Shape((16, 4), 32),
        Shape((8, 2, 1, 1), strides=(MOST_STRIDE, 1), size=(130, 3)),
        Shape((8, 2, 3, 3), strides=(80, 80), size=(200, 200)),
        Shape((8, 2, 1, 1), strides=(1, MOST_STRIDE + 1), size=(3, 130)),
        Shape((8, 1, 1, MOST_WINDOW), size=(1, MOST_WINDOW)),
        Shape((8, 1, 1, MOST_WINDOW + 1), size=(1, MOST_WINDOW + 1)),
        Shape((8, 1, 2, 1), dilations=(MOST_WINDOW, 1), size=(MOST_WINDOW + 1, 1)),
        Shape((8, 1, 2, 1), dilations=(MOST_WINDOW + 1, 1), size=(MOST_WINDOW + 2, 1)),
        Shape((8, 1, 1, 1), pads=(0, MOST_WINDOW), size=(1, 1)),
        Shape((8, 1, 1, 1), pads=(0, MOST_WINDOW + 1), size=(1, 1)),
        Shape((1, MOST_COLUMNS), 1),
        Shape((1, MOST_COLUMNS + 1), 1),
        Shape((1, MOST_COLUMNS // 16, 4, 4), 1, size=(4, 4)),
        Shape((1, MOST_COLUMNS // 16 + 1, 4, 4), 1, size=(4, 4)),
    ],
    ids=str,
)
def test_a_layer_runs_if_it_is_taken(library: Path, shape: Shape) -> None:
    """One column alone survives, the last: the largest numbers with little work."""
    weight = np.zeros(shape.weight, np.float32)
    weight.reshape(len(weight), -1)[:, -1] = 1 + np.arange(len(weight))
    x = (1, shape.weight[1] * shape.groups, *(shape.size if weight.ndim == 4 else ()))
    layer = Layer(
        block=shape.block,
        weight=weight,
        x=(np.arange(np.prod(x), dtype=np.int64) % 7 - 3).astype(np.float32).reshape(x),
        strides=shape.strides,
        pads=shape.pads * 2,  # type: ignore[arg-type]
        dilations=shape.dilations,
    )
    kernels = Kernels(library)
    if shape.why_not():
        with pytest.raises(ValueError, match=r"block must be|none huge|out of range"):
            kernels.run(layer)
    else:
        np.testing.assert_array_equal(kernels.run(layer), layer.expected())
