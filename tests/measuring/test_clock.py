"""What the clock remembers, and by what name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slrc.backends import parse_target
from slrc.backends.ort import OnnxRuntime
from slrc.errors import BackendError
from slrc.ir.program import Program, capture
from slrc.measuring import devices
from slrc.measuring.clock import Clock
from slrc.measuring.jobs import Job
from slrc.measuring.timing import PART
from slrc.passes.analysis.cut_segments import cut_segments

ORT = parse_target("ort")
pytestmark = pytest.mark.usefixtures("quick_timing")


def convolution(*shape: int, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return capture(nn.Conv2d(3, 4, 3).to(dtype), (torch.randn(*shape, dtype=dtype),))


def test_inputs_of_other_sizes_and_types_are_other_jobs() -> None:
    alike = [Job.of_whole(convolution(1, 3, 32, 32)) for _ in range(2)]
    others = [
        Job.of_whole(convolution(1, 3, 224, 224)),
        Job.of_whole(convolution(8, 3, 32, 32)),
        Job.of_whole(convolution(1, 3, 32, 32, dtype=torch.float64)),
    ]
    assert alike[0].digest == alike[1].digest
    assert len({job.digest for job in (*alike, *others)}) == 4


def test_what_one_size_took_is_not_taken_for_another(tmp_path: Path) -> None:
    clock = Clock(ORT, 1, tmp_path)
    small, large = (clock.times([Job.of_whole(convolution(1, 3, size, size))], PART)[0] for size in (8, 200))
    assert large.ms > 3 * small.ms


def test_alike_segments_are_one_job() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    digests = [Job.of_segment(s).digest for s in cut_segments(capture(Chain(), (torch.randn(1, 6),)))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_another_version_or_machine_measures_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, found = Job.of_whole(convolution(1, 3, 8, 8)), devices.environment()
    Clock(ORT, 1, tmp_path).times([job], PART)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    Clock(ORT, 1, tmp_path).times([job], PART)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    for changed in ({"cpu": "another"}, {"versions": found["versions"] | {"slrc": "another"}}):
        monkeypatch.setattr(devices, "environment", lambda changed=changed: found | changed)
        Clock(ORT, 1, tmp_path).times([job], PART)
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_what_another_clock_measured_can_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, new = (Job.of_whole(convolution(1, 3, size, size)) for size in (8, 9))
    Clock(ORT, 1, tmp_path).times([known], PART)
    clock = Clock(ORT, 1, tmp_path)
    for job in (known, new, new):
        clock.times([job], PART)
    assert clock.forget()
    assert len(list(tmp_path.rglob("*.json"))) == 1  # what it measured itself
    clock.times([known], PART)
    clock.times([known], PART)
    assert not clock.forget()
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_what_fails_is_said_and_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Job.of_whole(convolution(1, 3, 8, 8))

    def fail() -> Program:
        raise BackendError("no such form")

    jobs = [good, Job("broken", fail, good.inputs), Job("other inputs", good.make, good.inputs * 2)]
    fine, broken, other = Clock(ORT, 1, tmp_path).times(jobs, PART)
    assert fine.ms > 0
    assert not fine.why_not
    assert (broken.ms, broken.why_not) == (float("inf"), "no such form")
    assert "takes 1 inputs, got 2" in other.why_not
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(OnnxRuntime, "load", lambda *_, **__: 1 / 0)
    assert Clock(ORT, 1, tmp_path).times([good], PART)[0].why_not == "division by zero"
