"""Latency tables measured for real, in ONNX Runtime, on small networks, and plans made by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.backends import parse_target
from slrc.backends.ort import OnnxRuntime
from slrc.errors import BackendError, PlanError, UnreachableError
from slrc.ir.program import Program, capture
from slrc.measuring.clock import Clock, Timing
from slrc.measuring.latency_meter import LatencyMeter, SegmentTimes, make_menus
from slrc.measuring.latency_table import LatencyTable
from slrc.measuring.meet_budget import CORRECTIONS, Measured, Slow, meet_budget
from slrc.sparsity.patterns import Block
from slrc.sparsity.plans import Plan

pytestmark = pytest.mark.usefixtures("quick_timing")


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
    assert [s.name for s in table.segments] == [layer.name for layer in program.layers.values()]
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
    with pytest.raises(BackendError, match="cannot be timed here: it is not installed"):
        meter(program, tmp_path)


def test_nothing_to_time_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no layer or matrix product"):
        meter(capture(nn.ReLU(), (torch.randn(1, 3),), "relu"), tmp_path).table([])


def sizes_for_times(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the clock say that time is proportional to the size of the weights.

    Return how many programs are asked for at once: a list that grows.
    """
    asked: list[int] = []

    def made_up(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        asked.append(len(jobs))
        sizes = [sum(t.numel() for t in job.program(clock.target).tensors.values()) for job in jobs]
        return tuple(Timing(float(size)) for size in sizes)

    monkeypatch.setattr(Clock, "times", made_up)
    return asked


def plan_for(program: Program, budget: float, cache: Path) -> Plan:
    return slrc.plan(program, "channel", latency_budget=budget, cache=cache, round_to=1, keep_ends=False)


def test_a_plan_for_a_latency_is_checked_on_the_whole(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sizes_for_times(monkeypatch)
    plan = plan_for(program, 0.6, tmp_path)
    assert asked[:4] == [3, 3, 3, 3]
    assert asked[4] == 2
    slim = slrc.structure(program, plan, slrc.Masks.project(plan, program.tensors))
    share = slim.num_parameters / program.num_parameters
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(share, rel=0.1)
    assert 0.4 < share < 0.7


def test_a_correction_that_goes_too_far_leaves_what_was_nearest(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the table that the first plan's time has joined, nothing reaches the budget any more."""
    plans: list[Plan] = []

    def allocate(table: LatencyTable, slow: Slow) -> Plan:
        if plans:
            raise UnreachableError("out of reach", "ask for more", 0.65)
        plans.append(start)
        return start

    sizes_for_times(monkeypatch)
    start = plan_for(program, 0.6, tmp_path)
    made = meet_budget(meter(program, tmp_path).whole(1.0), 0.6, allocate, lambda plan: Measured(0.625))
    assert made.latency is not None
    assert made.latency.predicted == 0.625
    assert "60.0% of the dense one was asked for, and 62.5% reached" in made.shortfall
    with pytest.raises(UnreachableError):
        meet_budget(meter(program, tmp_path).whole(1.0), 0.6, allocate, lambda plan: Measured(0.625))


def test_a_budget_that_is_missed_is_said_with_what_was_measured(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.9, 0.7, 0.8, 0.85])
    planned: list[Plan] = []

    def measure(self: LatencyMeter, plan: Plan) -> Measured:
        planned.append(plan)
        return Measured(next(shares))

    sizes_for_times(monkeypatch)
    monkeypatch.setattr(LatencyMeter, "measure", measure)
    plan = plan_for(program, 0.6, tmp_path)
    assert len(planned) == 1 + CORRECTIONS
    assert plan.latency is not None
    assert plan.latency.predicted == 0.7
    assert plan.constraints == planned[1].constraints
    assert plan.shortfall == "a latency of 60.0% of the dense one was asked for, and 70.0% reached"


def test_a_narrower_layer_still_reads_and_writes() -> None:
    """A layer takes 1 ms for its inputs and outputs and 8 for its work: half the channels of both are half and 2."""
    pattern = Block(8, 1)
    segment = SegmentTimes("layer", None, 9.0, {pattern: {0.5: 5.0, 0.25: 3.0}}, 9.0)
    assert segment.at(pattern, 0.5, 1.0, 9.0) == pytest.approx(5.0)
    assert segment.at(pattern, 0.5, 0.25, 9.0) == pytest.approx(0.5 + 1.0)
    assert segment.at(pattern, 0.5, 0.25, 1.2) == pytest.approx(1.2)  # dense is faster
    once = SegmentTimes("layer", None, 9.0, {pattern: {0.5: 5.0}}, 9.0)  # other densities had no form of their own
    assert once.at(pattern, 0.5, 0.25, 9.0) == pytest.approx(0.5 + 1.0)


def quarter_if_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock say that a layer takes 1 ms packed, and else 4."""

    def made_up(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        found = []
        for program, forms in ((made.program, made.forms) for made in (job.make() for job in jobs)):
            kinds = [forms[weight].kind.name if weight in forms else "" for weight in program.layers]
            found.append(Timing(sum(1.0 if kind.startswith("PACKED") else 4.0 for kind in kinds)))
        return tuple(found)

    monkeypatch.setattr(Clock, "times", made_up)
    monkeypatch.setattr(OnnxRuntime, "make_ready", lambda *_: None)
    monkeypatch.setattr(OnnxRuntime, "why_not_packed", lambda *_: "")


@pytest.fixture
def convolutions() -> Program:
    """The first one is on an image: it is not pruned, but may be packed with no zeros."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LeakyReLU(0.1), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    return capture(net, (torch.randn(1, 3, 16, 16),), "convolutions")


def test_what_is_not_pruned_counts_in_the_form_that_it_has_beside_packed_layers(
    convolutions: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quarter_if_packed(monkeypatch)
    start = slrc.plan(convolutions, "block:8x4", 0.5, round_to=1, keep_ends=False, skip=("0",))
    known = LatencyMeter(convolutions, parse_target("ort+int8"), threads=1, cache=tmp_path)
    found = make_menus(known.options(start, [Block(8, 4)]), start, convolutions)
    assert len(found.menus) == 2
    assert (found.rest_ms, found.dense_rest_ms, found.dense_ms) == (1.0, 4.0, 12.0)


def test_a_budget_that_the_rest_would_meet_alone_prunes_what_lets_it_be_packed(
    convolutions: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quarter_if_packed(monkeypatch)
    options = {"target": "ort+int8", "keep_ends": False, "skip": ("0",), "cache": tmp_path}
    plan = slrc.plan(convolutions, "block:8x4", latency_budget=0.95, **options)
    assert plan.sparsity > 0
    assert plan.latency is not None
    assert plan.latency.predicted < 0.95
