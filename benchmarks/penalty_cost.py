"""What the SLR penalty adds to a training step.

    python benchmarks/penalty_cost.py --size 32 --batch 128

Trains ResNet-18 (torchvision's, with the 3×3 stem for images up to 64 pixels) on random images and times steps with and
without `add_penalty_gradient`, in turns in one process. Prints a table and writes
`benchmarks/results/penalty_cost.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torchvision
from results import Rows
from torch import nn

import slrc


def make_model(size: int) -> nn.Module:
    """ResNet-18; small images get the stem that is usual for CIFAR."""
    model = torchvision.models.resnet18(num_classes=10)
    if size <= 64:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pattern", default="block:8x1")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of steps, one with and one without the penalty")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast and channels_last, the fastest way on CPUs")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = make_model(args.size)
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    workload = slrc.Workload(model=model, example_inputs=(x[:1],))
    plan = slrc.plan(slrc.capture(workload), args.pattern, 0.75)
    if args.bf16:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    method = slrc.SLR(dict(model.named_parameters()), plan, updates=2)
    penalty_s: list[float] = []

    def step(with_penalty: bool) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if with_penalty:
            before = time.perf_counter()
            method.add_penalty_gradient()
            penalty_s.append(time.perf_counter() - before)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    for with_penalty in (False, True):
        step(with_penalty)
    penalty_s.clear()
    times: dict[bool, list[float]] = {False: [], True: []}
    for i in range(args.pairs):
        for with_penalty in (False, True) if i % 2 else (True, False):
            times[with_penalty].append(step(with_penalty))

    plain, penalty = statistics.median(times[False]), statistics.median(penalty_s)
    result = {
        "model": f"resnet18, {args.size}x{args.size}, batch {args.batch}, {'bf16' if args.bf16 else 'fp32'}",
        "pattern": args.pattern,
        "step_ms": plain * 1e3,
        "step_with_penalty_ms": statistics.median(times[True]) * 1e3,
        "penalty_ms": penalty * 1e3,
        "penalty_share_of_step": penalty / plain,
        "pairs": args.pairs,
    }
    print(f"{'model':32} {'step':>10} {'with penalty':>13} {'penalty':>10} {'share':>7}")
    print(
        f"{result['model']:32} {plain * 1e3:8.1f} ms {result['step_with_penalty_ms']:10.1f} ms "
        f"{penalty * 1e3:7.2f} ms {penalty / plain:6.2%}"
    )
    Rows(__file__).add(f"{result['model']}, {args.pattern}", result)


if __name__ == "__main__":
    main()
