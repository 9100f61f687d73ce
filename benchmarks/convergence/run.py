"""The methods against each other, on real data: accuracy after pruning, with one recipe and equal total epochs.

    export SLRC_DATA=~/data
    python benchmarks/convergence/run.py short --out FILE  # half a minute, on scikit-learn's digits
    python benchmarks/convergence/run.py tuning    # each method's grid, one seed: an hour and a half on one core
    python benchmarks/convergence/run.py small     # Fashion-MNIST, each method with its best settings: 3 hours
    python benchmarks/convergence/run.py parts     # the default with a part left out or changed: an hour
    python benchmarks/convergence/run.py budgets   # runs of 2, 3, 12 and 20 epochs: 3 hours
    python benchmarks/convergence/run.py int8      # the default in the blocks of the int8 kernels: 20 minutes
    python benchmarks/convergence/run.py middle    # CIFAR-10's ResNet-20, Imagenette's MobileNetV2: 4 hours
    python benchmarks/convergence/run.py large     # ResNet-18, ResNet-110 and VGG-16 from scratch: days
    python benchmarks/convergence/run.py tasks     # segmentation, detection, lanes, lidar: days
    python benchmarks/convergence/run.py tasks --only '*camvid-unet*' --seeds 3
    python benchmarks/convergence/run.py small --seeds 1 --only '*unstructured*'
    python benchmarks/convergence/run.py small & python benchmarks/convergence/run.py small  # share the rows

Every row is a call of `slrc.train`, from the same dense weights, with the same batches and the recipe of the package.
Epochs that train under final masks count like all others. `tuning` looks at the validation split alone, which is a part
of the training images that no training sees; each method takes its best settings from there, and only then test images
are looked at, once, at the end of a row.

Rows are appended to `benchmarks/results/convergence.jsonl` as they come. An interrupted run goes on with what is
missing, a row that takes long from its last epoch. `convergence/answers.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, PARTS, Contender, Options, make_fixed_set, merged
from tasks import CACHE, Task, load_task

sys.path.insert(1, str(Path(__file__).parents[1]))
from results import file_of, made_with

import slrc
from slrc.config import CompileConfig, make_config
from slrc.machine.lock import take_lock
from slrc.machine.memory import keep_freed_memory
from slrc.methods.registry import make_method
from slrc.methods.settings import MethodName
from slrc.options import Precision
from slrc.reconstruction.reconstruct import reconstruct
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.training.loop import train
from slrc.training.trained import Trained

RESULTS = Path(__file__).parents[1] / "results" / "convergence.jsonl"
DEFAULT = "gradual"
"""The contender that the package takes where nobody names a method."""
UNTUNED = "the default"
"""The setting of rows that take all options as the package has them."""
EPOCHS = 6
Case = tuple[str, str, float]
CASES = (
    ("fashion-resnet", "block:8x1", 0.75),
    ("fashion-resnet", "block:8x1", 0.9),
    ("fashion-resnet", "unstructured", 0.95),
    ("fashion-resnet", "channel", 0.75),
    ("fashion-mixer", "block:8x1", 0.75),
)
NEAR = 1.0
"""Points of validation accuracy that a setting may be behind its contender's best to be tried on the second case."""
TUNED_ON = (CASES[1], CASES[4])
RIVALS = tuple(name for name in CONTENDERS if name != "dense")
TASKS: Mapping[Case, int] = {
    ("camvid-unet", "block:8x1", 0.75): 30,
    ("camvid-lraspp", "block:8x1", 0.75): 30,
    ("coco-yolov3_tiny", "block:8x1", 0.5): 30,
    ("scenes-lanes", "block:8x1", 0.75): 10,
    ("scenes-pillars", "block:8x1", 0.75): 10,
}
"""The epochs of each case that is not classification."""
ON_TASKS = (DEFAULT, "slr-tightening", "slr", "admm", "ac-dc", "masks from the start", "dense")
WATCHED = ("short", "middle", "large", "tasks")
"""Tiers whose pruned copies are measured after each epoch, on the validation split: a look at long runs."""
TIERS = ("short", "tuning", "small", "parts", "budgets", "int8", "middle", "large", "tasks")


@dataclass(frozen=True)
class Row:
    """One run: `setting` tells rows of one contender apart, `epochs` are all that it trains."""

    tier: str
    case: Case
    contender: str
    setting: str
    epochs: int
    seed: int
    options: Options = field(default_factory=dict, hash=False, compare=False)

    def __str__(self) -> str:
        network, pattern, sparsity = self.case
        what = f"{self.contender}: {self.setting}" if self.setting else self.contender
        return f"{self.tier}/{network}/{pattern}@{sparsity}/{what}/{self.epochs}/{self.seed}"


