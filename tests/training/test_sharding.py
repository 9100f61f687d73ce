"""FSDP on two processes of the CPU: what they train is what one does; checkpoints hold whole tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import slrc
from slrc.sparsity.plans import Plan
from slrc.training.trained import save_weights

# Each process takes half of a batch. Interrupted, it resumes in the same process.
SCRIPT = """
import gc, json, os, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc.config import CompileConfig
from slrc.methods.slr import SLR
from slrc.sparsity import shards
from slrc.sparsity.plans import Plan
from slrc.training.loop import train

torch.set_num_threads(1)
processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
CASES = [("slr-tightening", "plan"), ("admm", "channel"), ("ac-dc", "plan"), ("group-lasso", "channel")]


class Stop(slrc.SlrcError):
    pass


def make(norm=False, stop_at=0):
    torch.manual_seed(0)
    x = torch.randn(24, 4, 6, 6)
    y = x.mean(dim=(2, 3))[:, :3].argmax(1)
    layers = [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    done = 0

    def loss(model, batch):
        nonlocal done
        done += model.training
        if done == stop_at > 0:
            raise Stop("stopped")
        return slrc.cross_entropy(model, batch)

    return slrc.Workload(
        model=nn.Sequential(*layers[:1], *([nn.BatchNorm2d(8)] if norm else []), *layers[1:]),
        example_inputs=(x[:1],),
        train_batches=DataLoader(TensorDataset(x, y), batch_size=8 // processes, shuffle=True),
        loss=loss,
        evaluate=lambda m: {"accuracy": (m(x).argmax(1) == y).float().mean().item()},
    )


def run(folder, method, plan="plan", checkpoints=None, resume=False, start_from=None, **options):
    workload, training = make(**options), dict(method=method, epochs=2, retrain_epochs=1, start_from=start_from)
    config = CompileConfig(**training, distill=not checkpoints, checkpoint_minutes=60)
    return train(workload, Plan.load(folder / f"{plan}.json"), config, checkpoints=checkpoints, resume=resume)


def save(folder, name, trained):
    assert not any(hasattr(t, "to_local") for t in trained.tensors.values())
    save_file(dict(trained.tensors), folder / f"{name}.tensors{rank or ''}")
    if rank == 0:
        save_file(dict(trained.masks.tensors), folder / f"{name}.masks")


def stop(folder, name, step):
    try:
        run(folder, "slr", checkpoints=folder / name, stop_at=step)
    except Stop:
        return
    raise AssertionError


def tensors():
    torch.manual_seed(0)
    made = {str(shape): torch.randn(shape) for shape in ((5, 3), (1, 2), (4,), (7, 2, 2))}
    return {**made, "bool": torch.randn(3, 3) > 0, "int": torch.arange(5)}


def share_out(tensors):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (processes,))
    return {n: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for n, t in tensors.items()}


def gather_rows(folder):
    rows = share_out(tensors())
    assert all(torch.equal(shards.own_of(t, rows[n]), shards.own(rows[n])) for n, t in tensors().items())
    again = {n: shards.of_own(shards.own(t).clone(), t) for n, t in rows.items()}
    save_file({n: t.contiguous() for n, t in shards.whole(again).items()}, folder / f"rows{rank}")
    first = [t + rank for t in tensors().values() if t.dtype != torch.bool]
    shards.copy_from_first([*first, torch.tensor(1.0 + rank)])
    sums = shards.totals([1.0 + rank, 10.0], of=list(rows.values()))
    (folder / f"sums{rank}").write_text(json.dumps({"sums": sums, "first": [t.sum().item() for t in first]}))


def count_collectives(folder):
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    for name in ("one", "plan"):
        plan = Plan.load(folder / f"{name}.json")
        parameters = {n: nn.Parameter(t) for n, t in share_out(dict(make().model.named_parameters())).items()}
        slr = SLR(parameters, plan, 10)
        with CommDebugMode() as seen:
            slr.update(lambda: 1.0)
        counts.append({str(op): count for op, count in seen.get_comm_counts().items()})
    (folder / f"counts{rank}").write_text(json.dumps(counts))


def main(folder):
    gc.freeze()  # else each phase of training collects all that was imported
    for method, plan in CASES:
        save(folder, f"{method}, {plan}", run(folder, method, plan))
    gather_rows(folder)
    count_collectives(folder)
    save(folder, "started", run(folder, "gradual", start_from=folder / "start"))
    save(folder, "norm", run(folder, "slr", "norm", norm=True))
    stop(folder, "resumed", 5)
    save(folder, "resumed", run(folder, "slr", checkpoints=folder / "resumed", resume=True))
    stop(folder, "left", 8)  # within retraining's first epoch
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    save(folder, "whole-copies", run(folder, "slr", "norm", norm=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TOLERANCE = 1e-5
"""Of the largest weight: gradients of two halves are summed in another order than those of the whole."""


@pytest.fixture(scope="module")
def one() -> Any:
    """The script, as a module of this process."""
    module = ModuleType("one")
    exec(SCRIPT, module.__dict__)
    return module


@pytest.fixture(scope="module")
def two(one: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes made."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "script.py").write_text(SCRIPT)
    program, norm = slrc.capture(one.make()), slrc.capture(one.make(norm=True))
    for name, planned, pattern in (
        ("plan", program, "block:4x1"),
        ("norm", norm, "block:4x1"),
        ("channel", program, "channel"),
    ):
        slrc.plan(planned, pattern=pattern, sparsity=0.5, round_to=1).save(folder / f"{name}.json")
    plan = Plan.load(folder / "plan.json")
    plan.model_copy(update={"constraints": plan.constraints[:1]}).save(folder / "one.json")
    (folder / "start").mkdir()
    other = {n: 1.5 * t.flip(0) for n, t in one.make().model.state_dict().items()}
    save_weights(other, folder / "start")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true"}
    command = [*LAUNCHER, "script.py", str(folder)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(folder: Path, name: str, masks: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    ours, found = load_file(folder / f"{name}.masks"), load_file(folder / f"{name}.tensors")
    assert ours.keys() == masks.keys()
    assert all(torch.equal(mask, masks[n]) for n, mask in ours.items()), name
    assert found.keys() == tensors.keys()
    for n, tensor in tensors.items():
        assert (found[n] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), (name, n)


def test_sharded_processes_train_what_one_does(one: Any, two: Path) -> None:
    for method, plan in one.CASES:
        alone = one.run(two, method, plan)
        assert_same(two, f"{method}, {plan}", dict(alone.masks.tensors), alone.tensors)


def test_rows_of_uneven_tensors_are_gathered_at_once_in_their_order_and_type(one: Any, two: Path) -> None:
    expected = one.tensors()
    for rank in range(2):
        found = load_file(two / f"rows{rank}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in found.items())
        assert all(t.dtype == expected[n].dtype for n, t in found.items())


def test_sums_are_those_of_all_and_buffers_those_of_the_first(one: Any, two: Path) -> None:
    first = [t.sum().item() for t in one.tensors().values() if t.dtype != torch.bool]
    for rank in range(2):
        assert json.loads((two / f"sums{rank}").read_text()) == {"sums": [3.0, 20.0], "first": first}


def test_an_update_talks_as_often_for_many_weights_as_for_one(two: Path) -> None:
    for rank in range(2):
        one, many = json.loads((two / f"counts{rank}").read_text())
        assert one == many
        assert 2 <= sum(many.values()) <= 5, many


def test_sharded_processes_start_from_other_weights(one: Any, two: Path) -> None:
    alone = one.run(two, "gradual", start_from=two / "start")
    assert_same(two, "started", dict(alone.masks.tensors), alone.tensors)


def test_batch_norm_follows_the_first_process_as_with_whole_copies(two: Path) -> None:
    whole = load_file(two / "whole-copies.masks"), load_file(two / "whole-copies.tensors")
    assert_same(two, "norm", *whole)
    second = load_file(two / "norm.tensors1")
    assert all(torch.equal(t, second[n]) for n, t in load_file(two / "norm.tensors").items())


def test_a_sharded_run_resumes_there_and_in_one_process(one: Any, two: Path) -> None:
    alone = one.run(two, "slr", checkpoints=two / "alone")
    assert_same(two, "resumed", dict(alone.masks.tensors), alone.tensors)
    resumed = one.run(two, "slr", checkpoints=two / "left", resume=True)
    assert all(torch.equal(m, resumed.masks.tensors[n]) for n, m in alone.masks.tensors.items())
    for n, tensor in alone.tensors.items():
        assert (resumed.tensors[n] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), n
