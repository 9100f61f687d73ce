"""What is planned where little is asked for, or more than can be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.backends import Availability
from slrc.backends.tensorrt import TensorRT
from slrc.config import make_config
from slrc.errors import PlanError, UnreachableError
from slrc.measuring.clock import Clock, Timing
from slrc.measuring.devices import LocalDevice
from slrc.measuring.jobs import Job
from slrc.planning import plan_from

MakeWorkload = Callable[..., slrc.Workload]


def weights_of(clock: Clock, job: Job) -> int:
    return sum(t.numel() for t in job.program(clock.target).tensors.values() if t.is_floating_point())


def times_are_sizes(monkeypatch: pytest.MonkeyPatch, least: float) -> None:
    """A runtime whose time is the number of weights that it holds, and something for each run."""

    def made_up(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        return tuple(Timing(least + weights_of(clock, job)) for job in jobs)

    monkeypatch.setattr(Clock, "times", made_up)


def test_where_nothing_is_asked_for_the_network_becomes_twice_as_fast(
    tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times_are_sizes(monkeypatch, 0.0)
    plan = plan_from(slrc.capture(tiny_workload()), make_config({"threads": 1}), cache=tmp_path)
    assert plan.latency is not None
    assert plan.latency.budget == 0.5
    assert "out of reach" not in plan.shortfall
    assert plan.latency.predicted == pytest.approx(0.5, rel=0.1)
    assert {str(c.pattern) for c in plan} - {"channel"}


def test_three_quarters_of_what_can_be_saved_are_where_twice_as_fast_is_out_of_reach(
    tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times_are_sizes(monkeypatch, 5000.0)
    program = slrc.capture(tiny_workload())
    with pytest.raises(UnreachableError) as error:
        plan_from(program, make_config({"threads": 1, "speedup": 2}), cache=tmp_path)
    assert 0.5 < error.value.least < 1
    plan = plan_from(program, make_config({"threads": 1}), cache=tmp_path)
    assert plan.latency is not None
    assert plan.latency.budget == pytest.approx(0.25 + 0.75 * error.value.least)
    assert "50% of the dense latency is out of reach" in plan.shortfall


def test_channels_are_pruned_by_half_where_the_target_cannot_be_timed(
    tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRT, "available", lambda self, target=None: Availability("", "no GPU"))
    program = slrc.capture(tiny_workload())
    plan = plan_from(program, make_config({"target": "tensorrt"}))
    assert {str(c.pattern) for c in plan} == {"channel"}
    assert plan.sparsity_asked == 0.5
    assert "tensorrt: no GPU" in plan.shortfall


class Machine:
    """Takes as long as a program has weights; while it is busy, equally long for all. Counts what it measures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_busy, self.measured = False, 0

        def emit(clock: Clock, job: Job, folder: Path) -> Path:
            folder.mkdir()
            (folder / "weights").write_text(str(weights_of(clock, job)))
            return folder

        def times(device: Any, target: Any, candidates: Any, threads: int, budget: Any) -> list[Timing]:
            self.measured += 1
            return [Timing(5000.0 if self.is_busy else float((c.folder / "weights").read_text())) for c in candidates]

        monkeypatch.setattr(Clock, "_emit", emit)
        monkeypatch.setattr(LocalDevice, "times", times)

    def took(self) -> int:
        """Return how often it has measured since it was asked last."""
        measured, self.measured = self.measured, 0
        return measured


@pytest.mark.parametrize("pattern", ["block:8x1", "channel", "auto"])
def test_times_of_a_busy_machine_are_measured_again_before_a_budget_is_refused(
    pattern: str, tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine, program = Machine(monkeypatch), slrc.capture(tiny_workload())
    config = make_config({"threads": 1, "pattern": pattern, "latency_budget": 0.7})
    machine.is_busy = True
    with pytest.raises(UnreachableError, match="100% are left"):
        plan_from(program, config, cache=tmp_path)
    assert machine.took()
    with pytest.raises(UnreachableError):  # still busy: measured again, and once
        plan_from(program, config, cache=tmp_path)
    again = machine.took()
    machine.is_busy = False
    plan = plan_from(program, config, cache=tmp_path)
    assert plan.latency is not None
    assert plan.latency.predicted <= 0.7 * 1.03
    assert machine.took() > again
    assert plan_from(program, config, cache=tmp_path) == plan
    assert not machine.took()


def test_what_was_just_measured_is_not_measured_again(
    tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine, program = Machine(monkeypatch), slrc.capture(tiny_workload())
    config = make_config({"threads": 1, "pattern": "block:8x1", "latency_budget": 0.05})
    took = []
    for _ in range(3):
        with pytest.raises(UnreachableError):
            plan_from(program, config, cache=tmp_path)
        took.append(machine.took())
    assert took[0] == took[1] == took[2] == len(list(tmp_path.rglob("*.json")))


def test_where_no_layer_has_blocks_channels_are_pruned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No layer has as many outputs as a block has rows, or a multiple."""
    times_are_sizes(monkeypatch, 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))
    program = slrc.capture(slrc.Workload(model, (torch.randn(1, 12),)))
    plan = plan_from(program, make_config({"threads": 1, "speedup": 1.5}), cache=tmp_path)
    assert plan.patterns == "channel"
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(1 / 1.5, rel=0.1)
    assert "only channels are pruned: nothing" in plan.shortfall
    with pytest.raises(PlanError, match="block:8x1"):
        plan_from(program, make_config({"threads": 1, "speedup": 1.5, "pattern": "block:8x1"}), cache=tmp_path)
