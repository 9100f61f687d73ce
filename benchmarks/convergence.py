"""SLR against the other methods, on real data: hard-pruned accuracy while training, and after little retraining.

    export SLRC_DATA=~/data
    python benchmarks/convergence.py small              # 30 hours on one core
    python benchmarks/convergence.py small --seeds 1 --only '*unstructured*'
    python benchmarks/convergence.py small & python benchmarks/convergence.py small   # share the rows
    python benchmarks/convergence.py ablation           # each part of the default left out
    python benchmarks/convergence.py small --short      # two rows of some seconds, into a file of their own

Every row starts from the same dense weights and takes the same batches, steps and schedule of the learning rate: SGD
with Nesterov momentum 0.9, 0.01 falling to zero along a cosine, weight decay 5e-4. Twice an epoch a copy is hard-pruned
and measured, with the running statistics of batch norm as they are and recomputed on 20 batches. Rows of the first seed
at a middle sparsity are retrained under their masks for 1, 3 and 10 epochs, each with the same schedule anew. A
validation split of the training images chooses settings; test images only report.

Rows are appended to `benchmarks/results/convergence.jsonl` as they come; a run goes on with what is missing.
`convergence_answers.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from convergence_contenders import CONTENDERS, Contender, make_contender
from convergence_tasks import CACHE, Task, load_task
from torch import nn
from torch.nn.functional import cross_entropy

import slrc
from slrc.batch_norm import recalibrate_batch_norm
from slrc.batches import update_steps

RESULTS = Path(__file__).parent / "results" / "convergence.jsonl"
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
SMALL = {
    "unstructured": (0.8, 0.9, 0.95),
    "block:8x1": (0.5, 0.75, 0.9),
    "columns:2": (0.25, 0.5, 0.75),
    "channel": (0.25, 0.5, 0.75),
    "2:4": (0.5,),
}
RETRAINED = [(pattern, s[len(s) // 2]) for pattern, s in SMALL.items()] + [("unstructured", 0.8)]
MIDDLE = (("unstructured", 0.8), ("unstructured", 0.9), ("block:8x1", 0.75), ("columns:2", 0.5), ("channel", 0.5))
ABLATION = (("unstructured", 0.9), ("block:8x1", 0.75), ("columns:2", 0.5), ("channel", 0.5), ("2:4", 0.5))
FASHION = ("fashion-resnet", "fashion-mixer")
EPOCHS = {"small": 6, "ablation": 6, "middle": 6, "wide": 6}


def rows_of(tier: str, seeds: int) -> Iterator[Row]:
    """Yield a tier's rows: all of a seed before the next one, so that what is there at any time can be compared."""
    for seed in range(seeds):
        if tier == "small":
            for pattern, sparsities in SMALL.items():
                for sparsity, network, name in itertools.product(sparsities, FASHION, METHODS):
                    if name != "torch-pruning" or pattern == "channel":
                        yield Row(tier, network, pattern, sparsity, name, seed)
        elif tier == "ablation":
            names = [n for n in CONTENDERS if n not in METHODS] + ["slr"]
            for (pattern, sparsity), network, name in itertools.product(ABLATION, FASHION, names):
                yield Row(tier, network, pattern, sparsity, name, seed)


@lru_cache(maxsize=4)
def plan_of(network: str, pattern: str, sparsity: float, train: int) -> slrc.Plan:
    """Return the plan, alike for every method and seed."""
    task = load_task(network, train)
    workload = slrc.Workload(model=task.make(), example_inputs=(task.example,))
    return slrc.plan(slrc.capture(workload), pattern, sparsity)


