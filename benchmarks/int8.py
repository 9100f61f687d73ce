"""Rounding to int8 by calibration alone: accuracy and agreement, dense and pruned, beside what others make of the file.

    SLRC_DATA=~/data python benchmarks/int8.py resnet20                 # CIFAR-10, 256 training images calibrate
    SLRC_DATA=~/data python benchmarks/int8.py resnet56
    SLRC_DATA=~/data python benchmarks/int8.py imagenette_mobilenet_v2  # 96x96 pixels, likewise
    SLRC_DATA=~/data python benchmarks/int8.py mobilenet_v2             # ImageNet's weights, halves of 500 images
    SLRC_DATA=~/data python benchmarks/int8.py efficientnet_lite0

The dense network is captured, its batch norms are folded, and it is rounded and emitted for `ort+int8`.
`quantize_static` of onnxruntime gets the same float32 file and the same images: unsigned activations, a scale for
each output of a weight; OpenVINO, where it is installed, runs that file. The pruned network has lost half of its blocks
of `block:8x4` by `--method reconstruct`, from the same images; every layer with zeros is packed in int8. All other
files run in ONNX Runtime. For ImageNet, 250 of the 500 images calibrate and the others test, then the other way round;
what is shown is the mean. Writes `benchmarks/results/int8.json`; rows that are up to date are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Rows
from torch import Tensor, nn

import slrc
from slrc import pipeline
from slrc.backends import Runner, get_backend, parse_target
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.forms.form import Form, FormKind, Forms
from slrc.ir.program import Program
from slrc.machine.memory import keep_freed_memory
from slrc.measuring.choose_forms import form_candidates
from slrc.options import Int8Settings
from slrc.quantization.choose import quantize
from slrc.reconstruction.calibration import calibration_inputs

sys.path.insert(0, str(Path(__file__).parent / "convergence"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import imagenette
import reconstruct
import tasks

SAMPLES = 256
BATCH = 50
SPARSITIES = (0.0, 0.5)
PATTERN = "block:8x4"
PACKED = Form(FormKind.PACKED_INT8, 8)
INT8 = parse_target("ort+int8")
NAMES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "imagenette_mobilenet_v2": "MobileNetV2, Imagenette",
    "mobilenet_v2": "MobileNetV2, ImageNet",
    "efficientnet_lite0": "EfficientNet-Lite0, ImageNet",
}
Row = dict[str, Any]
Run = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=MEASURES)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command line does
    rows = Rows(__file__)
    for sparsity in SPARSITIES:
        key = row_key(args.network, sparsity)
        if not rows.has(key):
            about = {"network": args.network, "sparsity": sparsity, "threads": args.threads}
            rows.add(key, {**about, **MEASURES[args.network](sparsity)})
        figures = {k: v for k, v in rows[key].items() if not isinstance(v, dict)}
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), sep="  ")


def row_key(network: str, sparsity: float) -> str:
    """Return the name of a row."""
    return f"{network}, {PATTERN} {sparsity:.0%}" if sparsity else network


def round_both(model: nn.Module, images: Tensor, folder: Path, sparsity: float) -> tuple[dict[str, Run], Row]:
    """Return what runs a network in float32, rounded by slrc, and rounded by others, and how slrc rounded it."""
    workload = slrc.Workload(model=model, example_inputs=(images[:1],), calibration=images.split(BATCH))
    started = time.process_time()
    program, forms = pruned_program(workload, sparsity, len(images))
    inputs = calibration_inputs(program, workload, SAMPLES, 0)
    quantized = quantize(program, get_backend(INT8).scheme, inputs, Int8Settings(), logits=True, forms=forms)
    seconds = time.process_time() - started
    rounded = pipeline.pack_layers(quantized.program(), forms)
    emitted = {
        "float32": pipeline.lower(program, INT8.in_float, folder / "float32"),
        "int8": pipeline.lower(rounded, INT8, folder / "int8"),
    }
    threads, run = torch.get_num_threads(), get_backend(INT8).load
    calls = {name: _runs(run(lowered.folder, threads=threads)) for name, lowered in emitted.items()}
    sizes = {name: lowered.size_bytes / 1e6 for name, lowered in emitted.items()}
    if not sparsity:
        files = folder / "float32" / "model.onnx", folder / "onnxruntime.onnx"
        quantize_theirs(*files, program, images[:SAMPLES])
        sizes["onnxruntime"] = files[1].stat().st_size / 1e6
        calls["onnxruntime"] = _runs(OnnxRuntimeRunner(files[1], threads))
        if find_spec("openvino"):
            calls["openvino"] = openvino_runs(files[1], images.shape[1:])
    found = quantized.calibration
    about = {
        "ranges": found.ranges,
        "loss": found.loss,
        "float_layers": len(found.skipped),
        "layers": found.quantized_layers,
        "packed": len(forms),
        "seconds": seconds,
        "tried": dict(found.tried),
        "megabytes": sizes,
    }
    return calls, about


def pruned_program(workload: slrc.Workload, sparsity: float, images: int) -> tuple[Program, Forms]:
    """Return the program that is rounded, and its layers that are packed; dense at a sparsity of zero."""
    program = slrc.capture(workload)
    if not sparsity:
        return pipeline.baseline(program), {}
    plan = slrc.plan(program, PATTERN, sparsity)
    trained = slrc.train(workload, plan, method="reconstruct", reconstruct={"images": images})
    pruned = pipeline.structure(program.with_tensors(trained.tensors), trained.plan, trained.masks)
    return pruned, {w: PACKED for w, forms in form_candidates(pruned, INT8)[0].items() if PACKED in forms}


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


def _runs(runner: Runner) -> Run:
    return lambda x: torch.cat([runner(part)[0] for part in x.split(BATCH)])


def openvino_runs(file: Path, shape: torch.Size) -> Run:
    """Return what runs an ONNX file in OpenVINO."""
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    model.reshape([-1, *shape])
    compiled = core.compile_model(model, "CPU")
    return lambda x: torch.cat([torch.from_numpy(compiled([p.numpy()])[0].copy()) for p in x.split(BATCH)])


def measure_images(task: str, load: Callable[[str], tuple[Tensor, Tensor]], sparsity: float) -> Row:
    """A network of the convergence benchmark, with its dense start there; training images calibrate."""
    data, name = task.split("-")
    model = {"cifar": tasks.cifar_task, "imagenette": tasks.imagenette_task}[data](name).make().eval()
    scale = {"cifar": cifar10, "imagenette": imagenette}[data].normalize
    pixels, (test, labels) = load("train")[0], load({"cifar": "test", "imagenette": "val"}[data])
    drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return _halves(model, [(scale(pixels[drawn]).contiguous(), scale(test), labels)], sparsity)


def measure_imagenet(make: Callable[[], nn.Module], mean: float, deviation: float, sparsity: float) -> Row:
    """A network with ImageNet's weights, on two halves of the images in turn."""
    x, y = reconstruct.imagenet_images()
    x = (x - mean) / deviation
    first, second = torch.from_numpy(np.random.default_rng(1).permutation(len(y))).split(reconstruct.IMAGES)
    parts = [(x[a], x[b], y[b]) for a, b in ((first, second), (second, first))]
    return _halves(make().eval(), parts, sparsity)


