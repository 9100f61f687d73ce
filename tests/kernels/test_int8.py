"""The int8 kernels against exact integers and against their functions, bit by bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from int8_layers import Int8Kernels, QLayer, qmodel, quantized_weight, random_qconv, random_qgemm
from kernel_models import exact_options, session
from onnx import TensorProto, helper

from slrc.backends.int8_onnx import function_of

CASES = min(1000, int(os.environ.get("SLRC_FUZZ", "3000")) // 30)  # all stay in memory
SETS = {
    "portable": "portable",
    "avx2": "avx2",
    "avx2vnni": "avx2",
    "avx512": "avx512",
    "avx512vnni": "avx512",
    "avx512amx": "avx512",
    "neon": "neon",
    "neondot": "neon",
    "neoni8mm": "neon",
}
"""The instruction sets of int8 layers, and those that float32 layers then use."""


def random_layer(seed: int) -> QLayer:
    random = np.random.default_rng(seed)
    return random_qconv(random) if seed % 3 else random_qgemm(random)


@pytest.fixture(scope="module")
def layers() -> list[QLayer]:
    return [random_layer(seed) for seed in range(CASES)]


@pytest.mark.fuzz
@pytest.mark.parametrize("name", SETS)
def test_each_instruction_set_gives_the_exact_bits(
    library: Path, layers: list[QLayer], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLRC_KERNEL_ISA", name)
    copy = shutil.copy(library, tmp_path)  # a library chooses the set once, when it is first asked
    kernels = Int8Kernels(Path(copy))
    if kernels.instruction_set == "none":
        pytest.skip(f"this processor has no {name}")
    assert kernels.instruction_set == name
    assert kernels.float32_instruction_set == SETS[name]
    for seed, layer in enumerate(layers):
        np.testing.assert_array_equal(kernels.run(layer), layer.expected, err_msg=f"seed {seed}")


@pytest.mark.parametrize("threads", [1, 4])
def test_kernels_and_functions_give_the_same_bits_in_onnxruntime(library: Path, threads: int) -> None:
    layers = {f"n{seed}_": random_layer(seed) for seed in range(60)}
    feeds = {key: x for name, layer in layers.items() for key, x in layer.feed(name).items()}
    model = qmodel(layers, functions=True)
    stock = ort.InferenceSession(model.SerializeToString(), exact_options(), providers=["CPUExecutionProvider"])
    theirs = stock.run(None, feeds)
    running = session(model, library, threads)
    for _ in range(2):  # the second run finds its layouts and scratch memory
        for (name, layer), ours, its in zip(layers.items(), running.run(None, feeds), theirs, strict=True):
            np.testing.assert_array_equal(ours, its, err_msg=name)
            np.testing.assert_array_equal(ours, layer.expected, err_msg=name)


def pool_model(window: dict[str, list[int]], sizes: list[int], *, functions: bool = False) -> onnx.ModelProto:
    node = helper.make_node("MaxPoolBytes", ["x"], ["y"], domain="ai.slrc", **window)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, sizes)
    graph = helper.make_graph([node], "pool", [x], [helper.make_tensor_value_info("y", TensorProto.UINT8, None)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.slrc", 1)]
    meanings = [function_of("MaxPoolBytes", 18)] if functions else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=meanings)


@pytest.mark.parametrize("name", SETS)
def test_pools_of_bytes(library: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRC_KERNEL_ISA", name)
    copy = Path(shutil.copy(library, tmp_path))
    if Int8Kernels(copy).instruction_set == "none":
        pytest.skip(f"this processor has no {name}")
    random = np.random.default_rng(0)
    for seed in range(100):
        kernel = [int(k) for k in random.integers(1, 6, 2)]
        pads = [int(random.integers(kernel[axis % 2])) for axis in range(4)]
        least = [max(kernel[a] - pads[a] - pads[a + 2], 1) for a in range(2)]
        sizes = [2, 3, *(n + int(random.integers((5, 90, 250)[seed % 3])) for n in least)]
        window = {"kernel_shape": kernel, "strides": [int(s) for s in random.integers(1, 4, 2)], "pads": pads}
        x = random.integers(0, 256, sizes).astype(np.uint8)
        model = pool_model(window, sizes, functions=True)
        stock = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        ours = session(pool_model(window, sizes), copy, 1 + seed % 2)
        np.testing.assert_array_equal(ours.run(None, {"x": x})[0], stock.run(None, {"x": x})[0], err_msg=f"{seed}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pads": [2, 0, 0, 0]}, "pads of a pool must be less than its kernel's size"),
        ({"pads": [0, 0, 0, 2]}, "pads of a pool must be less than its kernel's size"),
        ({"pads": [0, -1, 0, 0]}, "pads not negative"),
        ({"strides": [0, 1]}, "strides"),
        ({"strides": [1, 65]}, "strides"),
        ({"kernel_shape": [2]}, "kernel_shape"),
        ({"kernel_shape": [2**40, 2]}, "none huge"),
        ({"kernel_shape": [9, 9], "pads": [0, 0, 0, 0]}, "window is larger"),
    ],
)
def test_bad_pools(library: Path, change: dict[str, list[int]], reason: str) -> None:
    window = {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 0, 0, 0]} | change
    with pytest.raises(Exception, match=reason):
        session(pool_model(window, [1, 2, 7, 7]), library).run(None, {"x": np.zeros((1, 2, 7, 7), np.uint8)})


# (weight, block, sparsity, input's size, stride, padding): each is laid out in another way.
LAYOUTS = {
    "a plane without seams, in bands": ((8, 160, 1, 1), 8, 0.5, (101, 103), 2, 0),
    "a plane with seams, in bands and slices": ((24, 360, 3, 3), 8, 0.5, (31, 33), 1, 1),
    "phases of a plane, in bands": ((24, 240, 3, 3), 4, 0.5, (61, 59), 2, 1),
    "tiles of rows": ((256, 256, 3, 3), 8, 0.5, (21, 23), 1, 1),
    "tiles of phases": ((320, 192, 3, 3), 8, 0.25, (21, 23), 2, 1),
    "tiles of pixels": ((64, 1200, 1, 1), 8, 0.5, (15, 17), 1, 0),
    "tiles of every third pixel": ((64, 1040, 1, 1), 4, 0.5, (31, 29), 3, 0),
    "a plane for each kernel column": ((160, 160, 3, 3), 8, 0.5, (7, 7), 1, 1),
    "phases of a plane for each kernel column": ((160, 160, 3, 3), 4, 0.5, (15, 13), 2, 1),
    "in place": ((64, 80, 1, 1), 8, 0.5, (33, 31), 1, 0),
}


# (channels, outputs of each, kernel, input's size, strides): planes at once, bands of rows, and wide ones.
DEPTHWISE = {
    "bands of a plane": (5, 1, (3, 3), (112, 113), (1, 1)),
    "bands of a plane, every second pixel": (5, 1, (3, 3), (113, 112), (2, 2)),
    "a row longer than a band": (2, 1, (3, 3), (5, 4200), (1, 1)),
    "some channels at once": (70, 1, (3, 3), (7, 7), (1, 1)),
    "two outputs of each channel": (9, 2, (5, 5), (14, 15), (2, 1)),
    "words that are no row of the kernel": (3, 1, (1, 12), (9, 40), (1, 4)),
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_layers(library: Path, case: str, quantized: bool) -> None:
    channels, multiplier, kernel, size, strides = DEPTHWISE[case]
    random, outputs = np.random.default_rng(3), channels * multiplier
    pads = (kernel[0] // 2, kernel[1] // 2, kernel[0] // 2, kernel[1] // 2)
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, pads, kernel, strides, strict=False)]
    layer = QLayer(
        block=1,
        weight=quantized_weight(random, (outputs, 1, *kernel), 1, 0.2, channels),
        x=random.integers(0, 256, (2, channels, *size)).astype(np.uint8),
        bias=random.integers(-1000, 1000, outputs).astype(np.int32),
        scale=np.full(outputs, 1e-3, np.float32),
        residual=random.integers(0, 256, (2, outputs, *out)).astype(np.uint8),
        x_zero_point=100,
        y_zero_point=90 if quantized else None,
        strides=strides,
        pads=pads,
        groups=channels,
        slope=0.1,
    )
    np.testing.assert_array_equal(Int8Kernels(library).run(layer), layer.expected)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(library: Path, layout: str, dense: bool) -> None:
    shape, block, sparsity, size, stride, pad = LAYOUTS[layout]
    random = np.random.default_rng(7)
    layer = QLayer(
        block=block,
        weight=quantized_weight(random, shape, block, 0.0 if dense else sparsity),
        x=random.integers(0, 256, (2, shape[1], *size)).astype(np.uint8),
        bias=random.integers(-1000, 1000, shape[0]).astype(np.int32),
        scale=np.full(shape[0], 1e-4, np.float32),
        x_zero_point=100,
        y_zero_point=90,
        strides=(stride, stride),
        pads=(pad, pad, pad, pad),
    )
    np.testing.assert_array_equal(Int8Kernels(library).run(layer), layer.expected)


def test_the_largest_products_do_not_saturate(library: Path) -> None:
    for x, zero_point, value in ((255, 0, 127), (255, 0, -127), (0, 255, 127), (0, 255, -127)):
        layer = QLayer(
            block=8,
            weight=np.full((8, 64), value, np.int8),
            x=np.full((40, 64), x, np.uint8),
            bias=np.zeros(8, np.int32),
            scale=np.ones(8, np.float32),
            x_zero_point=zero_point,
            y_zero_point=None,
        )
        assert abs(layer.expected).min() == 255 * 127 * 64
        np.testing.assert_array_equal(Int8Kernels(library).run(layer), layer.expected)


def test_halves_are_rounded_to_even_and_what_is_too_large_saturates(library: Path) -> None:
    bias = np.array([1, 3, 5, -1, -3, 2**31 - 1, -(2**31) + 1, 0], np.int32)
    layer = QLayer(
        block=8,
        weight=np.zeros((8, 4), np.int8),
        x=np.zeros((1, 4), np.uint8),
        bias=bias,
        scale=np.full(8, 0.5, np.float32),
        y_zero_point=10,
    )
    assert Int8Kernels(library).run(layer).tolist() == [[10, 12, 12, 10, 8, 255, 0, 10]]
