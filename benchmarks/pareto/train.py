"""Accuracy at a share of the dense latency, by pattern and allocation, beside smaller dense networks: the training.

    export SLRC_DATA=~/data
    python benchmarks/pareto/train.py small     # Fashion-MNIST's two networks: hours on one core
    python benchmarks/pareto/train.py middle    # CIFAR-10's ResNet-20 and -56, Imagenette's MobileNetV2: days
    python benchmarks/pareto/train.py middle --only '*mobilenet*/auto@0.5*'
    python benchmarks/pareto/latency.py         # times all that was trained, in turns, on an idle machine
    python benchmarks/pareto/frontier.py        # draws it

All networks are trained as many epochs after the dense start and with the same teacher, the dense network, by the
recipe of the package; `RECIPE` and `SCRATCH_LR` are highest learning rates other than its own. `auto` mixes patterns
over layers, `block:8x1` and `channel` share the budget out over layers, `uniform` prunes the same share of each,
`Torch-Pruning` takes channels by the norm of their groups and fine-tunes. Smaller networks start from scratch and train
besides for as many epochs as the dense start took here, but for those that have weights of their own. One tenth of the
training images is for validation; test images are looked at once, at the end.

Rows are appended to `benchmarks/results/pareto.jsonl` as they come, the trained networks are kept in the cache. An
interrupted run goes on with what is missing, a row that takes long from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(1, str(Path(__file__).parents[1] / "convergence"))
sys.path.insert(1, str(Path(__file__).parents[1]))
from networks import ALLOCATED, FAMILIES, GRADUAL, TORCH_PRUNING, TRAINED, UNIFORM, plan_for, ratio_for, torch_pruned
from results import file_of, made_with
from run import claim, precision, read_rows
from tasks import CACHE, Task, load_task

import slrc
from slrc.config import CompileConfig, make_config
from slrc.errors import PlanError
from slrc.ir.program import Program
from slrc.machine.memory import keep_freed_memory
from slrc.pipeline import baseline, structure
from slrc.reconstruction.reconstruct import reconstruct
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.training.distillation import soft_divergence
from slrc.training.loop import train

RESULTS = Path(__file__).parents[1] / "results" / "pareto.jsonl"
SHARES = (1 / 2, 1 / 3, 1 / 5)
REFITTED_ON = 1024
"""Training images that layers are refitted on."""
RECIPE = {"recipe": {"peak_lr": 0.02}}
"""Of networks whose layers were refitted, or that Torch-Pruning has pruned: they keep what they knew by small steps."""
SCRATCH_LR = 0.1
"""Highest learning rate of networks that start from scratch."""
MASK = "mask:"
TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True)
class Run:
    """How long a network's rows train, how many epochs its dense start took here, what batch is timed, the shares."""

    epochs: int
    dense: int
    batch: int = 1
    shares: tuple[float, ...] = SHARES


TIERS = {
    "short": {"digits-net": Run(2, 1, 32)},
    "small": {"fashion-resnet": Run(20, 40, 32), "fashion-mixer": Run(20, 40, 32)},
    "middle": {
        "imagenette-mobilenet_v2": Run(16, 4, shares=(0.55, *SHARES)),
        "cifar-resnet56": Run(30, 4),
        "cifar-resnet20": Run(12, 4),
    },
}
"""Networks of each tier; `short` shows in a minute that all works. One image alone takes the small ones no longer than
the runtime takes for a call. Blocks alone leave half of MobileNetV2's latency: at 55% they can be compared."""


@dataclass(frozen=True)
class Row:
    """One network: a contender at a share of the dense latency, or a smaller one, whose share is what comes out."""

    network: str
    contender: str
    share: float | None
    epochs: int
    seed: int

    def __str__(self) -> str:
        share = "" if self.share is None else f"@{self.share:.2f}"
        return f"{self.network}/{self.contender}{share}/{self.epochs}/{self.seed}"

    @property
    def batch(self) -> int:
        """The batch that is timed."""
        return next(runs[self.network].batch for runs in TIERS.values() if self.network in runs)

    @property
    def folder(self) -> Path:
        """Where what is trained lies."""
        return CACHE / "pareto" / sha256(str(self).encode()).hexdigest()[:16]

    @property
    def is_trained(self) -> bool:
        """Whether what is trained lies there."""
        return (self.folder / TRAINED_FILE).exists()


