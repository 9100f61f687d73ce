"""Block-sparse int8 kernels against ONNX Runtime's dense int8 convolution, layer by layer, on one thread.

    taskset -c 1 python benchmarks/int8_kernel_latency.py
    SLRC_KERNEL_ISA=avx2 taskset -c 1 python benchmarks/int8_kernel_latency.py --sparsities 0.75

For each layer of a ResNet and each sparsity: a model of that layer alone, dense (`QLinearConv`) and packed in blocks of
M outputs × 4 input channels, in turns (A B B A), from uint8 to uint8; both must give the same bits. Prints a table (the
ratio of medians; operations on the surviving weights, 10⁹ a second, and as a share of the greatest rate of multiply-adds
that a loop of nothing else reaches) and puts each row in `benchmarks/results/int8_kernel_latency.json`. `--network` adds
the sum over ResNet-50's convolutions of 3×3 and 1×1.
"""

from __future__ import annotations

import argparse
import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from kernel_latency import SHAPES, Shape, in_turns
from onnx import TensorProto, helper, numpy_helper
from results import Rows

from slrc.backends.int8_onnx import Int8Layer, Window, node_of
from slrc.forms.packed_int8 import PackedInt8
from slrc.kernels.build import build

X_ZERO, Y_ZERO = 3, 128

RESNET_50: tuple[tuple[Shape, int], ...] = (
    *((Shape(64, 64, 1, 56), 1), (Shape(256, 64, 1, 56), 2), (Shape(64, 64, 3, 56), 3), (Shape(64, 256, 1, 56), 4)),
    *((Shape(256, 128, 1, 56), 1), (Shape(512, 128, 1, 28), 3), (Shape(128, 128, 3, 28, 2), 1)),
    *((Shape(128, 128, 3, 28), 3), (Shape(128, 512, 1, 28), 4), (Shape(256, 512, 1, 28, 2), 1)),
    *((Shape(512, 256, 1, 28), 1), (Shape(1024, 256, 1, 14), 5), (Shape(256, 256, 3, 14, 2), 1)),
    *((Shape(256, 256, 3, 14), 5), (Shape(256, 1024, 1, 14), 6), (Shape(512, 1024, 1, 14, 2), 1)),
    *((Shape(1024, 512, 1, 14), 1), (Shape(2048, 512, 1, 7), 2), (Shape(512, 512, 3, 7, 2), 1)),
    *((Shape(512, 512, 3, 7), 2), (Shape(512, 2048, 1, 7), 3), (Shape(1024, 2048, 1, 7, 2), 1)),
)
"""ResNet-50's convolutions but the first, at 224×224, and how many there are of each."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    layer: str
    sparsity: float
    block: int
    dense_ms: float
    packed_ms: float
    speedup: float
    gops: float
    share_of_peak: float
    disturbed: float


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--network", action="store_true", help="the layers of ResNet-50 and their sum")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each pair of models")
    parser.add_argument("--library", type=Path, help="a library already built")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    library = args.library or build()
    kernels = ctypes.CDLL(str(library))
    kernels.slrc_int8_peak_gops.restype = ctypes.c_double
    kernels.slrc_int8_instruction_set.restype = ctypes.c_char_p
    peak = kernels.slrc_int8_peak_gops(ctypes.c_double(0.3))
    name = kernels.slrc_int8_instruction_set().decode()
    print(f"{name}, peak {peak:.0f} Gop/s")
    titles = ("dense ms", "packed ms", "speedup", "Gop/s", "peak", "disturbed")
    print(f"{'layer':20} {'sparsity':>8} {'block':>6} " + " ".join(f"{title:>9}" for title in titles))
    rows = Rows(__file__, args.out)
    counts = dict(RESNET_50) if args.network else dict.fromkeys(SHAPES, 1)
    for sparsity in args.sparsities:
        for block in args.blocks:
            dense_ms = packed_ms = 0.0
            for shape, count in counts.items():
                if args.layers not in str(shape):
                    continue
                row = measure(shape, sparsity, block, args.seconds, library, peak)
                dense_ms, packed_ms = dense_ms + count * row.dense_ms, packed_ms + count * row.packed_ms
                key = f"{row.layer} {sparsity:g} {block}x4 {name}"
                rows.add(key, asdict(row) | {"instruction_set": name, "peak_gops": peak})
                print(
                    f"{row.layer:20} {sparsity:8.2f} {block:4}x4 {row.dense_ms:9.3f} {row.packed_ms:9.3f}"
                    f" {row.speedup:8.2f}x {row.gops:9.1f} {row.share_of_peak:9.0%} {row.disturbed:9.0%}",
                    flush=True,
                )
            if args.network:
                total = {"dense_ms": dense_ms, "packed_ms": packed_ms, "speedup": dense_ms / packed_ms}
                rows.add(f"ResNet-50 {sparsity:g} {block}x4 {name}", total | {"instruction_set": name})
                print(
                    f"{'ResNet-50, summed':20} {sparsity:8.2f} {block:4}x4 {dense_ms:9.3f} {packed_ms:9.3f}"
                    f" {dense_ms / packed_ms:8.2f}x"
                )


def measure(shape: Shape, sparsity: float, block: int, seconds: float, library: Path, peak: float) -> Row:
    """Time one layer, dense and packed, in turns; check that they give the same bits."""
    random = np.random.default_rng(0)
    taps, quads = shape.kernel**2, shape.inputs // 4
    kept = round(quads * taps * (1 - sparsity))
    mask = np.argsort(random.random((shape.outputs // block, quads * taps)), axis=1) < kept
    spread = mask.reshape(-1, 1, quads, 1, taps).repeat(block, axis=1).repeat(4, axis=3)
    weight = random.integers(-127, 128, (shape.outputs, shape.inputs, shape.kernel, shape.kernel)).astype(np.int8)
    weight *= spread.reshape(weight.shape)
    bias = random.integers(-1000, 1000, shape.outputs).astype(np.int32)
    scale = np.full(shape.outputs, 2.0**-10 / np.sqrt(kept), np.float32)
    models = (dense_model(shape, weight, bias, scale), packed_model(shape, weight, bias, scale, block))
    dense, packed = (prepare(model, library) for model in models)
    assert (dense().numpy() == packed().numpy()).all(), f"{shape}: dense and packed differ"
    slow, fast, disturbed = in_turns(dense, packed, seconds)
    gops = 2e-9 * mask.sum() * block * 4 * shape.size**2 / fast
    return Row(str(shape), sparsity, block, slow * 1e3, fast * 1e3, slow / fast, gops, gops / peak, disturbed)


def prepare(model: Any, library: Path) -> Any:
    """Load a model with the kernels; return a call that runs it on random bytes and returns the output's buffer."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).integers(0, 256, session.get_inputs()[0].shape).astype(np.uint8)
    y = session.run(None, {"x": x})[0]
    output, binding = ort.OrtValue.ortvalue_from_numpy(y), session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", output)

    def call(_owned: object = (x, y)) -> Any:  # bound values do not keep the memory that they name
        session.run_with_iobinding(binding)
        return output

    return call


