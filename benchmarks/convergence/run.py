"""SLR against the other methods, on real data: hard-pruned accuracy while training, and after little retraining.

    export SLRC_DATA=~/data
    python benchmarks/convergence/run.py short --out FILE  # half a minute, on scikit-learn's digits
    python benchmarks/convergence/run.py small          # Fashion-MNIST: 5 hours on one core
    python benchmarks/convergence/run.py middle         # CIFAR-10, ResNet-20: 13 hours on a core, 27 without bfloat16
    python benchmarks/convergence/run.py wide           # larger networks: some 9 hours on a core
    python benchmarks/convergence/run.py large          # an epoch of ResNet-110 (10 minutes), -18 (38), -50 (95)
    python benchmarks/convergence/run.py budget-1       # runs of one epoch; also budget-2 and budget-3: 8 hours in all
    SLRC_IMAGES=~/imagenet python benchmarks/convergence/run.py wide --network images-torchvision:resnet50
    python benchmarks/convergence/run.py retraining     # 1, 3 and 10 epochs after hard-pruning, small: 6 hours
    python benchmarks/convergence/run.py ablation       # parts of SLR's default left out or changed: half an hour
    python benchmarks/convergence/run.py small --seeds 1 --only '*unstructured*'
    python benchmarks/convergence/run.py small & python benchmarks/convergence/run.py small  # share the rows

Every row starts from the same dense weights and takes the same batches, steps and schedule of the learning rate: SGD
with Nesterov momentum 0.9, 0.01 falling to zero along a cosine, weight decay 5e-4. Twice an epoch a copy is hard-pruned
and measured, with the running statistics of batch norm as they are and recomputed on 20 batches. Retraining goes under
the masks, with the same schedule anew. A validation split of the training images chooses settings; test images only
report.

Rows are appended to `benchmarks/results/convergence.jsonl` as they come; a run goes on with what is missing.
`convergence/answers.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, make_contender
from tasks import CACHE, Images, Task, load_task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(1, str(Path(__file__).parents[1]))
from results import file_of, made_with

import slrc
from slrc.machine.lock import take_lock
from slrc.training.batch_norm import recalibrate_batch_norm
from slrc.training.batches import update_steps

RESULTS = Path(__file__).parents[1] / "results" / "convergence.jsonl"
LR, PROBE_BATCHES, RECALIBRATION_BATCHES = 0.01, 8, 20
MEASURES_PER_EPOCH = 2
RETRAINING = (1, 3, 10)


@dataclass(frozen=True)
class Row:
    """One run."""

    tier: str
    network: str
    pattern: str
    sparsity: float
    contender: str
    seed: int

    def __str__(self) -> str:
        return f"{self.tier}/{self.network}/{self.pattern}@{self.sparsity}/{self.contender}/{self.seed}"


METHODS = ("slr", "admm", "admm-rising", "magnitude", "gradual", "ac-dc", "group-lasso", "torch-pruning")
FASHION = ("fashion-resnet", "fashion-mixer")
SMALL = {
    "unstructured": (0.8, 0.9, 0.95),
    "block:8x1": (0.5, 0.75, 0.9),
    "columns:2": (0.25, 0.5, 0.75),
    "channel": (0.25, 0.5, 0.75),
    "2:4": (0.5,),
}
MIDDLE = {"unstructured": (0.8, 0.9), "block:8x1": (0.75,), "columns:2": (0.5,), "channel": (0.5,)}
WIDE = ("cifar-resnet56", "cifar-vgg16", "imagenette-mobilenet_v2", "cifar-swin", "cifar-mixer")
LARGE = ("cifar-resnet110@random", "cifar-resnet18@random", "cifar-resnet50@random")
ABLATION = {"unstructured": (0.9,), "block:8x1": (0.75,)}
MIDDLE_SPARSITIES = {"unstructured": 0.9, "block:8x1": 0.75, "columns:2": 0.5, "channel": 0.5, "2:4": 0.5}
RETRAINED = ("slr", "admm", "gradual", "magnitude", "torch-pruning")
BUDGETS = {f"budget-{epochs}": epochs for epochs in (1, 2, 3)}
EPOCHS = {"short": 3, "large": 1, **BUDGETS}
USUAL_EPOCHS = 6
TIERS = ("short", "small", "middle", "wide", "large", *BUDGETS, "retraining", "ablation")
ONE_SEED = ("short", "wide", "large", "ablation")
Cases = tuple[Mapping[str, tuple[float, ...]], Sequence[str], Sequence[str]]
"""Sparsities by pattern, networks, contenders: all are combined."""


def rows_of(tier: str, seeds: int, instead: str | None = None) -> Iterator[Row]:
    """Yield a tier's rows: a seed before the next one, middle sparsities first, so that what there is compares."""
    ablated = ["slr", *(name for name in CONTENDERS if name not in METHODS)]
    budget: list[Cases] = [
        (SMALL, FASHION, ("slr", "admm", "admm-rising")),
        (MIDDLE, ("cifar-resnet20",), ("slr", "admm")),
    ]
    cases: dict[str, list[Cases]] = {
        "short": [({"channel": (0.5,)}, ("digits-net",), METHODS)],
        "small": [(SMALL, FASHION, METHODS)],
        "middle": [(MIDDLE, ("cifar-resnet20",), ("slr", "admm", "gradual", "ac-dc"))],
        "wide": [({"block:8x1": (0.75,)}, WIDE, ("slr", "admm"))],
        "large": [({"block:8x1": (0.75,)}, LARGE, ("slr",))],
        "retraining": [({p: (s,) for p, s in MIDDLE_SPARSITIES.items()}, FASHION, RETRAINED)],
        "ablation": [(ABLATION, FASHION, ablated)],
        **dict.fromkeys(BUDGETS, budget),
    }
    for seed in range(1 if tier in ONE_SEED else seeds):
        rows = []
        for patterns, usual, names in cases[tier]:
            networks = [instead] if instead else usual
            for pattern, sparsities in patterns.items():
                for sparsity, network, name in itertools.product(sparsities, networks, names):
                    if name != "torch-pruning" or pattern == "channel":
                        rows.append(Row(tier, network, pattern, sparsity, name, seed))
        yield from sorted(rows, key=lambda row: MIDDLE_SPARSITIES[row.pattern] != row.sparsity)


