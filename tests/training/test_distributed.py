"""Two and four processes on the CPU train what one does with the same batches, and go on after one was killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slrc.ir.program import Program
from slrc.reporting.report import Report

# No batch norm: its statistics are of a process's own share. Each process takes its share of a batch.
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
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if done == 8 and rank == 1 and "KILL" in os.environ and not restarted:
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
    assert "this is a bug in slrc" not in killed.stderr
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

    assert_same_masks(two, one)
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
    assert_same_masks(tmp_path / "one" / "build", tmp_path / "two" / "build")


def assert_same_masks(build: Path, other: Path) -> None:
    ours, theirs = (load_file(p / "masks.safetensors") for p in (build, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(mask, theirs[n]) for n, mask in ours.items())


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    if (ip := shutil.which("ip")) is None:
        pytest.skip("`ip` of iproute2 is not installed")
    names = [f"slrc-{os.getpid()}-{i}" for i in (1, 2)]
    ends = [f"v{os.getpid()}-{i}" for i in (1, 2)]

    def do(*words: str) -> None:
        done = subprocess.run([ip, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"`ip {' '.join(words)}` is not permitted: {done.stderr.strip()}")

    try:
        for name in names:
            do("netns", "add", name)
        do("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            do("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", end)
            do("-n", name, "link", "set", end, "name", "cable")
            do("-n", name, "link", "set", "cable", "up")
            do("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True, check=False)


def test_four_processes_of_two_machines_go_on_after_one_was_killed_and_make_what_one_does(
    one: Path, tmp_path: Path, machines: list[str]
) -> None:
    (tmp_path / "net.py").write_text(WORKLOAD)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", "KILL": "1"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else torch 2.14 may look for the processes that have ended
    started = []
    for i, name in enumerate(machines, start=1):
        launcher = [*LAUNCHER[:3], "--nnodes", "2", "--nproc_per_node", "2", "--max-restarts", "1"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29400", "--local-addr", f"10.77.0.{i}"]
        launcher += ["--rdzv_conf", f"is_host={int(i == 1)}"]  # torchrun would ask whose name the address has
        command = ["ip", "netns", "exec", name, *launcher, "-m", "slrc", *COMPILE, *OPTIONS]
        with (tmp_path / f"{i}.out").open("w") as out, (tmp_path / f"{i}.err").open("w") as err:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=err))
    try:
        codes = [process.wait(timeout=480) for process in started]
    finally:
        for process in started:
            process.kill()
    out, err = ("".join((tmp_path / f"{i}.{kind}").read_text() for i in (1, 2)) for kind in ("out", "err"))
    assert codes == [0, 0], err
    assert "going on after gradual epoch 1" in err
    assert err.count("  gradual epoch 1: ") == err.count("  gradual epoch 2: ") == 1
    assert out.count("report: build/report.html") == 1
    assert sorted(p.name for p in tmp_path.glob("build*")) == ["build"]
    assert_same_masks(tmp_path / "build", one)
