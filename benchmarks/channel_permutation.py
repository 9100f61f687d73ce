"""What reordering channels does for blocks: the energy that survives, and the accuracy of a network pruned in one shot.

    SLRC_DATA=~/data python benchmarks/channel_permutation.py
    SLRC_DATA=~/data python benchmarks/channel_permutation.py --accuracy     # also ResNet-20 on CIFAR-10's test images

Networks with trained weights from `$SLRC_DATA/weights`; those whose weights are not there are left out. Without any,
torchvision's ResNet-50 with random weights stands in, which have nothing alike to bring together: the least there is.
Each network is planned twice, with and without `permute`, for every pattern and sparsity, and pruned by magnitude.
`kept` is the share of the constrained weights' energy that survives; layers whose outputs cannot be reordered (in a
CIFAR ResNet those that end in its zero-padded shortcuts) are counted with the others. Prints a table and writes
`benchmarks/results/channel_permutation.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from results import Rows
from safetensors.torch import load_file, load_model
from torch import nn

import slrc
from slrc.ir.program import Program, capture
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("block:4x1", "block:8x1")
SPARSITIES = (0.5, 0.75, 0.9)

sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]


def cifar_resnet(name: str, file: Path) -> tuple[nn.Module, int]:
    """Return a ResNet of `examples/cifar10.py`."""
    from cifar10 import NETWORKS

    model = NETWORKS[name]()
    load_model(model, str(file))
    return model, 32


def yolov3_tiny(file: Path) -> tuple[nn.Module, int]:
    """Return the network of `benchmarks/sparse_latency.py` with Darknet's weights, matched by their order."""
    from sparse_latency import YoloTiny

    model = YoloTiny()
    load_in_order(model, file)
    return model, 416


def mobilenet_v2(file: Path) -> tuple[nn.Module, int]:
    """Return torchvision's MobileNetV2 with the weights of its convolutions, matched by their order."""
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    load_in_order(model, file)
    return model, 224


def load_in_order(model: nn.Module, file: Path) -> None:
    """Copy a file's convolutions, in the order of their numbers, to those of a model; a linear layer keeps its own."""
    stored = load_file(file)
    names = sorted(
        (n for n, t in stored.items() if t.dim() == 4), key=lambda n: int("".join(c for c in n if c.isdigit()))
    )
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for layer, name in zip(layers, names, strict=False):
            layer.weight.copy_(stored[name])


NETWORKS: dict[str, Callable[[Path], tuple[nn.Module, int]]] = {
    "cifar10_resnet20": lambda file: cifar_resnet("resnet20", file),
    "cifar10_resnet56": lambda file: cifar_resnet("resnet56", file),
    "imagenet_mobilenet_v2": mobilenet_v2,
    "coco_yolov3_tiny": yolov3_tiny,
}


def programs() -> Iterator[tuple[str, Program]]:
    """Yield the networks that there are, captured."""
    folder = Path(os.environ.get("SLRC_DATA", "")).expanduser() / "weights"
    found = {name: folder / f"{name}.safetensors" for name in NETWORKS}
    found = {name: file for name, file in found.items() if file.exists()}
    for name, file in found.items():
        model, size = NETWORKS[name](file)
        yield name, capture(model.eval(), (torch.randn(1, 3, size, size),), name)
    if not found:
        import torchvision

        print(f"no weights in `{folder}`: random ones", file=sys.stderr)
        torch.manual_seed(0)
        model = torchvision.models.resnet50(weights=None).eval()
        yield "resnet50, random weights", capture(model, (torch.randn(1, 3, 224, 224),), "resnet50")


def kept_energy(program: Program, plan: Plan) -> float:
    """Return the share of the constrained weights' energy that survives."""
    energies = [(c, c.energies(program.tensors).double()) for c in plan]
    kept = sum(float(e.topk(c.keep, dim=1).values.sum()) for c, e in energies)
    return kept / sum(float(e.sum()) for _, e in energies)


def measure(
    program: Program, pattern: str, sparsity: float, accuracy: Callable[[nn.Module], float] | None
) -> dict[str, Any]:
    """Plan with and without `permute` and compare."""
    row: dict[str, Any] = {}
    for name, permute in (("plain", False), ("permuted", True)):
        begin = time.perf_counter()
        plan = slrc.plan(program, pattern, sparsity, permute=permute)
        row[f"plan_s_{name}"] = time.perf_counter() - begin
        row[f"kept_{name}"] = kept_energy(program, plan)
        if accuracy is not None:
            masked = program.with_tensors(Masks.project(plan, program.tensors).apply(program.tensors))
            row[f"accuracy_{name}"] = accuracy(masked.module())
    row |= {"sparsity_reached": plan.sparsity, "layers": len(plan.constraints)}
    row["reordered"] = sum(c.order is not None for c in plan)
    return row


def cifar_accuracy() -> Callable[[nn.Module], float]:
    """Return a function that evaluates on CIFAR-10's test images."""
    from cifar10 import accuracy, load_images

    pixels, labels = load_images("test")
    return lambda model: accuracy(model, pixels, labels)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", action="store_true", help="evaluate ResNet-20 pruned in one shot")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    evaluate = cifar_accuracy() if args.accuracy else None
    rows = Rows(__file__, args.results)
    print(f"{'network':26} {'pattern':10} sparse {'kept':>7} {'permuted':>9} {'lost less':>10}  reordered   accuracy")
    for name, program in programs():
        for pattern, sparsity in ((p, s) for p in PATTERNS for s in SPARSITIES):
            row = measure(program, pattern, sparsity, evaluate if name == "cifar10_resnet20" else None)
            rows.add(f"{name} {pattern} {sparsity:g}", row)
            plain, permuted = row["kept_plain"], row["kept_permuted"]
            less = 1 - (1 - permuted) / (1 - plain)
            shot = f"{row['accuracy_plain']:.1%} -> {row['accuracy_permuted']:.1%}" if "accuracy_plain" in row else ""
            print(
                f"{name:26} {pattern:10} {sparsity:6.0%} {plain:7.1%} {permuted:9.1%} {less:10.1%} "
                f"{row['reordered']:4} of {row['layers']:3}   {shot}",
                flush=True,
            )


if __name__ == "__main__":
    main()