def dense_model(shape: Shape, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray) -> Any:
    """`QLinearConv`, whose scales are one but for the weight's."""
    one = np.float32(1)
    tensors = {
        "x_scale": one, "x_zero": np.uint8(X_ZERO), "w": weight, "w_scale": scale,
        "w_zero": np.zeros(shape.outputs, np.int8), "y_scale": one, "y_zero": np.uint8(Y_ZERO), "bias": bias,
    }  # fmt: skip
    node = helper.make_node("QLinearConv", ["x", *tensors], ["y"], **shape.attributes)
    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()]
    return model_of(node, initializers, shape)


def packed_model(shape: Shape, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, block: int) -> Any:
    """`BlockSparseQConv`."""
    packed = PackedInt8.of(torch.from_numpy(weight), block)
    window = Window(**shape.attributes)
    tensors = (torch.from_numpy(bias), torch.from_numpy(scale))
    layer = Int8Layer(packed, weight.shape, *tensors, x_zero_point=X_ZERO, y_zero_point=Y_ZERO, window=window)
    return model_of(*node_of(layer, "x", "y", "layer"), shape)


def model_of(node: Any, initializers: list[Any], shape: Shape) -> Any:
    """Return a model of one node from `x` to `y`."""
    sizes = [1, shape.inputs, *[shape.size * shape.stride] * 2]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, shape.outputs, shape.size, shape.size])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.slrc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


if __name__ == "__main__":
    main()
