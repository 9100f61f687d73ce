"""What the teacher and the method add to a training step.

    python benchmarks/step_cost.py

Trains on random images for some steps by `slrc.train`, as a compile does, with the recipe's distillation, and reads
what it reports: the times of the parts of each step, which alternate in one process. Prints a table and writes
`benchmarks/results/step_cost.json`.
"""

from __future__ import annotations

import argparse
import sys
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="block:8x1")
    parser.add_argument("--network", choices=NETWORKS, help="one of them; all unless given")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precision = "bf16" if cifar10.has_bfloat16() else "fp32"
    rows = Rows(__file__)
    print(f"{'network':36} {'method':16} {'step':>10} {'distillation':>13} {'method':>8}")
    for name, (make, shape) in NETWORKS.items():
        if args.network not in (None, name):
            continue
        steps = SHARE_UPDATED if shape[0] == 64 else SHARE_UPDATED // 4
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        for method in METHODS:
            torch.manual_seed(0)
            cost = measure(make(), x, y, args.pattern, method, precision, steps)
            key = f"{name}, {precision}, {method}"
            rows.add(key, {"network": name, "precision": precision, "method_name": method, **cost})
            print(
                f"{name:36} {method:16} {cost['step_ms']:7.1f} ms {cost['distillation']:13.1%} {cost['method']:8.2%}",
                flush=True,
            )


def measure(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, pattern: str, method: str, precision: str, steps: int
) -> dict[str, float]:
    """Return what some steps took, with one update in the middle of as many as there usually are between two."""
    if precision == "bf16":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), train_batches=[(x, y)] * steps)
    plan = slrc.plan(slrc.capture(workload), pattern, 0.75)
    options = {"method": method, "epochs": 1, "updates_per_epoch": 1, "probe_batches": 1, "precision": precision}
    trained = slrc.train(workload, plan, recalibration_batches=0, **options)
    assert trained.cost is not None
    return trained.cost.model_dump()


if __name__ == "__main__":
    main()