def rows_of(tier: str, seeds: int) -> Iterator[Row]:
    """Yield a tier's rows, a seed before the next one."""
    for seed in range(seeds):
        for network, run in TIERS[tier].items():
            for contender in (*ALLOCATED, *UNIFORM, TORCH_PRUNING):
                for share in run.shares:
                    yield Row(network, contender, share, run.epochs, seed)
            for name in FAMILIES[network]:
                yield Row(network, name, None, run.epochs + (0 if name in TRAINED else run.dense), seed)


def run_row(row: Row) -> dict[str, Any]:
    """Train and measure one row."""
    started, task = time.perf_counter(), load_task(row.network)
    row.folder.mkdir(parents=True, exist_ok=True)
    dense = task.make()
    start = task.measure(dense, task.validation), task.measure(dense, task.test)
    about = {
        "row": str(row),
        "network": row.network,
        "contender": row.contender,
        "share": row.share,
        "epochs": row.epochs,
        "dense": start[1],
        "dense_val": start[0],
    }
    try:
        trained, found = (train_plan if is_planned(row) else train_whole)(row, task, dense)
    except PlanError as error:
        return {**about, "unreachable": str(error)}
    return {
        **about,
        "val": task.measure(trained, task.validation),
        "test": task.measure(trained, task.test),
        "seconds": round(time.perf_counter() - started, 1),
        **found,
    }


def is_planned(row: Row) -> bool:
    """Tell whether a row has a plan of slrc's."""
    return row.contender in ALLOCATED + UNIFORM


