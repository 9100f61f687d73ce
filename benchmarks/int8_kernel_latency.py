"""Block-sparse int8 kernels against ONNX Runtime's dense int8 convolution, layer by layer, on one thread.

    taskset -c 1 python benchmarks/int8_kernel_latency.py
    SLRC_KERNEL_ISA=avx2 taskset -c 1 python benchmarks/int8_kernel_latency.py --sparsities 0.75

For each layer of a ResNet and each sparsity: a model of that layer alone, dense (`QLinearConv`) and packed in blocks of
M outputs × 4 input channels, in turns (A B B A), from uint8 to uint8; both must give the same bits. Prints a table: the
ratio of medians; operations on the surviving weights, 10⁹ a second, and as a share of the greatest rate of
multiply-adds that a loop of nothing else reaches by vectors, which AMX exceeds. Then layers that are packed with no
zeros. Puts each row in `benchmarks/results/int8_kernel_latency.json`.

The dense layer alone brings its input into another layout and its output back. `--network` takes one model of the
convolutions of ResNet-50's bottlenecks, one behind the other, where that is done once; it is timed by the thread's CPU
time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from kernel_latency import LEAST_RUNS, SHAPES, Kernels, Report, Row, Shape, in_turns, options, prepare
from onnx import TensorProto, helper, numpy_helper

from slrc.backends.int8_onnx import Int8Layer, Window, node_of
from slrc.forms.packed_int8 import PackedInt8
from slrc.kernels.build import build

ZERO = 128

STAGES = ((64, 64, 3, 56, 1), (256, 128, 4, 28, 2), (512, 256, 6, 14, 2), (1024, 512, 3, 7, 2))
"""Of ResNet-50 at 224×224: inputs, width, bottlenecks, output size and the first one's stride."""


WHOLE = (
    Shape(3, 64, 7, 112, 2),
    Shape(3, 32, 3, 112, 2),
    *(Shape(c, c, 3, size, stride, groups=c) for c, size, stride in (
        (32, 112, 1), (96, 56, 2), (144, 56, 1), (192, 28, 1), (384, 14, 1), (960, 7, 1),
    )),
)  # fmt: skip
"""Layers that are packed whole: on an image, and depthwise ones as MobileNetV2's."""


def bottlenecks() -> list[Shape]:
    """Return the convolutions of ResNet-50's bottlenecks, one behind the other; what stands beside them is left out."""
    shapes = []
    for inputs, width, count, size, stride in STAGES:
        for k in range(count):
            first = stride if k == 0 else 1
            shapes.append(Shape(inputs if k == 0 else 4 * width, width, 1, size * first))
            shapes.append(Shape(width, width, 3, size, first))
            shapes.append(Shape(width, 4 * width, 1, size))
    return shapes


def main() -> None:
    """Measure, print and write."""
    parser = options(__doc__, [8])
    parser.add_argument("--network", action="store_true", help="the bottlenecks of ResNet-50 in one model")
    args = parser.parse_args()
    kernels = Kernels.of(args.library or build(int8=True), "slrc_int8_", "gops")
    report = Report(__file__, args.out, kernels, 4)
    for sparsity in args.sparsities:
        for block in args.blocks:
            chains = [[shape] for shape in SHAPES if args.layers in str(shape)]
            for shapes in [bottlenecks()] if args.network else chains:
                report.add(measure(shapes, sparsity, block, args.seconds, kernels))
    for shape in () if args.network else WHOLE:
        if args.layers in str(shape):
            report.add(measure([shape], 0.0, 1 if shape.groups > 1 else max(args.blocks), args.seconds, kernels))


@dataclass(frozen=True)
class Layer:
    """A random layer."""

    shape: Shape
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    values: int
    """Of the surviving blocks, without what fills them up."""


