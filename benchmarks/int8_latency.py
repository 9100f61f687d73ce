"""Whole networks in int8: dense and pruned, in float32 and in int8, timed in turns in one process.

    taskset -c 1 python benchmarks/int8_latency.py                           # about half an hour of one quiet core
    taskset -c 1 python benchmarks/int8_latency.py resnet18 --sparsity 0.75
    taskset -c 1 python benchmarks/int8_latency.py --openvino                # also OpenVINO, where it is installed

Random weights with blocks of `block:8x4`, pruned by magnitude in one shot, and scales from the example image: how fast
a network is does not depend on what it has learnt. The first layer, the classifier and depthwise layers are not pruned.
There are four models: dense and compiled for `ort`, dense and compiled for `ort+int8`. Compiled ones get the form of
each layer that a compile would choose on this machine. Beside them stands the dense file that onnxruntime's own tool
quantises, in a session as ONNX Runtime opens it: where a processor has no VNNI its sums may overflow, which those of
slrc do not. OpenVINO runs that file too. Rows go to `benchmarks/results/int8_latency.json` as they come, and a second
run goes on with what is missing or out of date.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
from int8 import quantize_theirs
from results import Rows, vectors
from sparse_latency import network
from torch import Tensor

import slrc
from slrc.backends import LoweredProgram, get_backend, parse_target
from slrc.forms.form import FormChoice
from slrc.ir.program import Program
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.jobs import Formed, to_be_timed
from slrc.measuring.timing import REPORT, in_blocks, time_in_turns
from slrc.pipeline import baseline, lower, structure
from slrc.sparsity.masks import Masks

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
SPARSITIES = (0.75, 0.9)
PATTERN = "block:8x4"
FLOAT, INT8 = parse_target("ort"), parse_target("ort+int8")
CORNERS = ("dense", "dense-int8", "compiled", "compiled-int8")
Call = Callable[[], Any]
Row = dict[str, Any]


def measure_row(name: str, sparsity: float, *, openvino: bool = False) -> Row:
    """Choose, emit and time the four models of one network, and OpenVINO's."""
    program = network(name, 1)
    plan = slrc.plan(program, PATTERN, sparsity, round_to=1)
    pruned, dense = structure(program, plan, Masks.project(plan, program.tensors)), baseline(program)
    choices = {t: choose_forms(pruned, t, threads=1) for t in (FLOAT, INT8)}
    inputs = dense.flat_inputs()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        models = {
            "dense": lower(dense, FLOAT, folder / "dense"),
            "dense-int8": lower(to_be_timed(Formed(dense), INT8), INT8, folder / "dense-int8"),
            "compiled": _emitted(pruned, choices[FLOAT], folder / "compiled"),
            "compiled-int8": _emitted(pruned, choices[INT8], folder / "compiled-int8"),
        }
        calls = {x: get_backend(m.target).load(m.folder, threads=1).prepare(*inputs) for x, m in models.items()}
        files = models["dense"].folder / "model.onnx", folder / "theirs.onnx"
        quantize_theirs(*files, dense, inputs[0])
        calls["onnxruntime-int8"] = onnxruntime_call(files[1], inputs[0])
        if openvino:
            calls |= {f"openvino{x}": openvino_call(f, inputs[0]) for x, f in zip(("", "-int8"), files, strict=True)}
        times = dict(zip(calls, time_in_turns(list(calls.values()), REPORT), strict=True))
    return {
        "ms": {corner: statistics.median(ms) for corner, ms in times.items()},
        "over": {x: ratio(times[x], times["compiled-int8"]) for x in times if x != "compiled-int8"},
        "taken": choices[INT8].taken,
        "whole_ms": dict(choices[INT8].whole_ms),
        "forms": dict(Counter(str(form) for form in choices[INT8].forms.values())),
        "layers": len(program.layers),
        "sparsity_reached": plan.sparsity,
    }


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """Return how many times as fast the second is: the median, the least and the greatest over blocks of runs."""
    blocks = [statistics.median(a) / statistics.median(b) for a, b in in_blocks(slow, fast)]
    return [statistics.median(blocks), min(blocks), max(blocks)]


def _emitted(program: Program, choice: FormChoice, folder: Path) -> LoweredProgram:
    target = parse_target(choice.target)
    return lower(to_be_timed(Formed(program, choice.forms), target), target, folder)


def onnxruntime_call(file: Path, image: Tensor) -> Call:
    """Return a call that runs an ONNX file in ONNX Runtime with its usual options, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(file: Path, image: Tensor) -> Call:
    """Return a call that runs an ONNX file in OpenVINO, on one thread, for latency."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(image.numpy(), shared_memory=True))
    return request.infer


def key(name: str, sparsity: float, on: str) -> str:
    """Return the name of a row, measured on a processor with such `vectors`."""
    return f"{name} {sparsity:g} {on}"


def main() -> None:
    """Run what is missing, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = Rows(__file__, args.results)
    for name in args.networks:
        for sparsity in args.sparsity:
            row_key = key(name, sparsity, vectors())
            if args.again or not rows.has(row_key):
                rows.add(row_key, measure_row(name, sparsity, openvino=args.openvino))
            row = rows[row_key]
            times = ", ".join(f"{corner} {ms:.2f} ms" for corner, ms in row["ms"].items())
            print(f"{row_key}: {times}; {row['taken']}: {row['forms']}", flush=True)


if __name__ == "__main__":
    main()