def train_plan(row: Row, task: Task, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Train the dense network under a plan; it is kept with its masks."""
    workload = slrc.Workload(
        model=model,
        example_inputs=(example_of(row, task),),
        train_batches=task.batches,
        evaluate=lambda m: {"accuracy": task.measure(m, task.validation)},
    )
    program, go_on = capture(model, row, task), {"checkpoints": row.folder / "checkpoints", "resume": True}
    plan = planned(row, program, workload)
    if task.bfloat16:
        model.to(memory_format=torch.channels_last)
    common = {"seed": row.seed, **precision(task)}
    if row.contender.endswith(GRADUAL):
        trained = train(workload, plan, make_config({"method": "gradual", "epochs": row.epochs, **common}), **go_on)
    else:
        refit = {"method": "reconstruct", "epochs": row.epochs, "reconstruct": {"images": REFITTED_ON}}
        trained = reconstruct(program, workload, plan, make_config({**refit, **RECIPE, **common}), **go_on)
    (row.folder / "trained_plan.json").write_text(trained.plan.model_dump_json())
    save(row, trained.tensors | {f"{MASK}{name}": mask for name, mask in trained.masks.tensors.items()})
    return model, {
        "predicted": plan.latency.predicted if plan.latency else None,
        "sparsity": trained.masks.sparsity(trained.plan),
        "curve": [r.hard_pruned for r in trained.curve],
    }


def planned(row: Row, program: Program, workload: slrc.Workload) -> Plan:
    """Return a row's plan; the one of before, where it was interrupted."""
    file = row.folder / "plan.json"
    if not file.exists():
        file.write_text(plan_for(program, workload, row.contender, row.share or 1.0).model_dump_json())
    return Plan.model_validate_json(file.read_text())


def train_whole(row: Row, task: Task, dense: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Train a smaller network, or what Torch-Pruning leaves of the dense one, with the dense one as its teacher."""
    settings, found = CompileConfig().recipe, {}
    if row.contender == TORCH_PRUNING:
        found["ratio"] = pruned_ratio(row, task, dense)
        settings = settings.model_copy(update=RECIPE["recipe"])
    elif row.contender not in TRAINED:
        settings = settings.model_copy(update={"peak_lr": SCRATCH_LR})
    model, teacher = smaller(row, task), dense.eval().requires_grad_(False)
    if task.bfloat16:
        for network in (model, teacher):
            network.to(memory_format=torch.channels_last)

    def loss(student: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        output = student(x)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=task.bfloat16):
            answer = teacher.to(x.device)(x)
        distance = soft_divergence(output, answer.float(), settings.temperature)
        return (1 - settings.distill_weight) * cross_entropy(output, y) + settings.distill_weight * distance

    workload = slrc.Workload(
        model=model, example_inputs=(example_of(row, task),), train_batches=task.batches, loss=loss
    )
    budget = {"method": "magnitude", "epochs": 0, "retrain_epochs": row.epochs, "distill": False}
    config = make_config({**budget, "recipe": settings.model_dump(), "seed": row.seed, **precision(task)})
    nothing = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
    save(row, train(workload, nothing, config, checkpoints=row.folder / "checkpoints", resume=True).tensors)
    return model, found


def smaller(row: Row, task: Task) -> nn.Module:
    """Return a row's network as it starts."""
    if row.contender == TORCH_PRUNING:
        model = task.make()
        return torch_pruned(model, example_of(row, task), pruned_ratio(row, task, model))
    torch.manual_seed(row.seed)
    return FAMILIES[row.network][row.contender]()


def pruned_ratio(row: Row, task: Task, dense: nn.Module) -> float:
    """Return the ratio of channels that Torch-Pruning takes; the one of before, where it was interrupted."""
    file = row.folder / "ratio.json"
    if not file.exists():
        file.write_text(json.dumps(ratio_for(dense.eval(), example_of(row, task), row.share or 1.0)))
    return float(json.loads(file.read_text()))


def save(row: Row, tensors: dict[str, Tensor]) -> None:
    """Keep a row's tensors."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, row.folder / TRAINED_FILE)


def program_of(row: Row, task: Task) -> Program:
    """Return what a row has trained, ready for its forms on a target."""
    tensors = load_file(row.folder / TRAINED_FILE)
    if not is_planned(row):
        model = smaller(row, task)
        model.load_state_dict(tensors)
        return baseline(capture(model, row, task))
    masks = Masks({name.removeprefix(MASK): t for name, t in tensors.items() if name.startswith(MASK)})
    plan = Plan.model_validate_json((row.folder / "trained_plan.json").read_text())
    weights = {name: t for name, t in tensors.items() if not name.startswith(MASK)}
    return structure(capture(task.make(), row, task).with_tensors(weights), plan, masks)


def capture(model: nn.Module, row: Row, task: Task) -> Program:
    """Return a network's program."""
    return slrc.capture(slrc.Workload(model=model, example_inputs=(example_of(row, task),)))


def example_of(row: Row, task: Task) -> Tensor:
    """Return the images that a row is timed on."""
    return next(iter(task.validation))[0][: row.batch].contiguous()


def main() -> None:
    """Run what is missing and append it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--only", default="*", help="a glob over names of rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="small layers gain nothing from more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # weights on their way to zero; arithmetic with denormals is slow
    made = made_with(file_of(RESULTS.name))
    for row in rows_of(args.tier, args.seeds):
        if not fnmatch(str(row), args.only):
            continue
        with claim(row) as mine:
            if not mine or str(row) in read_rows(args.out):
                continue
            result = run_row(row)
            with args.out.open("a") as file:
                file.write(json.dumps({**result, "made_with": made}) + "\n")
        print(describe(result), flush=True)


def describe(result: Mapping[str, Any]) -> str:
    """Return a line about a row."""
    if "unreachable" in result:
        return f"{result['row']}: {result['unreachable']}"
    return (
        f"{result['row']}: validation {result['val']:.2f} of {result['dense_val']:.2f}, test {result['test']:.2f} of "
        f"{result['dense']:.2f}, {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
