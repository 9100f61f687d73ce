"""Detectors up to their raw heads, and feature extractors, at half of the channels and a quarter of the blocks.

    python benchmarks/detectors.py                                      # all of them: half an hour of one core
    python benchmarks/detectors.py ssdlite320_mobilenet_v3_large        # one of torchvision's detectors
    python benchmarks/detectors.py fasterrcnn_resnet50_fpn:box          # the second stage of an R-CNN
    python benchmarks/detectors.py timm:resnet18                        # one of timm's feature extractors

Weights are random: nothing is learned here, the question is whether the structure holds. Images are small, so that the
proofs take minutes: the graphs are those of larger ones. Every step is compared with the masked model as a compile
compares it, on several inputs, down to ONNX Runtime, where every layer with zeros in its blocks is packed. Each network
runs in a process of its own; rows are written as they come to `benchmarks/results/detectors.json`, and a second run
goes on with what is missing or out of date.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from results import Rows
from torch import nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from common.torchvision_detectors import RawHeads, region_heads

import slrc
from slrc.backends import get_backend, parse_target
from slrc.backends.runner_module import RunnerModule
from slrc.forms.form import Form, FormKind, candidate_forms
from slrc.ir.program import Program
from slrc.pipeline import apply_forms
from slrc.probes import make_probes
from slrc.verify import Checker

PATTERNS = {"channel": 0.5, "block:8x1": 0.75}
PACKED = Form(FormKind.PACKED, 8)
SIDES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
"""Of the images, where smaller ones do not reach the last head."""
SIDE, REGIONS = 128, 4
SECOND_STAGES = {"fasterrcnn": ("box",), "maskrcnn": ("box", "mask"), "keypointrcnn": ("box", "keypoint")}
TIMM = (
    "convnext_atto",
    "dla34",
    "efficientnet_b0",
    "ese_vovnet19b_dw",
    "ghostnet_100",
    "hrnet_w18_small",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "regnety_002",
    "repvgg_a0",
    "resnet18",
)
"""Feature extractors: networks of several families that give the maps of all their stages."""
TIMEOUT_S = 3600


def networks() -> list[str]:
    """Return torchvision's detectors, the heads of the second stage of those that have one, and timm's extractors."""
    found = []
    for name in models.list_models(module=models.detection):
        stages = SECOND_STAGES.get(name.partition("_")[0], ())
        found += [name, *(f"{name}:{stage}" for stage in stages)]
    return [*found, *(f"timm:{name}" for name in TIMM)]


def make(name: str) -> slrc.Workload:
    """Return a network with random weights and statistics, and an input for it."""
    torch.manual_seed(0)
    source, _, stage = name.partition(":")
    side = SIDES.get(source, SIDE)
    batch, shape = 1, (3, side, side)
    if source == "timm":
        network: nn.Module = timm.create_model(stage, features_only=True)
    else:
        detector = models.get_model(source, weights=None, weights_backbone=None)
        network = RawHeads(detector)
        if stage:
            batch, (network, shape) = REGIONS, region_heads(detector)[stage]
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return slrc.Workload(network.eval(), (torch.randn(batch, *shape),), name=name)


def prove(workload: slrc.Workload, program: Program, pattern: str) -> dict[str, Any]:
    """Prune by magnitude in one shot; compare every step with the masked model."""
    plan = slrc.plan(program, pattern, PATTERNS[pattern], keep_ends=False)
    masks = slrc.Masks.project(plan, program.tensors)
    masks.apply_(workload.model.state_dict())
    check = Checker(workload.model, make_probes(program))
    slim = slrc.structure(program, plan, masks, check.program)
    forms = {
        weight: PACKED
        for weight, layer in slim.layers.items()
        if pattern != "channel"
        and PACKED in candidate_forms(layer.outputs_first(slim.tensors[weight]), layer.op, layer.groups)
    }
    formed = apply_forms(slim, forms, check.program)
    with tempfile.TemporaryDirectory() as folder:
        lowered = slrc.lower(formed, "ort", folder)
        runner = get_backend(parse_target("ort")).load(lowered.folder, threads=1)
        check("masked module = ort", RunnerModule(runner, lowered.artifact, formed))
    worst = max(check.checks, key=lambda c: c.max_rel_error / c.tolerance)
    return {
        "reached": plan.sparsity,
        "left": formed.num_parameters / program.num_parameters,
        "packed": len(forms),
        "steps": len(check.checks),
        "error": worst.max_rel_error,
        "tolerance": worst.tolerance,
    }


def measure(name: str) -> dict[str, Any]:
    """Return one row: the size, and how exact each pattern is; what goes wrong is the row."""
    row: dict[str, Any] = {}
    for pattern in PATTERNS:
        started = time.perf_counter()
        try:
            workload = make(name)
            program = slrc.capture(workload)
            row |= {"parameters": program.num_parameters, "macs": program.macs, "layers": len(program.layers)}
            row[pattern] = prove(workload, program, pattern) | {"seconds": time.perf_counter() - started}
        except Exception as error:
            row[pattern] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return row


def show(name: str, row: dict[str, Any]) -> str:
    """Return one line of the table."""
    found = []
    for pattern in PATTERNS:
        x = row.get(pattern, {"failed": "ended early"})
        if "failed" in x:
            found.append(f"{pattern}: {x['failed']}")
        else:
            equal = f"{x['steps']} steps equal, {x['error']:.0e} of {x['tolerance']:.0e}"
            found.append(f"{pattern}: {equal}, {x['left']:.0%} left, {x['packed']} packed")
    return f"{name:44} {'; '.join(found)}"


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names of torchvision's detectors, perhaps with a second stage")
    parser.add_argument("--again", action="store_true", help="also networks that have a row already")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = Rows(__file__, args.results)
    if args.alone:
        rows.add(args.networks[0], measure(args.networks[0]))
        return
    where = ["--results", str(args.results)] if args.results else []
    for name in args.networks or networks():
        if args.again or not rows.has(name):
            with suppress(subprocess.TimeoutExpired):
                subprocess.run([sys.executable, __file__, name, "--alone", *where], timeout=TIMEOUT_S, check=False)
            rows = Rows(__file__, args.results)
        print(show(name, rows.rows.get(name, {})), flush=True)


if __name__ == "__main__":
    main()
