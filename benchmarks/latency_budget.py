"""Widths chosen for a latency: what was predicted, and what the slim network then takes.

    python benchmarks/latency_budget.py                                  # five networks, three budgets
    python benchmarks/latency_budget.py torchvision:resnet50 --budget 0.4

One thread of ONNX Runtime, random weights. The parts of a network are timed once (`--cache`), each plan is then timed
as a whole against the dense network, in turns. Rows go to `benchmarks/results/latency_budget.json` as they come, and
a second run goes on with what is missing or out of date. The whole list takes about twenty minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from results import Rows
from zoo import load, load_dense, make

import slrc
from slrc.ir.program import Program, capture
from slrc.machine.cache import cache_folder
from slrc.measuring.timing import measure
from slrc.pipeline import structure
from slrc.sparsity.masks import Masks

MODELS = [f"torchvision:{n}" for n in ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "swin_t")]
BUDGETS = (0.7, 0.5, 0.35)


def measure_budget(program: Program, dense: Any, budget: float, cache: Path) -> dict[str, Any]:
    """Plan for a budget, then measure."""
    started = time.perf_counter()
    plan = slrc.plan(program, "channel", latency_budget=budget, threads=1, cache=cache)
    planned = time.perf_counter() - started
    assert plan.latency is not None
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    inputs = slim.flat_inputs()
    with tempfile.TemporaryDirectory() as folder:
        timed = measure("ort", dense, load(slim, Path(folder)), inputs, threads=1)
    measured = timed.compiled_ms.p50 / timed.dense_ms.p50
    return {
        "planning_s": planned,
        "predicted": plan.latency.predicted,
        "measured": measured,
        "off": measured / plan.latency.predicted - 1,
        "speedup": timed.speedup,
        "spread": timed.speedup_spread,
        "dense_ms": timed.dense_ms.p50,
        "macs": slim.macs / program.macs,
        "parameters": slim.num_parameters / program.num_parameters,
    }


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision:NAME or timm:NAME")
    parser.add_argument("--budget", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = Rows(__file__, args.results)
    print(f"{'model':28} {'budget':>7} {'predicted':>10} {'measured':>9} {'off':>7} {'MACs':>6} {'planned':>9}")
    for name in args.models:
        missing = [b for b in args.budget if args.again or not rows.has(f"{name} {b:g}")]
        program = capture(*make(name), name) if missing else None
        dense = load_dense(program) if missing else None
        for budget in args.budget:
            if budget in missing:
                assert program is not None
                rows.add(f"{name} {budget:g}", measure_budget(program, dense, budget, args.cache))
            row = rows[f"{name} {budget:g}"]
            print(
                f"{name:28} {budget:7.0%} {row['predicted']:10.1%} {row['measured']:9.1%} {row['off']:+7.1%} "
                f"{row['macs']:6.1%} {row['planning_s']:7.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
