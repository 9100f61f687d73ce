"""Rounding to int8 by calibration alone: accuracy and agreement beside the dense network, and beside onnxruntime's own.

    SLRC_DATA=~/data python benchmarks/int8.py resnet20      # CIFAR-10, 256 training images calibrate
    SLRC_DATA=~/data python benchmarks/int8.py mobilenet_v2  # ImageNet's weights, halves of 500 images
    SLRC_DATA=~/data python benchmarks/int8.py efficientnet_lite0

The dense network is captured, its batch norms are folded, and it is rounded and emitted for `ort+int8`.
`quantize_static` of onnxruntime gets the same float32 file and the same images: unsigned activations, a scale for
each output of a weight. Both files run in ONNX Runtime. For ImageNet, 250 of the 500 images calibrate and the others
test, then the other way round; what is shown is the mean. Writes `benchmarks/results/int8.json`; rows that are up to
date are not measured again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Rows
from torch import Tensor, nn

import slrc
from slrc import pipeline
from slrc.backends import get_backend, parse_target
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.ir.program import Program
from slrc.options import Int8Settings
from slrc.quantization.choose import quantize
from slrc.reconstruction.calibration import calibration_inputs

sys.path.insert(0, str(Path(__file__).parent / "convergence"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import reconstruct
import tasks

SAMPLES = 256
BATCH = 50
Row = dict[str, Any]
Run = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=MEASURES)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows(__file__)
    if not rows.has(args.network):
        rows.add(args.network, {"network": args.network, "threads": args.threads, **MEASURES[args.network]()})
    figures = {k: v for k, v in rows[args.network].items() if not isinstance(v, dict)}
    print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), sep="  ")


def round_both(model: nn.Module, images: Tensor, folder: Path) -> tuple[dict[str, Run], Row]:
    """Return what runs the network dense, rounded by slrc, and rounded by onnxruntime, and how slrc rounded it."""
    workload = slrc.Workload(model=model, example_inputs=(images[:1],), calibration=images.split(BATCH))
    program, target = pipeline.baseline(slrc.capture(workload)), parse_target("ort+int8")
    started = time.process_time()
    inputs = calibration_inputs(program, workload, SAMPLES, 0)
    quantized = quantize(program, get_backend(target).scheme, inputs, Int8Settings(), logits=True)
    seconds = time.process_time() - started
    for name, made, where in (("float32", program, target.in_float), ("int8", quantized.program(), target)):
        pipeline.lower(made, where, folder / name)
    theirs = folder / "onnxruntime.onnx"
    quantize_theirs(folder / "float32" / "model.onnx", theirs, program, images[:SAMPLES])
    files = {"dense": folder / "float32" / "model.onnx", "int8": folder / "int8" / "model.onnx", "onnxruntime": theirs}
    found = quantized.calibration
    about = {
        "ranges": found.ranges,
        "loss": found.loss,
        "float_layers": len(found.skipped),
        "layers": found.quantized_layers,
        "seconds": seconds,
        "tried": dict(found.tried),
        "megabytes": {name: file.stat().st_size / 1e6 for name, file in files.items()},
    }
    return {name: _runs(OnnxRuntimeRunner(file, torch.get_num_threads())) for name, file in files.items()}, about


def quantize_theirs(model: Path, out: Path, program: Program, images: Tensor) -> None:
    """Quantise a file with onnxruntime's own tool, on the same images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            name = program.graph_module.graph.find_nodes(op="placeholder")[0].name
            self._batches: Iterator[dict[str, Any]] = iter({name: x.numpy()} for x in images.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    prepared = out.with_name("prepared.onnx")
    quant_pre_process(str(model), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _runs(runner: OnnxRuntimeRunner) -> Run:
    return lambda x: torch.cat([runner(part)[0] for part in x.split(BATCH)])


def measure_cifar() -> Row:
    """ResNet-20 on CIFAR-10, with the convergence benchmark's dense start."""
    model = tasks.cifar_task("resnet20").make().eval()
    pixels, (test, labels) = cifar10.load_images("train")[0], cifar10.load_images("test")
    drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return _halves(model, [(cifar10.normalize(pixels[drawn]).contiguous(), cifar10.normalize(test), labels)])


def measure_imagenet(make: Callable[[], nn.Module], mean: float, deviation: float) -> Row:
    """A network with ImageNet's weights, on two halves of the images in turn."""
    x, y = reconstruct.imagenet_images()
    x = (x - mean) / deviation
    first, second = torch.from_numpy(np.random.default_rng(1).permutation(len(y))).split(reconstruct.IMAGES)
    return _halves(make().eval(), [(x[a], x[b], y[b]) for a, b in ((first, second), (second, first))])


def _halves(model: nn.Module, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Row:
    total: dict[str, float] = {}
    about: Row = {}
    for calibration, test, labels in parts:
        with tempfile.TemporaryDirectory() as folder:
            runs, about = round_both(model, calibration, Path(folder))
            classes = {name: run(test).argmax(1) for name, run in runs.items()}
        right = {name: float((found == labels).float().mean()) for name, found in classes.items()}
        alike = {f"agreement_{n}": float((c == classes["dense"]).float().mean()) for n, c in classes.items()}
        for name, share in {**right, **alike}.items():
            if name != "agreement_dense":
                total[name] = total.get(name, 0.0) + 100 * share / len(parts)
    return {**total, **about}


MEASURES: dict[str, Callable[[], Row]] = {
    "resnet20": measure_cifar,
    "mobilenet_v2": lambda: measure_imagenet(reconstruct.mobilenet_v2, 127.5, 127.5),
    "efficientnet_lite0": lambda: measure_imagenet(reconstruct.efficientnet_lite0, 127, 128),
}


if __name__ == "__main__":
    main()
