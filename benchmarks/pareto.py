"""Accuracy against measured milliseconds: what a share of the dense latency costs, by pattern and allocation.

    export SLRC_DATA=~/data
    python benchmarks/pareto.py small              # Fashion-MNIST's two networks: an hour on one core
    python benchmarks/pareto.py middle             # CIFAR-10's ResNet-20, Imagenette's MobileNetV2: days
    python benchmarks/pareto.py middle --only '*mobilenet*auto@0.5*'

Every row starts from the same dense weights, plans for a share of the dense latency in ONNX Runtime on one thread,
trains with the recipe of the package, and times what comes out against the dense network, in turns. `auto` mixes
patterns over layers, `block:8x1` and `channel` share the budget out over layers, `uniform` prunes the same share of
each. One tenth of the training images is for validation; test images are looked at once, at the end.

Rows are appended to `benchmarks/results/pareto.jsonl` as they come. An interrupted run goes on with what is missing, a
row that takes long from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).parent / "convergence"))
from results import file_of, made_with
from run import accuracy, precision, read_rows
from tasks import CACHE, load_task

import slrc
from slrc.backends import parse_target
from slrc.config import make_config
from slrc.ir.program import Program
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.latency_meter import LatencyMeter
from slrc.measuring.timing import time_pair
from slrc.pipeline import apply_forms, baseline, lower, structure
from slrc.sparsity.plans import Plan
from slrc.training.loop import train

RESULTS = Path(__file__).parent / "results" / "pareto.jsonl"
SHARES = (1 / 2, 1 / 3, 1 / 5)
CONTENDERS = ("auto", "block:8x1", "channel", "uniform block:8x1", "uniform channel")
UNIFORM_TRIED = (0.3, 0.5, 0.625, 0.75, 0.85, 0.92)
"""Sparsities whose latency is measured; the one that meets the budget is interpolated."""
TARGET = parse_target("ort")
TIERS = {
    "small": {"fashion-resnet": 20, "fashion-mixer": 20},
    "middle": {"imagenette-mobilenet_v2": 31, "cifar-resnet20": 30},
}
"""Networks, and the epochs of each."""


@dataclass(frozen=True)
class Row:
    """One network at one share of its dense latency."""

    network: str
    contender: str
    share: float
    epochs: int
    seed: int

    def __str__(self) -> str:
        return f"{self.network}/{self.contender}@{self.share:.2f}/{self.epochs}/{self.seed}"


def rows_of(tier: str, seeds: int) -> Iterator[Row]:
    """Yield a tier's rows, a seed before the next one."""
    for seed in range(seeds):
        for network, epochs in TIERS[tier].items():
            for share in SHARES:
                for contender in CONTENDERS:
                    yield Row(network, contender, share, epochs, seed)


def plan_for(program: Program, row: Row) -> Plan:
    """Return the plan of a row; a uniform one has the sparsity at which it meets the share."""
    if not row.contender.startswith("uniform "):
        return slrc.plan(program, row.contender, latency_budget=row.share, threads=1)
    pattern = row.contender.removeprefix("uniform ")
    meter = LatencyMeter(program, TARGET, threads=1)
    shares = [meter.share(slrc.plan(program, pattern, sparsity)) for sparsity in UNIFORM_TRIED]
    sparsity = float(np.interp(row.share, shares[::-1], UNIFORM_TRIED[::-1]))
    return slrc.plan(program, pattern, round(sparsity, 4))


def run_row(row: Row) -> dict[str, Any]:
    """Plan, train and measure one row."""
    started, task = time.perf_counter(), load_task(row.network)
    model = task.make()
    program = slrc.capture(slrc.Workload(model=model, example_inputs=(task.example,)))
    plan = plan_for(program, row)
    planned = time.perf_counter() - started
    if task.bfloat16:
        model.to(memory_format=torch.channels_last)
    start = accuracy(model, task.validation), accuracy(model, task.test)
    workload = slrc.Workload(
        model=model,
        example_inputs=(task.example,),
        train_batches=task.batches,
        evaluate=lambda m: {"accuracy": accuracy(m, task.validation)},
    )
    checkpoints = CACHE / "pareto-checkpoints" / sha256(str(row).encode()).hexdigest()[:16]
    config = make_config({"epochs": row.epochs, "seed": row.seed, **precision(task)})
    trained = train(workload, plan, config, checkpoints=checkpoints, resume=True)
    slim = structure(program.with_tensors(trained.tensors), trained.plan, trained.masks)
    choice = choose_forms(slim, TARGET, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        dense = lower(baseline(program), TARGET, Path(folder) / "dense")
        compiled = lower(apply_forms(slim, choice.forms), TARGET, Path(folder) / "compiled")
        latency = time_pair(dense, compiled, slim.flat_inputs(), 1)
    result = {
        "row": str(row),
        "network": row.network,
        "contender": row.contender,
        "share": row.share,
        "epochs": row.epochs,
        "dense": start[1],
        "dense_val": start[0],
        "val": accuracy(model, task.validation),
        "test": accuracy(model, task.test),
        "curve": [r.hard_pruned for r in trained.curve],
        "predicted": plan.latency.predicted if plan.latency else None,
        "measured": 1 / latency.speedup,
        "spread": [1 / x for x in latency.speedup_spread],
        "dense_ms": latency.dense_ms.p50,
        "ms": latency.compiled_ms.p50,
        "macs": slim.macs / program.macs,
        "sparsity": trained.masks.sparsity(trained.plan),
        "planned_s": round(planned, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def main() -> None:
    """Run what is missing and append it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--only", default="*", help="a glob over names of rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for row in rows_of(args.tier, args.seeds):
        if not fnmatch(str(row), args.only) or str(row) in read_rows(args.out):
            continue
        result = run_row(row)
        with args.out.open("a") as file:
            file.write(json.dumps({**result, "made_with": made_with(file_of(__file__))}) + "\n")
        print(
            f"{row}: validation {result['val']:.2f}, test {result['test']:.2f} of {result['dense']:.2f}, "
            f"{result['measured']:.1%} of {result['dense_ms']:.3f} ms, {result['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
