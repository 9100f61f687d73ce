"""What the teacher and the method add to a training step.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --fsdp

Trains on random images for some steps by `slrc.train`, as a compile does, with the recipe's distillation, and reads
what it reports: the times of the parts of each step, which alternate in one process. Prints a table and writes
`benchmarks/results/step_cost.json`.

With `--fsdp` two processes share the weights of the smallest network out, on the CPU, in fp32: what an update costs
beside a step is then mostly talk. It is measured with an update as often as in the other rows, and every four steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from results import Rows
from torch import nn

import slrc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import fashion_mnist

NETWORKS = {
    "Fashion-MNIST's ResNet, batch 64": (fashion_mnist.ResNet, (64, 1, 28, 28)),
    "ResNet-20, 32x32, batch 128": (cifar10.NETWORKS["resnet20"], (128, 3, 32, 32)),
    "ResNet-18, 32x32, batch 128": (cifar10.NETWORKS["resnet18"], (128, 3, 32, 32)),
}
METHODS = ("gradual", "slr", "slr-tightening")
SHARE_UPDATED = 100
"""Steps for each update, about as many as in an epoch of a small dataset."""


FREQUENT = 4
"""Steps for each update where they are many."""
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FSDP = "ACCELERATE_USE_FSDP"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="block:8x1")
    parser.add_argument("--network", choices=NETWORKS, help="one of them; all unless given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true", help="two processes that share the smallest network out")
    args = parser.parse_args()
    if args.fsdp and "RANK" not in os.environ:
        sys.exit(subprocess.run([sys.executable, *LAUNCHER, *sys.argv], env={**os.environ, FSDP: "true"}).returncode)
    torch.set_num_threads(args.threads)
    rows = Rows(__file__) if os.environ.get("RANK", "0") == "0" else None
    if rows:
        print(f"{'network':44} {'method':16} {'step':>10} {'distillation':>13} {'method':>8}")
    for name, (make, shape) in NETWORKS.items():
        if args.network not in (None, name):
            continue
        steps = SHARE_UPDATED if shape[0] == 64 else SHARE_UPDATED // 4
        for method in METHODS:
            for every in (steps, FREQUENT) if args.fsdp else (steps,):
                precision, where = "bf16" if cifar10.has_bfloat16() else "fp32", ""
                if args.fsdp:
                    precision, where = "fp32", f", FSDP, an update in {every} steps"
                cost = measure(make, shape, args.pattern, method, precision, steps, every)
                if rows:
                    row = {"network": name + where, "precision": precision, "method_name": method, **cost}
                    rows.add(f"{name}{where}, {precision}, {method}", row)
                    times = f"{cost['step_ms']:7.1f} ms {cost['distillation']:13.1%} {cost['method']:8.2%}"
                    print(f"{name + where:44} {method:16} {times}", flush=True)
        if args.fsdp:
            break


def measure(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    pattern: str,
    method: str,
    precision: str,
    steps: int,
    every: int,
) -> dict[str, float]:
    """Return what some steps took, with an update after `every` of them."""
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(shape), torch.randint(10, shape[:1])
    if precision == "bf16":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    batches = [(x, y)] * (steps * int(os.environ.get("WORLD_SIZE", "1")))
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), train_batches=batches)
    plan = slrc.plan(slrc.capture(workload), pattern, 0.75)
    options = {"method": method, "epochs": 1, "updates_per_epoch": steps // every, "probe_batches": 1}
    trained = slrc.train(workload, plan, recalibration_batches=0, precision=precision, **options)
    assert trained.cost is not None
    return trained.cost.model_dump()


if __name__ == "__main__":
    main()
