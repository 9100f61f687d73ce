"""What is planned where little is asked for, or more than can be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slrc
from slrc.backends import Availability
from slrc.backends.tensorrt import TensorRT
from slrc.config import make_config
from slrc.errors import UnreachableError
from slrc.measuring.clock import Clock, Timing
from slrc.planning import plan_from

MakeWorkload = Callable[..., slrc.Workload]


def times_are_sizes(monkeypatch: pytest.MonkeyPatch, least: float) -> None:
    """A runtime whose time is the number of weights that it holds, and something for each run."""

    def made_up(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        sizes = [
            sum(t.numel() for t in job.program(clock.target).tensors.values() if t.is_floating_point()) for job in jobs
        ]
        return tuple(Timing(least + size) for size in sizes)

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
