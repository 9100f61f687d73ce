"""Times what `train.py` has trained: each network against the dense one, in turns, on one thread of an idle machine.

    SLRC_DATA=~/data python benchmarks/pareto/latency.py
    SLRC_DATA=~/data python benchmarks/pareto/latency.py --only '*mobilenet*'

Every network gets the forms that a compile would choose for it on this machine. Those that were planned for int8 are
timed by `int8.py` alone. Writes `benchmarks/results/pareto_latency.json`; rows that are up to date are not measured
again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1] / "convergence"))
sys.path.insert(1, str(Path(__file__).parents[1]))
from networks import FOR_INT8, TARGET
from results import Rows
from run import read_rows
from tasks import load_task
from train import RESULTS, Row, capture, program_of

from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.timing import time_pair
from slrc.pipeline import apply_forms, baseline, lower

UNTRAINED = "left out: its network is not in the cache"


def time_row(row: Row) -> dict[str, Any]:
    """Return what a row's network takes beside the dense one."""
    task = load_task(row.network)
    dense, network = baseline(capture(task.make(), row, task)), program_of(row, task)
    choice = choose_forms(network, TARGET, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        lowered = [
            lower(program, TARGET, Path(folder) / name)
            for name, program in (("dense", dense), ("compiled", apply_forms(network, choice.forms)))
        ]
        found = time_pair(lowered[0], lowered[1], dense.flat_inputs(), 1)
        size = lowered[1].size_bytes / lowered[0].size_bytes
    return {
        "share": 1 / found.speedup,
        "spread": sorted(1 / x for x in found.speedup_spread),
        "dense_ms": found.dense_ms.p50,
        "ms": found.compiled_ms.p50,
        "size": size,
        "batch": row.batch,
    }


def options(about: str | None) -> argparse.ArgumentParser:
    """Return the options of a script that measures what was trained."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a glob over names of rows")
    parser.add_argument("--trained", type=Path, default=RESULTS, help="the rows of `train.py`")
    parser.add_argument("--out", type=Path, default=None)
    return parser


def trained_rows(file: Path) -> Iterator[Row]:
    """Yield what a file of `train.py` has and was trained, by name."""
    for name, found in sorted(read_rows(file).items()):
        if "unreachable" not in found:
            parts = (found[part] for part in ("network", "contender", "share", "epochs"))
            yield Row(*parts, int(name.split("/")[-1]))


def main() -> None:
    """Time what is missing."""
    args = options(__doc__).parse_args()
    times = Rows("pareto_latency", args.out)
    for row in trained_rows(args.trained):
        name = str(row)
        if row.contender.endswith(FOR_INT8) or not fnmatch(name, args.only):
            continue
        if not times.has(name):
            if not row.is_trained:
                print(f"{name}: {UNTRAINED}", flush=True)
                continue
            times.add(name, time_row(row))
        found = times[name]
        print(f"{name}: {found['share']:.1%} of {found['dense_ms']:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
