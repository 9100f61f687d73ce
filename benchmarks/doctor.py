"""What `slrc doctor` says of ten networks in under a minute, and what a compile then finds.

    taskset -c 1 python benchmarks/doctor.py                      # all: an hour of one quiet core, most of it compiling
    taskset -c 1 python benchmarks/doctor.py torchvision:resnet18 --again

Each network is examined by the command, with one thread, random weights, compiled kernels and nothing timed before. Its
seconds are those of the whole command. Then each of some pruned networks is compiled by the command, in one shot, and
the speed-up of its report, with forms chosen by timing every layer, stands beside the one that doctor foretold. Rows go
to `benchmarks/results/doctor.json` as they come, and a second run goes on with what is missing or out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from results import Row, Rows

from slrc.kernels.build import build

NETWORKS = (
    *(f"torchvision:{n}" for n in ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf")),
    *(f"torchvision:{n}" for n in ("googlenet", "vgg11")),
    *(f"timm:{n}" for n in ("deit_tiny_patch16_224", "mixer_s16_224", "convnext_atto")),
)
POINTS = (("block:8x1", 0.75), ("channel", 0.5))
"""The pruned networks that are compiled."""


def examined(model: str) -> Row:
    """Run `slrc doctor`: the seconds of the command, and what it says of pruned networks."""
    with tempfile.TemporaryDirectory() as cache:
        shutil.copy(build(), cache)
        started = time.perf_counter()
        found = json.loads(run("doctor", f"{model}@random", "--threads", "1", "--json", SLRC_CACHE=cache))
        seconds = time.perf_counter() - started
    timed = [p for p in found["speedups"] if p["speedup"] is not None]
    return {
        "seconds": seconds,
        "parts": [sum(p["ms"] is not None for p in found["parts"]), len(found["parts"])],
        "timed": [len(timed), len(found["speedups"])],
        "predicted": {key(p["pattern"], p["sparsity"]): [p["speedup"], *p["spread"]] for p in timed},
    }


def compiled(model: str, pattern: str, sparsity: float) -> Row:
    """Run `slrc compile`, which prunes by magnitude in one shot: the speed-up that its report says, and its range."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "build"
        pruned = ("--pattern", pattern, "--sparsity", str(sparsity), "--threads", "1")
        run("compile", f"{model}@random", *pruned, "--out", str(out))
        latency = json.loads((out / "report.json").read_text())["latency"][0]
    return {"speedup": latency["speedup"], "spread": latency["speedup_spread"], "dense_ms": latency["dense_ms"]["p50"]}


def run(*arguments: str, **environment: str) -> str:
    """Run a command of slrc and return what it prints."""
    command = [sys.executable, "-m", "slrc", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
    return done.stdout


def key(pattern: str, sparsity: float) -> str:
    """Return the name of a pruned network."""
    return f"{pattern} {sparsity:g}"


@dataclass(frozen=True)
class Pair:
    """The speed-up that doctor foretold, `None` where it had no time, and the one of the report."""

    predicted: float | None
    measured: float

    @property
    def off(self) -> float | None:
        """By what share of the measured speed-up the predicted one is off."""
        return None if self.predicted is None else self.predicted / self.measured - 1

    def __str__(self) -> str:
        predicted = "–" if self.predicted is None else f"{self.predicted:.2f}×"
        return f"{predicted}, {self.measured:.2f}×" + ("" if self.off is None else f", {self.off:+.0%}")


def pairs(rows: Mapping[str, Row], model: str) -> list[Pair]:
    """Return what was foretold of a network and what was measured, point by point."""
    predicted = rows[model]["predicted"]
    return [Pair(predicted.get(key(*point), [None])[0], rows[f"{model} {key(*point)}"]["speedup"]) for point in POINTS]


def complete(rows: Mapping[str, Row]) -> list[str]:
    """Return the networks that have all of their rows, in the order of the list."""
    return [m for m in NETWORKS if m in rows and all(f"{m} {key(*point)}" in rows for point in POINTS)]


def summary(rows: Mapping[str, Row]) -> str:
    """Say how long the longest examination took, and the median and the greatest error of what can be compared."""
    models = complete(rows)
    errors = [abs(pair.off) for model in models for pair in pairs(rows, model) if pair.off is not None]
    longest = f"The longest examination took {max((rows[model]['seconds'] for model in models), default=0.0):.0f} s."
    if not errors:
        return f"{longest} There was no time for a pruned network."
    return (
        f"{longest} Of the {len(errors)} pruned networks that can be compared, the\npredicted speed-up is off by "
        f"{statistics.median(errors):.1%} in the median and by {max(errors):.1%} at most."
    )


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="torchvision:NAME or timm:NAME")
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = Rows(__file__, args.results)
    for model in args.networks:
        works = {f"{model} {key(*point)}": partial(compiled, model, *point) for point in POINTS}
        for name, work in (works | {model: partial(examined, model)}).items():
            if args.again or not rows.has(name):
                rows.add(name, work())
        row = rows[model]
        print(f"{model}: {row['seconds']:.0f} s, {row['timed'][0]} of {row['timed'][1]} pruned networks timed")
        for point, pair in zip(POINTS, pairs(rows.rows, model), strict=True):
            print(f"    {key(*point)}: {pair}", flush=True)
    print(summary(rows.rows))


if __name__ == "__main__":
    main()