class Run:
    """One row's training: the loop, and what is measured in it."""

    def __init__(self, row: Row, task: Task, plan: slrc.Plan, epochs: int) -> None:
        self.row, self.task, self.epochs = row, task, epochs
        self.steps = len(task.batches)
        self.model = task.make()
        settings = CONTENDERS[row.contender]
        self.due = update_steps(self.steps, settings.updates_per_epoch)
        self.contender: Contender = make_contender(
            settings, self.model, plan, epochs * settings.updates_per_epoch, task.example
        )
        torch.manual_seed(2**20)
        self.probe = list(itertools.islice(iter(task.batches), PROBE_BATCHES))
        self.recalibration = list(itertools.islice(iter(task.batches), RECALIBRATION_BATCHES))
        self.method_s = self.train_s = 0.0
        self.curve: list[dict[str, float]] = []

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
                cross_entropy(self.model(x), y).backward()
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
                    self.curve.append(self.measure(epoch + i / self.steps))

    def measure(self, epoch: float) -> dict[str, float]:
        """Return the accuracies of the live model and of a hard-pruned copy, in percent."""
        state = torch.get_rng_state()
        pruned, _ = self.contender.prune(copy.deepcopy(self.model))
        record = {"epoch": round(epoch, 3), "live": self.accuracy(self.model, self.task.test)}
        record |= {"hard": self.accuracy(pruned, self.task.test)}
        record |= {"hard_val": self.accuracy(pruned, self.task.validation)}
        recalibrate_batch_norm(pruned, lambda m, batch: m(batch[0]), self.recalibration, RECALIBRATION_BATCHES)
        record |= {"hard_bn": self.accuracy(pruned, self.task.test)}
        record |= {"hard_bn_val": self.accuracy(pruned, self.task.validation)}
        torch.set_rng_state(state)
        return record

    def accuracy(self, model: nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Return the share of images that `model` gets right, in percent."""
        training = model.training
        model.eval()
        with torch.no_grad():
            right = self.task.accuracy(model, *images)
        model.train(training)
        return round(100 * right, 3)

    def retrain(self, epochs: int) -> float:
        """Return a hard-pruned copy's accuracy after some epochs under its masks."""
        model, masks = self.contender.prune(copy.deepcopy(self.model))
        recalibrate_batch_norm(model, lambda m, batch: m(batch[0]), self.recalibration, RECALIBRATION_BATCHES)
        optimizer, schedule = make_optimizer(model, epochs * self.steps)
        parameters = dict(model.named_parameters())
        for epoch in range(epochs):
            torch.manual_seed(self.row.seed * 1000 + 500 + epoch)
            model.train()
            for x, y in self.task.batches:
                cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                masks.apply_(parameters)
        return self.accuracy(model, self.task.test)


def make_optimizer(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimiser and the schedule that every row and every retraining uses."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def run_row(row: Row, *, short: bool) -> dict[str, Any]:
    """Train, measure and retrain one row."""
    started = time.perf_counter()
    train = 1_000 if short else 10_000
    task = load_task(row.network, train)
    run = Run(row, task, plan_of(row.network, row.pattern, row.sparsity, train), 2 if short else EPOCHS[row.tier])
    dense = run.accuracy(run.model, task.test), run.accuracy(run.model, task.validation)
    run.train()
    steps = run.epochs * run.steps
    retrains = row.seed == 0 and row.tier != "ablation" and (row.pattern, row.sparsity) in RETRAINED
    return {
        "row": str(row),
        "dense": dense[0],
        "dense_val": dense[1],
        "curve": run.curve,
        "retrained": {e: run.retrain(e) for e in (RETRAINING[:1] if short else RETRAINING)} if retrains else {},
        "history": run.contender.summary(),
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
    with (folder / sha256(str(row).encode()).hexdigest()[:16]).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a results file by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["row"]: row for row in map(json.loads, lines)}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=EPOCHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="*", help="a glob over names of rows")
    parser.add_argument("--threads", type=int, default=1, help="small layers gain nothing from more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--short", action="store_true", help="two rows on little data, into a file of their own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # weights on their way to zero; arithmetic with denormals is slow
    rows = [r for r in rows_of(args.tier, args.seeds) if fnmatch(str(r), args.only)]
    out = args.out
    if args.short:
        out, rows = out.with_name("convergence-short.jsonl"), rows[:2]
        out.unlink(missing_ok=True)
    out.parent.mkdir(exist_ok=True)
    for row in rows:
        with claim(row) as mine:
            if not mine or str(row) in read_rows(out):
                continue
            result = run_row(row, short=args.short)
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            last = result["curve"][-1]
            print(f"{row}: {last['hard_bn']:.1f} of {result['dense']:.1f} %, {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