def rows_of(tier: str, seeds: int, out: Path) -> Iterator[Row]:
    """Yield a tier's rows: a seed before the next one, so that what there is compares. `out` has those of before."""
    known = read_rows(out)
    if tier == "tuning":
        for case, (name, contender) in itertools.product(TUNED_ON, CONTENDERS.items()):
            rows = [Row(tier, case, name, short(options), EPOCHS, 0, options) for options in contender.settings()]
            yield from rows if case == TUNED_ON[0] else promising(rows, out)
        return
    for seed in range(seeds):
        for case, name, setting, epochs, options in plain_rows(tier):
            best = {} if setting or tier == "short" else tuned(name, known)
            yield Row(tier, case, name, setting, epochs, seed, merged(best, options))


def promising(rows: Sequence[Row], out: Path) -> list[Row]:
    """Return the settings that came within a point of their contender's best on the first case."""
    known = read_rows(out)
    first = {row.setting: known.get(str(replace(row, case=TUNED_ON[0]))) for row in rows}
    values = {setting: found["val"] for setting, found in first.items() if found}
    return [row for row in rows if values.get(row.setting, 0.0) >= max(values.values(), default=0.0) - NEAR]


def plain_rows(tier: str) -> Iterator[tuple[Case, str, str, int, Options]]:
    """Yield case, contender, setting, epochs and options that are not tuned."""
    match tier:
        case "short":
            for name in CONTENDERS:
                yield ("digits-net", "channel", 0.5), name, "", 3, {}
        case "small":
            for at, name in itertools.product(CASES, CONTENDERS):
                yield at, name, "", EPOCHS, {}
        case "parts":
            for at, (setting, options) in itertools.product(CASES, PARTS.items()):
                yield at, DEFAULT, setting, EPOCHS, options
        case "budgets":
            for epochs, name in itertools.product((20, 3, 2, 12), RIVALS):
                yield CASES[0], name, "", epochs, {}
        case "int8":  # the blocks of its kernels beside those of the float32 ones
            for network, pattern in itertools.product(("fashion-resnet", "fashion-mixer"), ("block:8x4", "block:8x1")):
                yield (network, pattern, 0.75), DEFAULT, "", EPOCHS, {}
        case "middle":
            resnet, mobilenet = (("cifar-resnet20", "block:8x1", 0.75), ("imagenette-mobilenet_v2", "block:8x1", 0.75))
            for epochs in (12, 30):
                yield resnet, DEFAULT, UNTUNED, epochs, {}
            yield mobilenet, DEFAULT, "pruned until 0.75 of the run", 31, {"gradual": {"until": 0.75}}
            for name in ("masks from the start", "slr", "admm", "dense"):
                yield resnet, name, "", 12, {}
        case "large":
            for network in ("vgg16", "resnet18", "resnet110"):
                for name in ("gradual", "slr", "slr-tightening", "admm"):
                    yield (f"cifar-{network}", "block:8x1", 0.75), name, "", 12, {}
        case "tasks":
            for (at, epochs), name in itertools.product(TASKS.items(), ON_TASKS):
                yield at, name, "", epochs, {}


def tuned(name: str, known: Mapping[str, Mapping[str, Any]]) -> Options:
    """Return the settings of a contender that are the best on the validation split, over all cases it was tuned on."""
    name = CONTENDERS[name].like or name
    found: dict[str, list[tuple[float, Options]]] = {}
    for row in known.values():
        if row["row"].startswith("tuning/") and row["contender"] == name:
            found.setdefault(row["setting"], []).append((row["val"], row["options"]))
    whole = [tries for tries in found.values() if len(tries) == len(TUNED_ON)]
    if not whole:
        raise SystemExit(f"`{name}` is not tuned: run `python benchmarks/convergence/run.py tuning` first")
    return max(whole, key=lambda tries: statistics.fmean(value for value, _ in tries))[0][1]


def short(options: Options) -> str:
    """Print settings, such as `rho 1, peak-lr 0.05`."""
    flat = [(k, v) for table in options.values() for k, v in table.items()]
    return ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in flat)


