"""The real thing: a compile that is killed and resumed gives what an uninterrupted one does, bit by bit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from slrc.reporting.report import Report

OPTIONS = ["--epochs", "2", "--retrain-epochs", "2", "--threads", "1", "--sparsity", "0.5"]

# The workload file kills its own process, as `kill -9` from outside would: at a training step, or in the structure's
# first pass.
KILLER = """

def kill_at(step):
    import os, signal
    done = [0]

    def loss(model, batch):
        done[0] += model.training
        if done[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return slrc.cross_entropy(model, batch)

    return loss


import os as _os
_point = _os.environ.get("KILL_AT", "")
if _point == "structure":
    from slrc.passes.structure.apply_masks import ApplyMasks
    ApplyMasks.__call__ = lambda *_: _os.kill(_os.getpid(), 9)

_whole = workload


def workload():
    made = _whole()
    made.loss, made.distill = kill_at(int(_point) if _point.isdigit() else -1), slrc.soft_divergence
    return made
"""


Start = Callable[..., Any]


@pytest.fixture(scope="session")
def start(start_process: Start) -> Start:
    """Starts `slrc compile`, as the command does, in a process of its own."""

    def run(folder: Path, *extra: str, kill_at: str = "") -> Any:
        command = ["slrc", "compile", "tinynet.py", *OPTIONS, "--out", "build", *extra]
        code = f"sys.argv[:] = {command!r}; sys.path.insert(0, ''); from slrc.cli import main; main()"
        return start_process(code, folder, KILL_AT=kill_at)

    return run


def finish(process: Any) -> str:
    done = process.finish()
    assert done.code == 0, done.err
    return done.err


def write_workload(folder: Path, source: str) -> Path:
    (folder / "tinynet.py").write_text(source + KILLER)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, workload_source: str, start: Start) -> Path:
    """The output of an uninterrupted run."""
    folder = write_workload(tmp_path_factory.mktemp("uninterrupted"), workload_source)
    finish(start(folder))
    return folder / "build"


def assert_same_output(found: Path, expected: Path) -> None:
    assert (found / "plan.json").read_text() == (expected / "plan.json").read_text()
    ours, theirs = (load_file(p / "masks.safetensors") for p in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(m, theirs[n]) for n, m in ours.items())
    ours, theirs = (torch.export.load(p / "model.pt2").state_dict for p in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
    for side in ("dense", "compiled"):
        weights = [
            {
                i.name: numpy_helper.to_array(i).tobytes()
                for i in onnx.load(p / "ort" / side / "model.onnx").graph.initializer
            }
            for p in (found, expected)
        ]
        assert weights[0] == weights[1]
        assert weights[0]
    reports = [Report.load(p) for p in (found, expected)]
    assert reports[0].history == reports[1].history
    assert reports[0].accuracy == reports[1].accuracy
    curves = [[r.model_copy(update={"seconds": 0.0}) for r in report.curve] for report in reports]
    assert curves[0] == curves[1]


# Six steps an epoch: before the first checkpoint, in the second epoch of retraining, and after training.
@pytest.mark.parametrize("kill_at", ["3", "21", "structure"])
def test_killed_and_resumed(start: Start, tmp_path: Path, reference: Path, workload_source: str, kill_at: str) -> None:
    killed = start(write_workload(tmp_path, workload_source), kill_at=kill_at).finish()
    assert killed.code == -signal.SIGKILL, killed.err
    assert not (tmp_path / "build").exists()
    assert sorted(p.name for p in tmp_path.glob("build*")) == ["build.work"]

    if kill_at == "21":
        blocked = start(tmp_path).finish()
        assert blocked.code == 2
        assert "an unfinished run lies in" in blocked.err
    err = finish(start(tmp_path, "--resume"))
    assert ("gradual epoch 1/2" in err) is (kill_at == "3")
    assert ("retrain epoch 2/2" in err) is kill_at.isdigit()
    assert sorted(p.name for p in tmp_path.glob("build*")) == ["build"]
    assert_same_output(tmp_path / "build", reference)


def test_killed_within_an_epoch(start: Start, tmp_path: Path, reference: Path, workload_source: str) -> None:
    often = ("--checkpoint-minutes", "0")
    killed = start(write_workload(tmp_path, workload_source), *often, kill_at="10").finish()
    assert killed.code == -signal.SIGKILL, killed.err
    err = finish(start(tmp_path, *often, "--resume"))
    assert "going on after gradual epoch 1, step 3 of the next" in err
    assert_same_output(tmp_path / "build", reference)


def test_killed_from_outside_after_the_first_checkpoint(
    start: Start, tmp_path: Path, reference: Path, workload_source: str
) -> None:
    process = start(write_workload(tmp_path, workload_source))
    checkpoints = tmp_path / "build.work" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("0*")) and process.is_running and time.monotonic() < deadline:
        assert not (tmp_path / "build").exists()
        time.sleep(0.002)
    process.kill()
    assert process.finish().code == -signal.SIGKILL
    assert not (tmp_path / "build").exists()
    newest = [p for p in checkpoints.iterdir() if p.name.isdigit()]
    assert newest
    assert all((p / "progress.json").exists() for p in newest)
    finish(start(tmp_path, "--resume"))
    assert_same_output(tmp_path / "build", reference)
