"""Block-sparse kernels against ONNX Runtime's dense convolution, layer by layer, on one thread.

    taskset -c 1 python benchmarks/kernel_latency.py
    SLRC_KERNEL_ISA=avx2 taskset -c 1 python benchmarks/kernel_latency.py --blocks 8 --sparsities 0.75

For each layer of a ResNet, each sparsity and each block `M×1`: a model of that layer alone, dense and packed, in turns
(A B B A). Runs during which the thread lost its core are left out, and `disturbed` is their share. Prints a table: the
ratio of medians; operations on the surviving weights, 10⁹ a second, and as a share of the greatest rate of
multiply-adds that a loop of nothing else reaches. Puts each row in `benchmarks/results/kernel_latency.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from results import Rows

from slrc.forms.packed_weight import PackedWeight
from slrc.kernels.build import build
from slrc.machine.processor import processor

WARM_UP_S = 0.1
LEAST_RUNS = 10
PATIENCE = 20


@dataclass(frozen=True)
class Shape:
    """A square convolution."""

    inputs: int
    outputs: int
    kernel: int
    size: int
    """Of the output."""
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        strided = f"/{self.stride}" if self.stride > 1 else ""
        channels = f"depthwise {self.outputs}" if self.groups > 1 else f"{self.inputs}->{self.outputs}"
        return f"{self.kernel}x{self.kernel}{strided} {channels}@{self.size}"

    @property
    def attributes(self) -> dict[str, Any]:
        """The node's."""
        return {"strides": [self.stride] * 2, "pads": [self.kernel // 2] * 4, "group": self.groups}


SHAPES = (
    Shape(64, 64, 3, 56),
    Shape(128, 128, 3, 28),
    Shape(256, 256, 3, 14),
    Shape(512, 512, 3, 7),
    Shape(128, 128, 3, 28, 2),
    Shape(512, 512, 3, 7, 2),
    Shape(64, 256, 1, 56),
    Shape(256, 64, 1, 56),
    Shape(512, 128, 1, 28),
    Shape(1024, 256, 1, 14),
    Shape(512, 2048, 1, 7),
    Shape(256, 512, 1, 28, 2),
    Shape(1024, 2048, 1, 7, 2),
)


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


@dataclass(frozen=True)
class Kernels:
    """A library, the instruction set that it takes here, and the core's peak with that: operations, 10⁹ a second."""

    library: Path
    instruction_set: str
    peak_gops: float

    @staticmethod
    def of(library: Path, prefix: str, unit: str) -> Kernels:
        """Load a library and ask it, by the beginning of its functions' names and what its peak is counted in."""
        loaded = ctypes.CDLL(str(library))
        peak, name = getattr(loaded, f"{prefix}peak_{unit}"), getattr(loaded, f"{prefix}instruction_set")
        peak.restype, name.restype = ctypes.c_double, ctypes.c_char_p
        return Kernels(library, name().decode(), peak(ctypes.c_double(0.3)))


class Report:
    """Prints rows and writes them. Blocks are of so many columns."""

    def __init__(self, script: str, out: Path | None, kernels: Kernels, columns: int) -> None:
        self.rows, self.kernels, self.columns = Rows(script, out), kernels, columns
        print(f"{kernels.instruction_set}, peak {kernels.peak_gops:.0f} Gop/s")
        titles = ("dense ms", "packed ms", "speedup", "Gop/s", "peak", "disturbed")
        print(f"{'layer':22} {'sparsity':>8} {'block':>6} " + " ".join(f"{title:>9}" for title in titles))

    def add(self, row: Row, batch: int = 1) -> None:
        """Print and write a row."""
        name, block = self.kernels.instruction_set, f"{row.block}x{self.columns}"
        key = f"{row.layer} {row.sparsity:g} {block} {name} batch={batch}"
        machine = {"instruction_set": name, "peak_gops": self.kernels.peak_gops, "batch": batch}
        self.rows.add(key, asdict(row) | machine)
        print(
            f"{row.layer:22} {row.sparsity:8.2f} {block:>6} {row.dense_ms:9.3f} {row.packed_ms:9.3f}"
            f" {row.speedup:8.2f}x {row.gops:9.1f} {row.share_of_peak:9.0%} {row.disturbed:9.0%}",
            flush=True,
        )


def options(about: str | None, blocks: list[int]) -> argparse.ArgumentParser:
    """Return the options of a script that times layers."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=blocks)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each pair of models")
    parser.add_argument("--library", type=Path, help="a library already built")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    """Measure, print and write."""
    parser = options(__doc__, [4, 8, 16])
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    kernels = Kernels.of(args.library or build(), "slrc_", "gflops")
    report = Report(__file__, args.out, kernels, 1)
    for shape in (shape for shape in SHAPES if args.layers in str(shape)):
        for sparsity in args.sparsities:
            for block in args.blocks:
                report.add(measure(shape, sparsity, block, args.batch, args.seconds, kernels), args.batch)


def measure(shape: Shape, sparsity: float, block: int, batch: int, seconds: float, kernels: Kernels) -> Row:
    """Time one layer, dense and packed, in turns; check that they agree."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((shape.outputs, shape.inputs, shape.kernel, shape.kernel)).astype(np.float32)
    columns = shape.inputs * shape.kernel**2
    kept = round(columns * (1 - sparsity))
    mask = np.argsort(random.random((shape.outputs // block, columns)), axis=1) < kept
    weight *= mask.repeat(block, axis=0).reshape(weight.shape) / np.float32(np.sqrt(kept))
    models = (dense_model(shape, weight, batch), packed_model(shape, weight, block, batch))
    dense, packed = (prepare(model, kernels.library) for model in models)
    difference = np.abs(dense().numpy() - packed().numpy()).max()
    assert difference < 1e-3, f"{shape}: dense and packed differ by {difference}"
    slow, fast, disturbed = in_turns(dense, packed, seconds)
    gops = 2e-9 * mask.sum() * block * batch * shape.size**2 / fast
    peak = kernels.peak_gops
    return Row(str(shape), sparsity, block, slow * 1e3, fast * 1e3, slow / fast, gops, gops / peak, disturbed)


def in_turns(a: Callable[[], Any], b: Callable[[], Any], seconds: float) -> tuple[float, float, float]:
    """Return the median seconds of two calls, run A B B A, and the share of runs that were thrown away.

    A run during which the thread lost its core is thrown away: on a busy machine nearly every run that is long against
    the scheduler's time slice is interrupted and nearly no short one, so turns alone would flatter the shorter call.
    """
    for call in (a, b):
        until = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < until:
            call()
    times: tuple[list[float], list[float]] = ([], [])
    runs, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or min(map(len, times)) < LEAST_RUNS:
        if passed > PATIENCE * seconds:
            raise SystemExit(f"error: the core is too busy: {sum(map(len, times))} of {runs} runs were undisturbed")
        for which in (0, 1, 1, 0):
            call, switches, begin = (a, b)[which], _switches(), time.perf_counter()
            call()
            took = time.perf_counter() - begin
            runs += 1
            if _switches() == switches:
                times[which].append(took)
    return statistics.median(times[0]), statistics.median(times[1]), 1 - sum(map(len, times)) / runs


def _switches() -> int:
    """How often this thread has lost its core."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_nivcsw + usage.ru_nvcsw


def prepare(model: Any, library: Path | None = None) -> Callable[[], Any]:
    """Load a model, with the kernels if their library is given; return a call that runs it on random inputs.

    The call returns the first output's buffer.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not processor().has_vnni:
        options.add_session_config_entry("session.x64quantprecision", "1")  # else sums of bytes overflow
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    inputs = {value.name: _random_input(random, value) for value in session.get_inputs()}
    arrays = session.run(None, inputs)
    outputs = [ort.OrtValue.ortvalue_from_numpy(y) for y in arrays]
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for value, buffer in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_ortvalue_output(value.name, buffer)

    def call(_owned: object = (inputs, arrays)) -> Any:  # bound values do not keep the memory that they name
        session.run_with_iobinding(binding)
        return outputs[0]

    return call


def _random_input(random: np.random.Generator, value: Any) -> np.ndarray:
    """Return bytes or normal numbers, as a model's input asks for; a size that is left open is one."""
    size = [d if isinstance(d, int) else 1 for d in value.shape]
    if value.type == "tensor(uint8)":
        return random.integers(0, 256, size).astype(np.uint8)
    return random.standard_normal(size).astype(np.float32)


def dense_model(shape: Shape, weight: np.ndarray, batch: int) -> Any:
    """`Conv`."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], **shape.attributes)
    return model_of(node, {"w": weight}, shape, batch)


def packed_model(shape: Shape, weight: np.ndarray, block: int, batch: int) -> Any:
    """`BlockSparseConv`."""
    packed = {n: t.numpy() for n, t in vars(PackedWeight.of(torch.from_numpy(weight), block)).items()}
    node = helper.make_node(
        "BlockSparseConv",
        ["x", *packed],
        ["y"],
        domain="ai.slrc",
        **shape.attributes,
        dilations=[1, 1],
        block=block,
        weight_shape=weight.shape,
        activation="none",
    )
    return model_of(node, packed, shape, batch)


def model_of(node: Any, tensors: dict[str, np.ndarray], shape: Shape, batch: int) -> Any:
    """Return a model of one node from `x` to `y`."""
    sizes = [batch, shape.inputs, *[shape.size * shape.stride] * 2]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, shape.outputs, shape.size, shape.size])],
        [numpy_helper.from_array(a, n) for n, a in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.slrc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


if __name__ == "__main__":
    main()
