"""Rounds what `train.py` has trained, and the dense networks, to int8 by calibration alone: accuracy and latency.

    SLRC_DATA=~/data python benchmarks/pareto/int8.py
    SLRC_DATA=~/data python benchmarks/pareto/int8.py --only '*resnet56*'

Training images calibrate. Every layer gets the form that a compile for `ort+int8` would choose for it on this machine,
in int8 or in float32. The validation images and the test images are run through the emitted file, which is then timed
against the dense network in float32, in turns, on one thread of an idle machine. Writes
`benchmarks/results/pareto_int8.json`; rows that are up to date are not measured again, and those whose networks are not
in the cache are left out.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1] / "convergence"))
sys.path.insert(1, str(Path(__file__).parents[1]))
from latency import UNTRAINED, options, trained_rows
from networks import ROUNDED, TARGET
from results import Rows
from tasks import load_task
from train import Row, capture, example_of, program_of

import slrc
from slrc.config import make_config
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.timing import time_pair
from slrc.pipeline import baseline, lower, pack_layers, split_layers
from slrc.progress import Quiet
from slrc.quantized_targets import IntegerTargets, Rounded

DENSE = "dense"


def measure(row: Row) -> dict[str, Any]:
    """Round a row's network and return its accuracy, and what it takes beside the dense one in float32."""
    task, notes = load_task(row.network), list[str]()
    model = task.make()
    dense = baseline(capture(model, row, task))
    network = dense if row.contender == DENSE else program_of(row, task)
    workload = slrc.Workload(model=model, example_inputs=(example_of(row, task),), train_batches=task.batches)
    integers = IntegerTargets(workload, make_config({"threads": 1}), notes.append, Quiet())
    choice = choose_forms(network, ROUNDED, threads=1)
    quantized = integers.round(split_layers(network, choice.forms), ROUNDED, choice.forms)
    program = pack_layers(quantized.program(), choice.spared(quantized.spared).forms)
    with tempfile.TemporaryDirectory() as folder:
        before, after = lower(dense, TARGET, Path(folder) / "dense"), lower(program, ROUNDED, Path(folder) / "int8")
        module = Rounded(after, program, quantized.calibration).runner(1)
        found = time_pair(before, after, dense.flat_inputs(), 1)
        return {
            "network": row.network,
            "contender": row.contender,
            "asked": row.share,
            "dense": task.measure(model, task.test),
            "val": task.measure(module, task.validation),
            "test": task.measure(module, task.test),
            "share": 1 / found.speedup,
            "ms": found.compiled_ms.p50,
            "size": after.size_bytes / before.size_bytes,
            "layers_int8": quantized.calibration.quantized_layers,
            "notes": notes,
        }


def with_dense(trained: Iterable[Row]) -> Iterator[Row]:
    """Yield rows, and before the first one of each network the dense one."""
    seen = set[str]()
    for row in trained:
        if row.network not in seen:
            seen.add(row.network)
            yield Row(row.network, DENSE, None, 0, 0)
        yield row


def main() -> None:
    """Measure what is missing."""
    args = options(__doc__).parse_args()
    rows = Rows("pareto_int8", args.out)
    for row in with_dense(trained_rows(args.trained)):
        if not fnmatch(str(row), args.only):
            continue
        if not rows.has(str(row)):
            if row.contender != DENSE and not row.is_trained:
                print(f"{row}: {UNTRAINED}", flush=True)
                continue
            rows.add(str(row), measure(row))
        found = rows[str(row)]
        print(
            f"{row}: validation {found['val']:.2f}, test {found['test']:.2f} of {found['dense']:.2f}, "
            f"{found['share']:.1%} of the dense latency, {found['layers_int8']} layers in int8",
            flush=True,
        )


if __name__ == "__main__":
    main()
