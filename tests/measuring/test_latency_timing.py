"""Latency tables measured for real, in ONNX Runtime, on small networks: that there are figures, not which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.backends import parse_target
from slrc.backends.ort import OnnxRuntime
from slrc.errors import BackendError, PlanError
from slrc.ir.program import Program, capture
from slrc.measuring import latency_timing
from slrc.measuring.latency_timing import LatencyMeter
from slrc.sparsity.plans import Plan


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_timing, "PART_BUDGET_S", 0.0)
    monkeypatch.setattr(latency_timing, "WHOLE_BUDGET_S", 0.0)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    return capture(net, (torch.randn(1, 6),), "mlp")


@pytest.fixture
def plans(program: Program) -> list[Plan]:
    return [slrc.plan(program, "channel", 0.5, round_to=1, keep_ends=False)]


def meter(program: Program, cache: Path) -> LatencyMeter:
    return LatencyMeter(program, parse_target("ort"), threads=1, cache=cache)


def test_every_part_and_the_whole_are_timed_once(
    program: Program, plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = meter(program, tmp_path).table(plans)
    assert [s.name for s in table.segments] == ["linear", "linear_1", "linear_2"]
    assert len(table.whole) == 2
    assert all(ms > 0 for s in table.segments for ms in s.ms)
    assert all(s.macs[0] > s.macs[1] for s in table.segments[:2])
    assert sum(s.macs[0] for s in table.segments) == program.macs
    assert table.whole[0].segments_ms == pytest.approx(sum(s.ms[0] for s in table.segments))

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntime, "lower", None)
        assert meter(program, tmp_path).table(plans) == table

    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 4
    for file, text in zip(files, ["", "{}", '{"ms": [1]}', "[]"], strict=True):
        file.write_text(text)  # a damaged cache is measured anew
    again = meter(program, tmp_path).table(plans)
    assert all(ms > 0 for s in again.segments for ms in s.ms)


def test_a_target_that_cannot_run_here_is_refused(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        OnnxRuntime, "available", lambda self, target=None: slrc.backends.Availability("", "it is not installed")
    )
    with pytest.raises(BackendError, match="cannot run here: it is not installed"):
        meter(program, tmp_path)


def test_nothing_to_time_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no layer or matrix product"):
        meter(capture(nn.ReLU(), (torch.randn(1, 3),), "relu"), tmp_path).table([])


def test_a_plan_for_a_latency_is_checked_on_the_whole(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock says that time is proportional to the size of the inputs and weights."""

    def made_up(clock: Any, jobs: Any, budget_s: float) -> tuple[float, ...]:
        sizes = [sum(t.numel() for t in make().tensors.values()) for _, make, _ in jobs]
        asked.append(len(jobs))
        return tuple(float(size) for size in sizes)

    asked: list[int] = []
    monkeypatch.setattr(latency_timing.Clock, "times", made_up)
    plan = slrc.plan(
        program, "channel", allocate="latency", latency_budget=0.6, cache=tmp_path, round_to=1, keep_ends=False
    )
    assert asked[:4] == [3, 3, 3, 3]
    assert asked[4] == 2
    slim = slrc.structure(program, plan, slrc.Masks.project(plan, program.tensors))
    share = slim.num_parameters / program.num_parameters
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(share, rel=0.1)
    assert 0.4 < share < 0.7
