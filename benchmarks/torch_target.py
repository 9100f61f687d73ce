"""Ten networks of torchvision as packages of PyTorch's AOTInductor: half of the channels against dense, on the CPU.

    taskset -c 1 python benchmarks/torch_target.py                # all: ten minutes of one core, most of them compiling
    taskset -c 1 python benchmarks/torch_target.py resnet18

Random weights, pruned by magnitude in one shot: how fast a network is does not depend on what it has learnt. The
compiled package must return what the eager network does with its masks applied, for one image and for three. Dense and
compiled are timed in turns on one thread. Rows go to `benchmarks/results/torch_target.json` as they come, and a second
run goes on with what is missing or out of date.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import Rows

import slrc
from slrc.backends import LoweredProgram, get_backend, parse_target
from slrc.ir.program import Program
from slrc.measuring.timing import time_pair
from slrc.pipeline import baseline, lower
from slrc.training.batch_norm import recalibrate_batch_norm
from slrc.verify import compare, outputs_of

NETWORKS = (
    *("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("shufflenet_v2_x1_0", "mnasnet1_0", "resnet50", "googlenet", "efficientnet_b0"),
)
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": True}}
PIXELS = 128
SPARSITY = 0.5
BATCHES = (1, 3)
TARGET = parse_target("torch")


def measure_row(name: str) -> dict[str, Any]:
    """Return how fast one network is, dense and with fewer channels, and how exact the compiled one is."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()
    # Else values shrink from layer to layer until nothing of them reaches the outputs that are compared.
    recalibrate_batch_norm(model, lambda module, x: module(x), [torch.randn(4, 3, PIXELS, PIXELS)], 1)
    workload = slrc.Workload(model=model, example_inputs=(torch.randn(1, 3, PIXELS, PIXELS),), name=name)
    program = slrc.capture(workload)
    plan = slrc.plan(program, "channel", SPARSITY)
    masks = slrc.Masks.project(plan, program.tensors)
    slim = slrc.structure(program, plan, masks)
    model.requires_grad_(False)
    masks.apply_(dict(model.named_parameters(remove_duplicate=False)))
    with tempfile.TemporaryDirectory() as folder:
        dense, dense_seconds = timed_lower(baseline(program), Path(folder) / "dense")
        compiled, seconds = timed_lower(slim, Path(folder) / "compiled")
        runner = get_backend(TARGET).load(compiled.folder, threads=1)
        errors = []
        for batch in BATCHES:
            x = torch.randn(batch, 3, PIXELS, PIXELS)
            found = compare(name, outputs_of(model, (x,)), runner(x), get_backend(TARGET).tolerance(compiled.artifact))
            errors.append(found.max_rel_error)
        latency = time_pair(dense, compiled, slim.flat_inputs(), 1)
        sizes = dense.size_bytes, compiled.size_bytes
    return {
        "speedup": latency.speedup,
        "spread": latency.speedup_spread,
        "dense_ms": latency.dense_ms.p50,
        "compiled_ms": latency.compiled_ms.p50,
        "max_rel_error": max(errors),
        "macs_left": slim.macs / program.macs,
        "dense_bytes": sizes[0],
        "compiled_bytes": sizes[1],
        "compile_seconds": (dense_seconds, seconds),
    }


def timed_lower(program: Program, folder: Path) -> tuple[LoweredProgram, float]:
    """Return a package and the seconds that it took to compile."""
    start = time.perf_counter()
    return lower(program, TARGET, folder), time.perf_counter() - start


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(__file__, args.results)
    for name in args.networks:
        if args.again or not rows.has(name):
            rows.add(name, measure_row(name))
        row = rows[name]
        print(
            f"{name:20} {row['dense_ms']:8.2f} ms {row['compiled_ms']:8.2f} ms {row['speedup']:5.2f}x "
            f"({row['spread'][0]:.2f} to {row['spread'][1]:.2f}), error {row['max_rel_error']:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
