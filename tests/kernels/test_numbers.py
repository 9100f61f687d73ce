"""The kernels against torch, on random layers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from kernel_layers import ACTIVATIONS, Kernels, Layer, random_conv, random_gemm, sparse_weight
from kernel_models import feed, layer_parts, make_model, mlp_parts, planes_session, session

CASES = min(1000, int(os.environ.get("SLRC_FUZZ", "2400")) // 10)  # all stay in memory
TOLERANCE = 2e-5


def random_layer(seed: int) -> Layer:
    random = np.random.default_rng(seed)
    return random_conv(random) if seed % 3 else random_gemm(random)


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return [random_layer(seed) for seed in range(CASES)]


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "neon"])
def test_each_instruction_set_agrees_with_torch(
    library: Path, layers: list[Layer], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLRC_KERNEL_ISA", name)
    copy = shutil.copy(library, tmp_path)  # a library chooses the set once, when it is first asked
    kernels = Kernels(Path(copy))
    if kernels.instruction_set == "none":
        pytest.skip(f"this processor has no {name}")
    assert kernels.instruction_set == name
    for seed, layer in enumerate(layers):
        error = np.abs(kernels.run(layer) - layer.expected()).max(initial=0)
        assert error < TOLERANCE, f"seed {seed}: {error}"


@pytest.mark.parametrize("threads", [1, 4])
def test_onnxruntime_runs_them(library: Path, threads: int) -> None:
    layers = {f"n{seed}_": random_layer(seed) for seed in range(100)}
    model = make_model([layer_parts(layer, name) for name, layer in layers.items()])
    running = session(model, library, threads)
    feeds = {key: x for name, layer in layers.items() for key, x in feed(layer, name).items()}
    for _ in range(2):  # the second run finds its layouts and scratch memory
        for layer, y in zip(layers.values(), running.run(None, feeds), strict=True):
            np.testing.assert_allclose(y, layer.expected(), atol=TOLERANCE)


def big_layer(activation: str = "silu") -> Layer:
    random = np.random.default_rng(3)
    return Layer(
        block=8,
        weight=sparse_weight(random, (128, 96, 3, 3), 8, 0.75),
        x=random.standard_normal((2, 96, 40, 40)).astype(np.float32),
        bias=random.standard_normal(128).astype(np.float32),
        residual=random.standard_normal((2, 128, 40, 40)).astype(np.float32),
        activation=activation,
        pads=(1, 1, 1, 1),
    )


def test_threads_give_the_same_bits(library: Path) -> None:
    layer = big_layer()
    model = make_model([layer_parts(layer)])
    one, four = (session(model, library, threads).run(None, feed(layer))[0] for threads in (1, 4))
    np.testing.assert_array_equal(one, four)
    np.testing.assert_allclose(one, layer.expected(), atol=TOLERANCE)


# (weight, block, sparsity, input's size, stride, padding): each is laid out in another way.
LAYOUTS = {
    "a plane without seams, in bands": ((8, 40, 1, 1), 8, 0.5, (101, 103), 2, 0),
    "a plane with seams, in bands and slices": ((24, 90, 3, 3), 8, 0.5, (61, 63), 1, 1),
    "phases of a plane, in bands": ((24, 60, 3, 3), 4, 0.5, (121, 119), 2, 1),
    "tiles of rows": ((256, 64, 3, 3), 8, 0.5, (41, 43), 1, 1),
    "tiles of rows and seams": ((160, 80, 3, 3), 16, 0.5, (9, 11), 1, 1),
    "tiles of phases": ((320, 48, 3, 3), 8, 0.25, (31, 33), 2, 1),
    "tiles of pixels": ((64, 300, 1, 1), 8, 0.5, (15, 17), 1, 0),
    "tiles of every second pixel": ((64, 260, 1, 1), 4, 0.5, (31, 29), 2, 0),
    "tiles of every third pixel": ((64, 260, 1, 1), 4, 0.5, (31, 29), 3, 0),
    "a plane for each kernel column": ((160, 40, 3, 3), 8, 0.5, (7, 7), 1, 1),
    "phases of a plane for each kernel column": ((160, 40, 3, 3), 4, 0.5, (15, 13), 2, 1),
    "in place": ((64, 20, 1, 1), 8, 0.5, (33, 31), 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_layout(library: Path, layout: str, groups: int) -> None:
    shape, block, sparsity, size, stride, pad = LAYOUTS[layout]
    random = np.random.default_rng(7)
    out = [(s + 2 * pad - shape[2]) // stride + 1 for s in size]
    layer = Layer(
        block=block,
        weight=sparse_weight(random, (groups * shape[0], *shape[1:]), block, sparsity, groups),
        x=random.standard_normal((2, groups * shape[1], *size)).astype(np.float32),
        residual=random.standard_normal((2, groups * shape[0], *out)).astype(np.float32),
        activation="relu",
        strides=(stride, stride),
        pads=(pad, pad, pad, pad),
        groups=groups,
    )
    expected = layer.expected()
    np.testing.assert_allclose(Kernels(library).run(layer), expected, atol=TOLERANCE)
    model = make_model([layer_parts(layer)])
    for threads in (1, 3):
        np.testing.assert_allclose(session(model, library, threads).run(None, feed(layer))[0], expected, atol=TOLERANCE)


def test_a_padded_stride_that_keeps_the_size(library: Path) -> None:
    random = np.random.default_rng(2)
    layer = Layer(
        block=8,
        weight=sparse_weight(random, (8, 20, 1, 1), 8, 0.5),
        x=random.standard_normal((1, 20, 3, 3)).astype(np.float32),
        strides=(2, 2),
        pads=(0, 0, 2, 2),
    )
    np.testing.assert_allclose(Kernels(library).run(layer), layer.expected(), atol=TOLERANCE)


def test_many_runs_at_once_in_one_session(library: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    layer = big_layer()
    running = session(make_model([layer_parts(layer)]), library, 2)
    expected = layer.expected()
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: running.run(None, feed(layer))[0], range(12)):
            np.testing.assert_allclose(y, expected, atol=TOLERANCE)


def test_one_session_takes_many_sizes(library: Path) -> None:
    """What a size gives does not depend on the sizes before it, though they want the weight in another order."""
    random = np.random.default_rng(5)
    weight = sparse_weight(random, (16, 6, 3, 3), 8, 0.5)
    running, first = None, {}
    for size in [9, 4, 17, 200, 9, 30, 8, 7, 6, 5, 11, 12, 200, 210, 9]:
        x = np.random.default_rng(size).standard_normal((1, 6, size, size + 1)).astype(np.float32)
        layer = Layer(block=8, weight=weight, x=x, pads=(1, 1, 1, 1))
        if running is None:
            node, inputs, tensors, output = layer_parts(layer)
            for dim in inputs[0].type.tensor_type.shape.dim:
                dim.dim_param = "any"
            running = session(make_model([(node, inputs, tensors, output)]), library)
        y = running.run(None, {"x": x})[0]
        np.testing.assert_allclose(y, layer.expected(), atol=TOLERANCE)
        np.testing.assert_array_equal(y, first.setdefault(size, y))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 5, 40), (3, 2, 50, 40)])
def test_gemm_takes_any_leading_dimensions(library: Path, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    layer = Layer(
        block=4,
        weight=sparse_weight(random, (22, 40), 4, 0.5),
        x=random.standard_normal(shape).astype(np.float32),
        activation="gelu",
    )
    y = session(make_model([layer_parts(layer)]), library).run(None, feed(layer))[0]
    assert y.shape == (*shape[:-1], 22)
    np.testing.assert_allclose(y, layer.expected(), atol=TOLERANCE)


def random_mlp(random: np.random.Generator) -> tuple[Layer, Layer]:
    """Two matrices, the hidden channels now and then more than a cache holds for one panel of tokens."""
    up = replace(random_gemm(random), residual=None)
    hidden = up.expected()
    if random.random() < 0.2:
        up = replace(up, weight=sparse_weight(random, (1500, up.x.shape[1]), up.block, 0.9), bias=None)
        hidden = up.expected()
    size = int(random.integers(1, 70))
    block = int(random.choice([1, 4, 8, 16]))
    down = Layer(
        block=block,
        weight=sparse_weight(random, (size, hidden.shape[1]), block, float(random.choice([0.0, 0.75, 1.0]))),
        x=hidden,
        bias=random.standard_normal(size).astype(np.float32),
        residual=random.standard_normal((len(hidden), size)).astype(np.float32) if random.random() < 0.5 else None,
        activation="none",
    )
    return replace(up, bias=random.standard_normal(hidden.shape[1]).astype(np.float32)), down


@pytest.mark.parametrize("threads", [1, 4])
def test_two_matrices_at_once(library: Path, threads: int) -> None:
    random = np.random.default_rng(4)
    for _ in range(60):
        up, down = random_mlp(random)
        down = replace(down, x=up.expected())
        running = session(make_model([mlp_parts(up, down)]), library, threads)
        given = feed(up) | ({} if down.residual is None else {"residual": down.residual})
        for _ in range(2):
            np.testing.assert_allclose(running.run(None, given)[0], down.expected(), atol=2 * TOLERANCE)


@pytest.mark.parametrize("threads", [1, 2])
def test_pools_of_random_shapes(library: Path, threads: int) -> None:
    random = np.random.default_rng(2)
    running = planes_session("MaxPool2x2", library, threads)
    for _ in range(60):
        height, width = random.integers(2, 80, 2)
        x = random.standard_normal((2, 3, height, width)).astype(np.float32)
        x[random.random(x.shape) < 0.01] = np.nan
        even = x[:, :, : height // 2 * 2, : width // 2 * 2]
        expected = even.reshape(2, 3, height // 2, 2, width // 2, 2).max((3, 5))
        np.testing.assert_array_equal(running.run(None, {"x": x})[0], expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_upsampling_of_random_shapes(library: Path, threads: int) -> None:
    random = np.random.default_rng(2)
    running = planes_session("UpsampleBilinear2x", library, threads)
    for _ in range(60):
        x = torch.from_numpy(random.standard_normal((2, 3, *random.integers(1, 70, 2))).astype(np.float32))
        expected = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        np.testing.assert_allclose(running.run(None, {"x": x.numpy()})[0], expected, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("op_type", "order"), [("ChannelsFirst", (0, 3, 1, 2)), ("ChannelsLast", (0, 2, 3, 1))])
def test_layouts_of_random_shapes(library: Path, op_type: str, order: tuple[int, ...], threads: int) -> None:
    random = np.random.default_rng(2)
    running = planes_session(op_type, library, threads)
    for _ in range(60):
        x = random.standard_normal((2, *random.integers(1, 150, 3) // random.permuted([1, 5, 5]))).astype(np.float32)
        np.testing.assert_array_equal(running.run(None, {"x": x})[0], x.transpose(order))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_shuffles_of_random_shapes(library: Path, block: int, threads: int) -> None:
    random = np.random.default_rng(2)
    running = planes_session("DepthToSpace", library, threads, blocksize=block)
    for _ in range(30):
        n, c, h, w = random.integers(1, [3, 6, 40, 70])
        x = random.standard_normal((n, block, block, c, h, w)).astype(np.float32)
        expected = x.transpose(0, 3, 4, 1, 5, 2).reshape(n, c, h * block, w * block)
        np.testing.assert_array_equal(running.run(None, {"x": x.reshape(n, -1, h, w)})[0], expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(library: Path, activation: str) -> None:
    values = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-6, 6, 4001), [0.0, -0.0]]).astype(np.float32)
    layer = Layer(block=4, weight=np.eye(4, 1, dtype=np.float32), x=values.reshape(-1, 1), activation=activation)
    y = session(make_model([layer_parts(layer)]), library).run(None, feed(layer))[0]
    np.testing.assert_allclose(y, layer.expected(), rtol=1e-5, atol=1e-6)


def test_python_and_the_library_list_the_same_activations(library: Path) -> None:
    name_of = ctypes.CDLL(str(library)).slrc_activation
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    assert [name_of(k) for k in range(len(ACTIVATIONS) + 1)] == [*(name.encode() for name in ACTIVATIONS), None]


def test_nan_is_kept(library: Path) -> None:
    for activation in ACTIVATIONS:
        x = np.full((20, 3), np.nan, np.float32)
        layer = Layer(block=8, weight=np.ones((8, 3), np.float32), x=x, activation=activation)
        y = session(make_model([layer_parts(layer)]), library).run(None, feed(layer))[0]
        assert np.isnan(y).all(), activation


def test_an_empty_batch_is_empty(library: Path) -> None:
    random = np.random.default_rng(0)
    conv = sparse_weight(random, (8, 3, 3, 3), 8, 0.5)
    gemm = sparse_weight(random, (8, 3), 8, 0.5)
    for weight, shape, expected in ((conv, (0, 3, 5, 5), (0, 8, 3, 3)), (gemm, (0, 3), (0, 8))):
        layer = Layer(block=8, weight=weight, x=np.zeros(shape, np.float32))
        assert session(make_model([layer_parts(layer)]), library).run(None, feed(layer))[0].shape == expected


def test_an_unknown_instruction_set_is_refused(library: Path) -> None:
    code = f"import onnxruntime as o; o.SessionOptions().register_custom_ops_library({str(library)!r})"
    environment = {**os.environ, "SLRC_KERNEL_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SLRC_KERNEL_ISA" in done.stderr


def test_the_runtime_is_new_enough_here() -> None:
    assert tuple(int(n) for n in ort.__version__.split(".")[:2]) >= (1, 17)