@lru_cache(maxsize=8)
def plan_of(case: Case, *, prunes: bool) -> Plan:
    """Return the plan, alike for every method and seed; for the dense network one that prunes nothing."""
    if not prunes:
        return Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
    network, pattern, sparsity = case
    task = load_task(network)
    return slrc.plan(slrc.capture(task.workload(task.make())), pattern, sparsity)


def run_row(row: Row) -> dict[str, Any]:
    """Train and measure one row."""
    started = time.perf_counter()
    contender, task = CONTENDERS[row.contender], load_task(row.case[0])
    plan = plan_of(row.case, prunes=row.contender != "dense")
    model = task.make()
    if task.bfloat16:
        model.to(memory_format=torch.channels_last)
    first = Masks.project(plan, dict(model.named_parameters()))
    looks = row.tier != "tuning"
    start = task.measure(model, task.validation), task.measure(model, task.test) if looks else None
    workload = task.workload(model, watched=row.tier in WATCHED)
    checkpoints = CACHE / "convergence-checkpoints" / digest(row)
    options = row.options if task.peak_lr is None else merged(row.options, {"recipe": {"peak_lr": task.peak_lr}})
    config = make_config({**contender.config(row.epochs, options), **precision(task), "seed": row.seed})
    trained = run(contender, workload, plan, config, checkpoints)
    result = {
        "row": str(row),
        "contender": row.contender,
        "setting": row.setting,
        "options": options,
        "dense": start[1],
        "dense_val": start[0],
        "val": task.measure(model, task.validation),
        "test": task.measure(model, task.test) if looks else None,
        "curve": [r.hard_pruned for r in trained.curve],
        "changed": changed(first, trained.masks),
        "history": [
            {
                "residual": float(f"{r.residual:.4g}"),
                "step_size": float(f"{r.step_size:.4g}"),
                "multipliers": float(f"{r.multiplier_norm:.4g}"),
                "accepted": r.accepted_loss + r.accepted_projection,
            }
            for r in trained.history
        ],
        "cost": trained.cost.model_dump() if trained.cost else None,
        "metric": task.metric,
        "bfloat16": task.bfloat16,
        "seconds": round(time.perf_counter() - started, 1),
    }
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def run(contender: Contender, workload: slrc.Workload, plan: Plan, config: CompileConfig, checkpoints: Path) -> Trained:
    """Train; a run that was interrupted goes on."""
    if contender.method == MethodName.RECONSTRUCT:
        return reconstruct(slrc.capture(workload), workload, plan, config, checkpoints=checkpoints, resume=True)
    make = make_fixed_set if contender.fixed_set else make_method
    return train(workload, plan, config, checkpoints=checkpoints, resume=True, make=make)


def precision(task: Task) -> dict[str, Any]:
    """Return the option for the arithmetic in which a task trains."""
    return {"precision": Precision.BF16 if task.bfloat16 else Precision.FP32}


def changed(first: Masks, last: Masks) -> float | None:
    """Return the share of the weights that magnitudes kept at the start and that are pruned at the end."""
    kept = sum(int(mask.sum()) for mask in first.tensors.values())
    lost = sum(int((mask & ~last.tensors[n]).sum()) for n, mask in first.tensors.items())
    return round(lost / kept, 4) if kept else None


def digest(row: Row) -> str:
    """Return a file name for a row."""
    return sha256(str(row).encode()).hexdigest()[:16]


@contextmanager
def claim(row: Row) -> Iterator[bool]:
    """Hold a row, so that no other process runs it; yield whether that succeeded. A dead process holds nothing."""
    folder = CACHE / "convergence-locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / digest(row))
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a results file by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["row"]: row for row in map(json.loads, lines)}


def describe(result: Mapping[str, Any]) -> str:
    """Return a line about a row."""
    test = "" if result["test"] is None else f", test {result['test']:.2f} of {result['dense']:.2f}"
    return f"{result['row']}: validation {result['val']:.2f}{test}, {result['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--seeds", type=int, default=1, help="default: 1")
    parser.add_argument("--only", default="*", help="a glob over names of rows")
    parser.add_argument("--threads", type=int, default=1, help="small layers gain nothing from more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # weights on their way to zero; arithmetic with denormals is slow
    args.out.parent.mkdir(exist_ok=True)
    made = made_with(file_of(RESULTS.name))
    for row in rows_of(args.tier, args.seeds, args.out):
        if not fnmatch(str(row), args.only):
            continue
        with claim(row) as mine:
            if not mine or str(row) in read_rows(args.out):
                continue
            result = {**run_row(row), "made_with": made}
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(describe(result), flush=True)


if __name__ == "__main__":
    main()
