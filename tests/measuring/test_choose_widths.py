"""Widths that meet a latency, with tables that are made up: nothing is timed here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slrc.errors import ConfigError, PlanError
from slrc.ir.program import Program, capture
from slrc.measuring.choose_widths import LatencyGoal, _Work
from slrc.measuring.latency_table import LatencyTable, SegmentLatency, WholeLatency
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.analysis.cut_segments import cut_segments
from slrc.passes.analysis.label_indices import label_indices
from slrc.passes.structure.shrink_channels import ShrinkChannels
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Channel, Unstructured
from slrc.sparsity.plans import Plan


class Net(nn.Module):
    """A residual stream of 16 channels, a depthwise layer, a gate, attention with 4 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.up, self.depthwise = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down = nn.Conv2d(32, 16, 1)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.down(torch.relu(self.depthwise(torch.relu(self.up(y)))))
        t = y.flatten(2).transpose(1, 2)
        n = t.shape[0]
        q, k, v = self.qkv(t).view(n, -1, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, 16)
        return self.head((t + self.out(a)).mean(1))


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(1, 3, 8, 8),), "net")


def table_of(program: Program, cost: Callable[[str], float] = lambda name: 1.0) -> LatencyTable:
    """A runtime whose time is proportional to the multiply-accumulates, times what a segment costs."""
    segments = tuple(
        SegmentLatency(
            name=s.anchor,
            macs=(s.macs, s.macs // 2, s.macs // 16),
            ms=tuple(m * cost(s.anchor) * 1e-3 for m in (s.macs, s.macs // 2, s.macs // 16)),
        )
        for s in cut_segments(program)
    )
    sums = [sum(s.ms[i] for s in segments) for i in range(3)]
    whole = tuple(WholeLatency(segments_ms=x, ms=x) for x in sums)
    return LatencyTable(target="ort", threads=1, machine="made up", segments=segments, whole=whole)


def by_latency(program: Program, table: LatencyTable, budget: float, **options: Any) -> Plan:
    goal = LatencyGoal(table, budget)
    return allocate_sparsity(program, Channel(), choose_widths=goal, **options)


def slim(program: Program, plan: Plan) -> Program:
    return ShrinkChannels(plan, Masks.project(plan, program.tensors))(program).program


def test_the_work_of_widths_is_that_of_the_slim_program(program: Program) -> None:
    rng = np.random.default_rng(0)
    start = allocate_sparsity(program, Channel(), 0.0, keep_ends=False)
    labels = label_indices(program)
    work = _Work.of(program, labels, start.constraints)
    for _ in range(8):
        keep = np.array([rng.integers(1, c.groups + 1) for c in start])
        constraints = tuple(c.model_copy(update={"keep": int(k)}) for c, k in zip(start, keep, strict=True))
        made = slim(program, start.model_copy(update={"constraints": constraints}))
        assert [work.macs(k, keep) for k in range(len(work.nodes))] == [s.macs for s in cut_segments(made)]


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3])
def test_the_budget_is_met_and_not_by_far(program: Program, budget: float) -> None:
    plan = by_latency(program, table_of(program), budget)
    assert plan.latency is not None
    assert plan.latency.predicted <= budget
    assert plan.latency.predicted > budget - 0.15
    share = slim(program, plan).macs / program.macs
    assert share == pytest.approx(plan.latency.predicted, rel=0.05)
    assert plan.sparsity_asked == plan.sparsity > 0


def test_widths_are_multiples(program: Program) -> None:
    plan = by_latency(program, table_of(program), 0.5, round_to=8)
    assert any(c.keep < c.groups for c in plan)
    for c in plan:
        width = len(c.members[0].index or range(c.groups)) // c.groups
        assert c.keep == c.groups or c.keep * width % 8 == 0, c.name


def test_what_costs_most_shrinks_most(program: Program) -> None:
    def up_is_slow(name: str) -> float:
        return 20.0 if name == "conv2d_1" else 1.0

    even, skewed = (by_latency(program, table_of(program, cost), 0.6) for cost in (lambda _: 1.0, up_is_slow))
    kept = [next(c.keep for c in plan if c.name == "up") for plan in (even, skewed)]
    assert kept[1] < kept[0]


def test_what_counts_little_shrinks_most(program: Program) -> None:
    table = table_of(program)
    kept = []
    for weights in ({}, {"up": 0.01}, {"up": 100.0}):
        goal = LatencyGoal(table, 0.6, weights)
        kept.append(next(c.keep for c in allocate_sparsity(program, Channel(), choose_widths=goal) if c.name == "up"))
    assert kept[1] < kept[0] <= kept[2]


def test_small_weights_go_first(program: Program) -> None:
    with torch.no_grad():
        program.tensors["up.weight"][8:] = 1e-6
        program.tensors["up.bias"][8:] = 1e-6
        program.tensors["depthwise.weight"][8:] = 1e-6
        program.tensors["depthwise.bias"][8:] = 1e-6
    plan = by_latency(program, table_of(program), 0.7)
    assert next(c.keep for c in plan if c.name == "up") <= 8


def test_a_budget_out_of_reach_is_an_error_that_says_what_is_not(program: Program) -> None:
    with pytest.raises(PlanError, match=r"cannot be reached on ort.*% are left") as error:
        by_latency(program, table_of(program), 0.01)
    assert re.search(r"left; `\w+` \d+\.\d{3} to \d+\.\d{3} ms; .* 2 more ", error.value.message)
    assert "--latency-budget" in (error.value.hint or "")


def test_only_channels_have_widths(program: Program) -> None:
    goal = LatencyGoal(table_of(program), 0.5)
    with pytest.raises(ConfigError, match="channel"):
        allocate_sparsity(program, Unstructured(), choose_widths=goal)