def _halves(model: nn.Module, parts: list[tuple[Tensor, Tensor, Tensor]], sparsity: float) -> Row:
    total: dict[str, float] = {}
    about: Row = {}
    for calibration, test, labels in parts:
        with tempfile.TemporaryDirectory() as folder:
            runs, about = round_both(copy.deepcopy(model), calibration, Path(folder), sparsity)
            classes = {name: run(test).argmax(1) for name, run in runs.items()}
        right = {name: float((found == labels).float().mean()) for name, found in classes.items()}
        alike = {f"agreement_{n}": float((c == classes["float32"]).float().mean()) for n, c in classes.items()}
        for name, share in {**right, **alike}.items():
            if name != "agreement_float32":
                total[name] = total.get(name, 0.0) + 100 * share / len(parts)
    return {**total, **about}


MEASURES: dict[str, Callable[[float], Row]] = {
    "resnet20": lambda s: measure_images("cifar-resnet20", cifar10.load_images, s),
    "resnet56": lambda s: measure_images("cifar-resnet56", cifar10.load_images, s),
    "imagenette_mobilenet_v2": lambda s: measure_images("imagenette-mobilenet_v2", imagenette.load_images, s),
    "mobilenet_v2": lambda s: measure_imagenet(reconstruct.mobilenet_v2, 127.5, 127.5, s),
    "efficientnet_lite0": lambda s: measure_imagenet(reconstruct.efficientnet_lite0, 127, 128, s),
}


if __name__ == "__main__":
    main()
