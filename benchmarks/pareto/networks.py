"""What is compared: slrc's plans for a share of the dense latency, smaller dense networks, and Torch-Pruning."""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).parents[1] / "convergence"))
sys.path.insert(1, str(Path(__file__).parents[2] / "examples"))
import cifar10
import digits
import fashion_mnist
import imagenette
from tasks import load_task

import slrc
from slrc.backends import get_backend, parse_target
from slrc.errors import PlanError
from slrc.ir.program import Program
from slrc.measuring.latency_meter import LatencyMeter
from slrc.measuring.meet_budget import CORRECTIONS, MARGIN
from slrc.measuring.timing import Budget, time_in_turns
from slrc.pipeline import baseline, lower
from slrc.sparsity.plans import Plan

TARGET = parse_target("ort")
ROUNDED = parse_target(f"{TARGET}+int8")
GRADUAL, BY_ENERGY, FOR_INT8 = ", gradual", ", by energy", ", for int8"
ALLOCATED = ("auto", "auto, by energy", "auto, gradual", "auto, for int8", "block:8x1", "channel")
"""Plans of slrc that share a budget out over layers, by default by divergence. All are refitted and then trained under
their masks, but for those that are pruned gradually. Plans for int8 are to meet a share of the dense latency in float32
once they are rounded."""
UNIFORM = ("uniform block:8x1", "uniform channel", "uniform block:8x1, gradual")
"""Plans that prune the same share of each layer."""
TORCH_PRUNING = "Torch-Pruning"
UNIFORM_TRIED = (0.3, 0.5, 0.625, 0.75, 0.85, 0.92)
"""Sparsities whose latency is measured; the one that meets the budget is interpolated, measured and corrected."""
RATIOS = (0.05, 0.95)
HALVINGS = 6
TIMED = Budget(3.0, 8)
FAMILIES: Mapping[str, Mapping[str, Callable[[], nn.Module]]] = {
    "digits-net": {"width 4": lambda: digits.DigitsNet(width=4)},
    "fashion-resnet": {f"width {w}": lambda w=w: fashion_mnist.ResNet(w) for w in (4, 6, 8, 12)},
    "fashion-mixer": {
        **{f"width {w}": lambda w=w: fashion_mnist.Mixer(w) for w in (16, 24, 40)},
        **{f"depth {d}": lambda d=d: fashion_mnist.Mixer(64, d) for d in (1, 2)},
    },
    "cifar-resnet20": {
        "ResNet-8": lambda: cifar10.ResNet(1),
        "ResNet-14": lambda: cifar10.ResNet(2),
        "ResNet-20, width 8": lambda: cifar10.ResNet(3, 8),
        "ResNet-20, width 12": lambda: cifar10.ResNet(3, 12),
    },
    "cifar-resnet56": {
        "ResNet-14": lambda: cifar10.ResNet(2),
        "ResNet-20, trained": lambda: load_task("cifar-resnet20").make(),
        "ResNet-32": lambda: cifar10.ResNet(5),
        "ResNet-56, width 8": lambda: cifar10.ResNet(9, 8),
    },
    "imagenette-mobilenet_v2": {
        f"width {w}": lambda w=w: imagenette.mobilenet_v2(w) for w in (0.35, 0.5, 0.75)
    },
}  # fmt: skip
"""Smaller dense networks of each network's family."""
TRAINED = ("ResNet-20, trained",)
"""Those that have a dense start of their own, made like the larger network's."""


def plan_for(program: Program, workload: slrc.Workload, contender: str, share: float) -> Plan:
    """Return slrc's plan for a share of the dense latency; a uniform one has the sparsity at which it meets it."""
    pattern = contender.partition(",")[0]
    if contender in ALLOCATED:
        others = {"budget_metric": "energy"} if contender.endswith(BY_ENERGY) else {}
        if contender.endswith(FOR_INT8):
            in_float, in_int8 = (LatencyMeter(program, t, threads=1).whole(1.0).whole[0].ms for t in (TARGET, ROUNDED))
            share *= in_float / in_int8
            if share >= 1:
                raise PlanError("rounded to int8 the dense network is as fast as that")
            others = {"target": str(ROUNDED)}
        return slrc.plan(program, pattern, latency_budget=share, threads=1, workload=workload, **others)
    pattern = pattern.removeprefix("uniform ")
    meter, tried = LatencyMeter(program, TARGET, threads=1), {}
    untried = set(UNIFORM_TRIED)
    for _ in range(1 + CORRECTIONS):
        tried |= {sparsity: meter.measure(slrc.plan(program, pattern, sparsity)).share for sparsity in untried}
        nearest = min(tried, key=lambda sparsity: abs(tried[sparsity] - share))
        known = sorted((found, sparsity) for sparsity, found in tried.items())
        untried = {round(float(np.interp(share, *zip(*known, strict=True))), 4)} - tried.keys()
        if abs(tried[nearest] / share - 1) <= MARGIN or not untried:
            break
    return slrc.plan(program, pattern, nearest)


def torch_pruned(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Return a copy whose channels Torch-Pruning has removed by the norm of their groups, most where that is least.

    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.

    Args:
        model: the dense network.
        example: an input.
        ratio: the share of all channels that goes.
    """
    import torch_pruning as tp

    pruned = copy.deepcopy(model).eval()
    last = [m for m in pruned.modules() if isinstance(m, nn.Linear)][-1]
    tp.pruner.BasePruner(
        pruned,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        max_pruning_ratio=RATIOS[1],
        ignored_layers=[last],
        round_to=4,
    ).step()
    return pruned


def ratio_for(model: nn.Module, example: Tensor, share: float) -> float:
    """Return the ratio of channels at which Torch-Pruning meets a share of the dense latency, by halving.

    Raises:
        PlanError: it does not meet it.
    """
    low, high = RATIOS
    found: dict[float, float] = {}
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found[middle] = latency_share(model, torch_pruned(model, example, middle), example)
        if found[middle] > share:
            low = middle
        else:
            high = middle
    if high not in found:
        raise PlanError(
            f"the channels that Torch-Pruning takes leave {min(found.values()):.0%} of the latency at least"
        )
    return round(high, 4)


def latency_share(model: nn.Module, other: nn.Module, example: Tensor) -> float:
    """Return the latency of a network as a share of a dense one's, on one thread, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        for name, network in (("dense", model), ("other", other)):
            program = slrc.capture(slrc.Workload(model=network, example_inputs=(example,)))
            lowered = lower(baseline(program), TARGET, Path(folder) / name)
            runners.append(get_backend(TARGET).load(lowered.folder, threads=1).prepare(example))
        dense, compiled = time_in_turns(runners, TIMED)
    return statistics.median(compiled) / statistics.median(dense)