def random_layer(shape: Shape, sparsity: float, block: int) -> Layer:
    """Return a layer whose outputs have about the spread of its inputs."""
    random = np.random.default_rng(0)
    inputs = shape.inputs // shape.groups
    taps, quads = shape.kernel**2, -(-inputs // 4)
    kept = round(quads * taps * (1 - sparsity))
    mask = np.argsort(random.random((shape.outputs // block, quads * taps)), axis=1) < kept
    spread = mask.reshape(-1, 1, quads, 1, taps).repeat(block, axis=1).repeat(4, axis=3)
    weight = random.integers(-127, 128, (shape.outputs, inputs, shape.kernel, shape.kernel)).astype(np.int8)
    weight *= spread.reshape(shape.outputs, 4 * quads, shape.kernel, shape.kernel)[:, :inputs]
    bias = random.integers(-1000, 1000, shape.outputs).astype(np.int32)
    scale = np.full(shape.outputs, 2.0**-7 / np.sqrt(kept), np.float32)
    return Layer(shape, weight, bias, scale, int(mask.sum()) * block * min(4, inputs))


def measure(shapes: list[Shape], sparsity: float, block: int, seconds: float, kernels: Kernels) -> Row:
    """Time some layers one behind the other, dense and packed, in turns; check that they give the same bits."""
    layers = [random_layer(shape, sparsity, block) for shape in shapes]
    models = (model_of(layers, dense_node), model_of(layers, partial(packed_node, block)))
    dense, packed = (prepare(model, kernels.library) for model in models)
    assert (dense().numpy() == packed().numpy()).all(), f"{shapes}: dense and packed differ"
    timed = in_turns if len(layers) == 1 else in_turns_by_cpu
    slow, fast, disturbed = timed(dense, packed, seconds)
    gops = 2e-9 * sum(layer.values * layer.shape.size**2 for layer in layers) / fast
    name = str(shapes[0]) if len(shapes) == 1 else "ResNet-50 bottlenecks"
    return Row(name, sparsity, block, slow * 1e3, fast * 1e3, slow / fast, gops, gops / kernels.peak_gops, disturbed)


def in_turns_by_cpu(a: Callable[[], Any], b: Callable[[], Any], seconds: float) -> tuple[float, float, float]:
    """Return the median CPU seconds of two calls on this thread, run A B B A; none is thrown away.

    Of calls as long as the scheduler's time slice, on a busy machine hardly one is not interrupted.
    """
    times: tuple[list[float], list[float]] = ([], [])
    started = time.thread_time()
    while time.thread_time() - started < seconds or len(times[0]) < LEAST_RUNS:
        for which in (0, 1, 1, 0):
            begin = time.thread_time()
            (a, b)[which]()
            times[which].append(time.thread_time() - begin)
    return statistics.median(times[0]), statistics.median(times[1]), 0.0


def dense_node(layer: Layer, x: str, y: str) -> tuple[Any, list[Any]]:
    """`QLinearConv`, whose scales are one but for the weight's."""
    one, zero = np.float32(1), np.uint8(ZERO)
    tensors = {
        "x_scale": one, "x_zero": zero, "w": layer.weight, "w_scale": layer.scale,
        "w_zero": np.zeros(layer.shape.outputs, np.int8), "y_scale": one, "y_zero": zero, "bias": layer.bias,
    }  # fmt: skip
    names = {name: f"{y}.{name}" for name in tensors}
    node = helper.make_node("QLinearConv", [x, *names.values()], [y], **layer.shape.attributes)
    return node, [numpy_helper.from_array(np.asarray(a), names[n]) for n, a in tensors.items()]


def packed_node(block: int, layer: Layer, x: str, y: str) -> tuple[Any, list[Any]]:
    """`BlockSparseQConv`."""
    packed = PackedInt8.of(torch.from_numpy(layer.weight), block, layer.shape.groups)
    window = Window(**layer.shape.attributes)
    tensors = (torch.from_numpy(layer.bias), torch.from_numpy(layer.scale))
    emitted = Int8Layer(packed, layer.weight.shape, *tensors, x_zero_point=ZERO, y_zero_point=ZERO, window=window)
    return node_of(emitted, x, y, y)


def model_of(layers: list[Layer], node: Callable[[Layer, str, str], tuple[Any, list[Any]]]) -> Any:
    """Return a model of layers one behind the other, from `x` to `y`."""
    names = ["x", *(f"h{k}" for k in range(len(layers) - 1)), "y"]
    nodes, tensors = zip(*(node(layer, *names[k : k + 2]) for k, layer in enumerate(layers)), strict=True)
    first, last = layers[0].shape, layers[-1].shape
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, first.inputs, *[first.size * first.stride] * 2])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, last.outputs, last.size, last.size])],
        [*chain(*tensors)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.slrc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


if __name__ == "__main__":
    main()
