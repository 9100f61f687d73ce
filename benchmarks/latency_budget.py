"""Plans for a share of the dense latency: what was predicted, and what the network then takes, here or on a device.

    python benchmarks/latency_budget.py                                  # five networks, three budgets, channels
    python benchmarks/latency_budget.py torchvision:resnet50 --budget 0.4 --pattern auto
    python benchmarks/latency_budget.py torchvision:resnet18 --budget 0.5 --device pi@raspberrypi
    python benchmarks/latency_budget.py torchvision:resnet18 --budget 0.5 --device loopback    # an sshd on this machine

One thread of ONNX Runtime, random weights. The parts of a network are timed once (`--cache`), each plan is then timed
as a whole against the dense network, in turns; with `--device` both are timed there. It is then planned once more, by
the times that were kept. Rows go to `benchmarks/results/latency_budget.json` as they come, and a second run goes on
with what is missing or out of date. The whole list takes about half an hour on a quiet core.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results import ROOT, Rows
from zoo import make

from slrc.backends import parse_target
from slrc.config import make_config
from slrc.ir.program import Program, capture
from slrc.machine.cache import cache_folder
from slrc.measuring.choose_forms import choose_forms, make_ready
from slrc.measuring.devices import Device, local_device
from slrc.pipeline import apply_forms, baseline, lower, structure
from slrc.planning import plan_from
from slrc.progress import Quiet, Task
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan

MODELS = [f"torchvision:{n}" for n in ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "swin_t")]
BUDGETS = (0.7, 0.5, 0.35)
HERE, LOOPBACK = "here", "loopback"
TABLES = ("timing parts", "timing options")
"""What a plan calls the work of timing a network's parts, before it chooses by them."""
SECONDS = {
    "planned": "planning_s",
    "kernels": "kernels_s",
    "tables": "tables_s",
    "kept": "kept_tables_s",
    "knapsack": "knapsack_s",
}
"""All of planning; in it, compiling kernels and timing parts; the parts once more, by what was kept; choosing anew."""


class Stopwatch(Quiet):
    """Adds up the seconds of the work that is reported, by what it is."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Task]:
        """Time it."""
        started = time.perf_counter()
        with super().task(what, total) as task:
            yield task
        self.seconds[what] += time.perf_counter() - started

    @property
    def tables(self) -> float:
        """Of timing the parts."""
        return sum(seconds for what, seconds in self.seconds.items() if what.startswith(TABLES))


def measure_budget(program: Program, pattern: str, budget: float, device: Device, cache: Path) -> dict[str, Any]:
    """Plan for a budget, then measure, both on a device."""
    started, watch, kept = time.perf_counter(), Stopwatch(), Stopwatch()
    config = make_config({"pattern": pattern, "latency_budget": budget, "threads": 1})
    target = device.resolve(parse_target("ort"))
    make_ready(target, Quiet())
    compiled_kernels = time.perf_counter() - started
    plan = plan_from(program, config, cache=cache, device=device, reporter=watch)
    planned = time.perf_counter() - started
    plan_from(program, config, cache=cache, device=device, reporter=kept)
    assert plan.latency is not None
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    choice = choose_forms(slim, target, threads=1, device=device)
    with tempfile.TemporaryDirectory() as place:
        dense = lower(baseline(program), target, Path(place) / "dense")
        compiled = lower(apply_forms(slim, choice.forms), target, Path(place) / "compiled")
        timed = device.latency(dense, compiled, slim.flat_inputs(), threads=1).latency
    measured = 1 / timed.speedup
    return {
        "planning_s": planned,
        "kernels_s": compiled_kernels,
        "tables_s": watch.tables,
        "kept_tables_s": kept.tables,
        "knapsack_s": time_knapsack(plan, program) if plan.budget else None,
        "predicted": plan.latency.predicted,
        "measured": measured,
        "off": measured / plan.latency.predicted - 1,
        "speedup": timed.speedup,
        "spread": timed.speedup_spread,
        "dense_ms": timed.dense_ms.p50,
        "macs": slim.macs / program.macs,
        "parameters": slim.num_parameters / program.num_parameters,
    }


def time_knapsack(plan: Plan, program: Program) -> float:
    """Return how long it takes to choose options whose losses are known: the median of ten times."""
    losses, taken = plan.option_losses(program.tensors), []
    for _ in range(10):
        started = time.perf_counter()
        plan.reallocated(program.tensors, losses)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@contextmanager
def opened(host: str) -> Iterator[Device]:
    """Open a device: this machine, one that ssh reaches, or an sshd on loopback that is started for it."""
    if host == HERE:
        yield local_device()
        return
    from slrc.device.ssh_device import SshDevice

    with tempfile.TemporaryDirectory() as folder:
        server = None
        if host == LOOPBACK:
            sys.path.insert(1, str(ROOT / "tests" / "device"))
            import rig

            server, host = rig.Device(Path(folder) / "device", python=sys.executable), rig.NAME
            server.start()
            os.environ["SLRC_SSH_CONFIG"] = str(server.config)
        try:
            with SshDevice(host) as device:
                yield device
        finally:
            if server is not None:
                server.stop()


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision:NAME or timm:NAME")
    parser.add_argument("--budget", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--pattern", default="channel")
    parser.add_argument("--device", default=HERE, help="a host that ssh reaches, or `loopback`")
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = Rows(__file__, args.results)
    columns = ("predicted", 10), ("measured", 9), ("off", 7), ("MACs", 6), *((name, 9) for name in SECONDS)
    print(f"{'network':28} {'budget':>7} " + " ".join(f"{title:>{width}}" for title, width in columns))
    for name in args.models:
        keys = {budget: f"{name} {budget:g} {args.pattern} {args.device}" for budget in args.budget}
        missing = [budget for budget, key in keys.items() if args.again or not rows.has(key)]
        if missing:
            program = capture(*make(name), name)
            with opened(args.device) as device:
                for budget in missing:
                    rows.add(keys[budget], measure_budget(program, args.pattern, budget, device, args.cache))
        for budget, key in keys.items():
            row = rows[key]
            print(
                f"{name:28} {budget:7.0%} {row['predicted']:10.1%} {row['measured']:9.1%} {row['off']:+7.1%} "
                f"{row['macs']:6.1%} " + " ".join(f"{row.get(part) or math.nan:7.2f} s" for part in SECONDS.values()),
                flush=True,
            )


if __name__ == "__main__":
    main()
