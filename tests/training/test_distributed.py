"""Two processes on the CPU: they train what one does with the same batches, and resume after one of them is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slrc.ir.program import Program
from slrc.reporting.report import Report

# No batch norm: its statistics are of a process's own share. Each process takes half of a batch.
WORKLOAD = """
import os, signal
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
import slrc.measuring.timing

slrc.measuring.timing.PATIENCE = 0.0
torch.set_num_threads(1)
processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
done = 0


def loss(model, batch):
    global done
    done += model.training
    if done == 8 and rank == 1 and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return slrc.cross_entropy(model, batch)


def workload():
    torch.manual_seed(0)
    x = torch.randn(48, 4, 6, 6)
    y = x.mean(dim=(2, 3))[:, :3].argmax(1)
    layers = nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return slrc.Workload(
        model=nn.Sequential(*layers),
        example_inputs=(x[:1],),
        train_batches=DataLoader(TensorDataset(x, y), batch_size=8 // processes, shuffle=True),
        loss=loss,
        evaluate=lambda m: {"accuracy": (m(x).argmax(1) == y).float().mean().item()},
    )
"""
OPTIONS = ["--epochs", "2", "--retrain-epochs", "1", "--sparsity", "0.5", "--round-to", "1", "--threads", "1"]
COMPILE = ["compile", "net.py", "--out", "build"]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TOLERANCE = 1e-5
"""Of the largest weight: gradients of two halves are summed in another order than those of the whole."""


def run(folder: Path, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return launch(folder, *OPTIONS, *extra, **environment)


def launch(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHER, "-m", "slrc", *COMPILE, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, start_process: Callable[..., Any]) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "net.py").write_text(WORKLOAD)
    arguments = ["slrc", *COMPILE, *OPTIONS]
    code = f"sys.argv[:] = {arguments!r}; sys.path.insert(0, ''); from slrc.cli import main; main()"
    done = start_process(code, folder).finish()
    assert done.code == 0, done.err
    return folder / "build"


def test_two_processes_resume_after_one_was_killed_and_make_what_one_does(one: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WORKLOAD)
    killed = run(tmp_path, KILL="1")
    assert killed.returncode != 0
    assert "gradual epoch 1/2" in killed.stderr
    assert sorted(p.name for p in tmp_path.glob("build*")) == ["build.work"], killed.stderr

    resumed = run(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "gradual epoch 1/2" not in resumed.stderr  # six steps an epoch: the first one was whole
    assert resumed.stderr.count("  gradual epoch 2: ") == 1
    assert "another slrc run" not in resumed.stderr
    assert resumed.stdout.count("report: build/report.html") == 1
    two = tmp_path / "build"
    assert sorted(p.name for p in tmp_path.glob("build*")) == ["build"]
    assert sorted(p.name for p in two.rglob("*")) == sorted(p.name for p in one.rglob("*"))

    masks = [load_file(p / "masks.safetensors") for p in (two, one)]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())
    weights = [Program.load(p / "program").tensors for p in (two, one)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[1].items():
        assert (weights[0][name] - weight).abs().max() <= TOLERANCE * weight.abs().max(), name
    reports = [Report.load(p) for p in (two, one)]
    assert [c.epoch for c in reports[0].curve] == [c.epoch for c in reports[1].curve]
    assert [i.loss for i in reports[0].history] == pytest.approx([i.loss for i in reports[1].history], rel=1e-4)
    losses = [[c.loss for c in r.curve if c.loss is not None] for r in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_train_a_refitted_network_as_one_does(start_process: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--method", "reconstruct", "--epochs", "1", "--pattern", "block:4x1", "--prune-ends", "--threads", "1"]
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "net.py").write_text(WORKLOAD)
        if name == "two":
            done = launch(folder, *options)
            assert done.returncode == 0, done.stderr
        else:
            arguments = ["slrc", *COMPILE, *options]
            code = f"sys.argv[:] = {arguments!r}; sys.path.insert(0, ''); from slrc.cli import main; main()"
            assert start_process(code, folder).finish().code == 0
        found.append(load_file(folder / "build" / "masks.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(mask, found[1][n]) for n, mask in found[0].items())