@lru_cache(maxsize=4)
def plan_of(network: str, pattern: str, sparsity: float) -> slrc.Plan:
    """Return the plan, alike for every method and seed."""
    task = load_task(network)
    workload = slrc.Workload(model=task.make(), example_inputs=(task.example,))
    return slrc.plan(slrc.capture(workload), pattern, sparsity)


class Run:
    """One row's training: the loop, and what is measured in it."""

    def __init__(self, row: Row, task: Task, plan: slrc.Plan, epochs: int) -> None:
        self.row, self.task, self.epochs = row, task, epochs
        self.steps = len(task.batches)
        self.model = task.make()
        if task.bfloat16:
            self.model.to(memory_format=torch.channels_last)
        settings = CONTENDERS[row.contender]
        self.due = update_steps(self.steps, settings.updates_per_epoch)
        self.contender: Contender = make_contender(settings, self.model, plan, epochs * len(self.due), task.example)
        torch.manual_seed(2**20)
        self.probe = list(itertools.islice(iter(task.batches), PROBE_BATCHES))
        self.recalibration = list(itertools.islice(iter(task.batches), RECALIBRATION_BATCHES))
        self.method_s = self.train_s = 0.0
        self.curve: list[dict[str, float]] = []

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, its forward pass in bfloat16 where the task asks for it."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.task.bfloat16):
            logits = model(x)
        return cross_entropy(logits.float(), y)

    def probe_loss(self) -> float:
        """Return f on fixed batches, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            total = sum(float(cross_entropy(self.model(x), y)) for x, y in self.probe)
        self.model.train()
        return total / len(self.probe)

    def train(self) -> None:
        """Train under the contender's constraints."""
        measured = update_steps(self.steps, MEASURES_PER_EPOCH)
        optimizer, schedule = make_optimizer(self.model, self.epochs * self.steps)
        self.contender.start(self.probe_loss)
        for epoch in range(self.epochs):
            torch.manual_seed(self.row.seed * 1000 + epoch)
            self.model.train()
            for i, (x, y) in enumerate(self.task.batches, start=1):
                started = time.perf_counter()
                self.loss(self.model, x, y).backward()
                before = time.perf_counter()
                self.contender.add_penalty_gradient()
                self.method_s += time.perf_counter() - before
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                before = time.perf_counter()
                self.contender.after_step()
                if i in self.due:
                    self.contender.update(self.probe_loss)
                self.method_s += time.perf_counter() - before
                self.train_s += time.perf_counter() - started
                if i in measured:
                    self.curve.append({"epoch": round(epoch + i / self.steps, 3), **self.measure(self.task.glance)})

    def measure(self, test: Images, key: str = "") -> dict[str, float]:
        """Return the accuracies of a hard-pruned copy, in percent, with batch norm as it is and recalibrated."""
        pruned, _ = self.contender.prune(copy.deepcopy(self.model))
        record = {f"hard{key}": self.accuracy(pruned, test)}
        self.recalibrate(pruned)
        return record | {f"hard_bn{key}": self.accuracy(pruned, test)}

    def recalibrate(self, pruned: nn.Module) -> None:
        """Take batch-norm statistics anew, on the same batches each time."""
        recalibrate_batch_norm(pruned, lambda m, batch: m(batch[0]), self.recalibration, RECALIBRATION_BATCHES)

    def accuracy(self, model: nn.Module, images: Images) -> float:
        """Return the share of images that `model` gets right, in percent."""
        training = model.training
        model.eval()
        right = seen = 0
        with torch.no_grad():
            for x, y in images:
                right += int((model(x).argmax(1) == y).sum())
                seen += len(y)
        model.train(training)
        return round(100 * right / seen, 3)

    def retrain(self, epochs: int) -> float:
        """Return a hard-pruned copy's accuracy after some epochs under its masks."""
        model, masks = self.contender.prune(copy.deepcopy(self.model))
        self.recalibrate(model)
        optimizer, schedule = make_optimizer(model, epochs * self.steps)
        parameters = dict(model.named_parameters())
        for epoch in range(epochs):
            torch.manual_seed(self.row.seed * 1000 + 500 + epoch)
            model.train()
            for x, y in self.task.batches:
                self.loss(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                masks.apply_(parameters)
        return self.accuracy(model, self.task.test)


def make_optimizer(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimiser and the schedule that every row and every retraining uses."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def run_row(row: Row) -> dict[str, Any]:
    """Train, measure and retrain one row."""
    started = time.perf_counter()
    task = load_task(row.network)
    plan = plan_of(row.network, row.pattern, row.sparsity)
    run = Run(row, task, plan, EPOCHS.get(row.tier, USUAL_EPOCHS))
    dense = run.accuracy(run.model, task.test), run.accuracy(run.model, task.validation)
    run.train()
    steps = run.epochs * run.steps
    retraining = {"short": RETRAINING[:1], "retraining": RETRAINING}.get(row.tier, ())
    return {
        "row": str(row),
        "dense": dense[0],
        "dense_val": dense[1],
        "curve": run.curve,
        "final": {
            "live": run.accuracy(run.model, task.test),
            **run.measure(task.test),
            **run.measure(task.validation, "_val"),
        },
        "retrained": {e: run.retrain(e) for e in retraining},
        "history": run.contender.summary(),
        "bfloat16": task.bfloat16,
        "step_ms": round(1e3 * run.train_s / steps, 3),
        "method_ms": round(1e3 * run.method_s / steps, 3),
        "state_kb": round(run.contender.state_bytes() / 1024, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


@contextmanager
def claim(row: Row) -> Iterator[bool]:
    """Hold a row, so that no other process runs it; yield whether that succeeded. A dead process holds nothing."""
    folder = CACHE / "convergence-locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / sha256(str(row).encode()).hexdigest()[:16])
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a results file by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["row"]: row for row in map(json.loads, lines)}


def describe(result: dict[str, Any]) -> str:
    """Return a line about a row."""
    if "error" in result:
        return f"{result['row']}: {result['error']}"
    return f"{result['row']}: {result['final']['hard_bn']:.1f} of {result['dense']:.1f} %, {result['seconds']:.0f} s"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--network", help="in place of the tier's, such as images-torchvision:resnet50")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="*", help="a glob over names of rows")
    parser.add_argument("--threads", type=int, default=1, help="small layers gain nothing from more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # weights on their way to zero; arithmetic with denormals is slow
    rows = [r for r in rows_of(args.tier, args.seeds, args.network) if fnmatch(str(r), args.only)]
    out = args.out
    out.parent.mkdir(exist_ok=True)
    made = made_with(file_of(RESULTS.name))
    for row in rows:
        with claim(row) as mine:
            if not mine or str(row) in read_rows(out):
                continue
            try:
                result = run_row(row)
            except ModuleNotFoundError as error:
                print(f"{row}: left out, `pip install {str(error.name).replace('_', '-')}` first", flush=True)
                continue
            except Exception as error:
                if row.contender != "torch-pruning":  # which cannot do every network
                    raise
                result = {"row": str(row), "error": f"{type(error).__name__}: {error}"}
            with out.open("a") as file:
                file.write(json.dumps(result | {"made_with": made}) + "\n")
            print(describe(result), flush=True)


if __name__ == "__main__":
    main()
