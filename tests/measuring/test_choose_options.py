"""Options of layers by what they take: with a clock that is made up, and really emitted, on a small network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.backends import get_backend, parse_target
from slrc.errors import PlanError, UnreachableError
from slrc.forms.form import Form, FormChoice, FormKind
from slrc.forms.packed_weight import block_density
from slrc.ir.program import Program, capture
from slrc.measuring import choose_options, latency_meter
from slrc.measuring.clock import Clock, Timing
from slrc.measuring.latency_meter import LatencyMeter, make_menus
from slrc.measuring.meet_budget import Measured
from slrc.passes.analysis.cut_segments import cut_segments
from slrc.passes.forms.pack_blocks import why_not_packed
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.sparsity.patterns import Block
from slrc.sparsity.plans import Plan
from slrc.sparsity.projection import project

pytestmark = pytest.mark.usefixtures("quick_timing")
ORT = parse_target("ort")


class Net(nn.Module):
    """Two 3×3 layers, of 16 and of 8 outputs, and one that no pattern fits, of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 8, 3, padding=1)
        self.norm, self.odd = nn.BatchNorm2d(16), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.wide(torch.relu(self.stem(x)))))
        return self.head(self.odd(torch.relu(self.narrow(y))).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(1, 3, 8, 8),), "net")


@pytest.fixture
def times_are_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose time is the number of weights that it holds."""

    def made_up(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        sizes = [
            sum(t.numel() for t in job.program(clock.target).tensors.values() if t.is_floating_point()) for job in jobs
        ]
        return tuple(Timing(float(size)) for size in sizes)

    monkeypatch.setattr(Clock, "times", made_up)


def plan_for(program: Program, pattern: str, budget: float, cache: Path) -> Plan:
    return slrc.plan(program, pattern, latency_budget=budget, threads=1, cache=cache)


@pytest.mark.usefixtures("times_are_sizes")
@pytest.mark.parametrize("pattern", ["block:8x1", "columns:2", "auto"])
def test_a_budget_is_met_on_the_whole(program: Program, pattern: str, tmp_path: Path) -> None:
    plan = plan_for(program, pattern, 0.6, tmp_path)
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(0.6, rel=0.07)  # few options
    assert plan.latency.budget == 0.6
    assert plan.budget is not None
    assert {c.name for c in plan} == {menu.name for menu in plan.budget.menus}
    took = sum(option.ms for option in plan.options().values())
    assert took <= plan.budget.ms
    assert 0 < plan.sparsity == plan.sparsity_asked


@pytest.mark.usefixtures("times_are_sizes")
def test_the_dense_option_comes_first_and_costs_what_dense_does(program: Program, tmp_path: Path) -> None:
    start = slrc.plan(program, "block:8x1", 0.0)
    times = LatencyMeter(program, ORT, threads=1, cache=tmp_path).options(start, (Block(8, 1), Block(16, 1)))
    found = make_menus(times, start, program)
    sizes = {"wide": 16 * 16 * 9 + 16, "narrow": 16 * 8 * 9 + 8}
    assert {menu.name: menu.options[0].ms for menu in found.menus} == sizes
    assert all(menu.options[0].keep == menu.options[0].groups for menu in found.menus)
    offered = {menu.name: {str(o.pattern) for o in menu.options} for menu in found.menus}
    assert offered == {"wide": {"block:8x1", "block:16x1"}, "narrow": {"block:8x1"}}
    assert found.dense_ms == sum(sizes.values()) + (3 * 16 * 9 + 16) + (8 * 6 + 6) + (6 * 3 + 3)
    for menu in found.menus:
        for pattern in ("block:8x1", "block:16x1"):
            ms = [o.ms for o in menu.options if str(o.pattern) == pattern]
            assert ms == sorted(ms, reverse=True)


@pytest.mark.usefixtures("times_are_sizes")
def test_a_budget_out_of_reach_is_told_layer_by_layer(program: Program, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"reached on ort: .*% are left; `wide` .* to .* ms; `narrow") as error:
        plan_for(program, "block:8x1", 0.05, tmp_path)
    assert "what is not pruned" in error.value.message
    assert "--latency-budget" in (error.value.hint or "")


def test_where_nothing_becomes_faster_all_is_left(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "times", lambda clock, jobs, budget: tuple(Timing(1.0) for _ in jobs))
    with pytest.raises(PlanError, match="100% are left") as error:
        plan_for(program, "block:8x1", 0.6, tmp_path)
    assert "another pattern" in (error.value.hint or "")


def test_options_are_timed_for_real(program: Program, tmp_path: Path) -> None:
    start = slrc.plan(program, "block:8x1", 0.0)
    meter = LatencyMeter(program, ORT, threads=1, cache=tmp_path)
    times = meter.options(start, (Block(8, 1), Block(4, 1)))
    found = make_menus(times, start, program)
    assert all(option.ms > 0 for menu in found.menus for option in menu.options)
    assert LatencyMeter(program, ORT, threads=1, cache=tmp_path).options(start, (Block(8, 1), Block(4, 1))) == times


def test_an_int8_target_is_offered_blocks_of_four_channels_and_of_one(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: set[tuple[str, ...]] = set()

    def watched(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        timed.update(tuple(str(form) for form in job.make().forms.values()) for job in jobs)
        return tuple(Timing(1.0) for _ in jobs)

    monkeypatch.setattr(Clock, "times", watched)
    target = parse_target("ort+int8")
    patterns = choose_options.offered_patterns(target)
    assert [str(p) for p in patterns] == ["block:8x4", "block:4x4", "block:8x1"]
    start = slrc.plan(program, "block:8x4", 0.0)
    LatencyMeter(program, target, threads=1, cache=tmp_path).options(start, patterns)
    assert timed >= {(), ("packed-int8:8",), ("packed-int8:4",), ("packed:8",)}


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_a_segment_that_is_repacked_is_as_if_emitted(program: Program, rows: int, tmp_path: Path) -> None:
    """Emitted once with few blocks of eight rows, then with other blocks: the numbers are those of the new ones."""
    segment = next(s for s in cut_segments(slrc.pipeline.baseline(program)) if s.anchor == "conv2d_1")
    (layer,) = [layer for layer in program.layers.values() if segment.anchor in layer.nodes]
    variants = latency_meter._Variants(segment, layer, ORT)
    weight = next(p.detach() for p in segment.module.parameters() if p.dim() == 4)
    for i, (size, keep) in enumerate([(8, 0.1), (rows, 0.5)]):
        pattern = Block(size, 1)
        zeros = weight * project(pattern, weight, round(pattern.group_view(weight).shape[1] * keep))
        job = variants.job(lambda zeros=zeros: zeros, Form(FormKind.PACKED, size), keep)
        folder = tmp_path / str(i)
        folder.mkdir()
        assert job.emit is not None
        job.emit(folder)
        (found,) = get_backend(ORT).load(folder, threads=1)(*segment.inputs)
        expected = job.program(ORT).module()(*segment.inputs)[0]
        assert torch.allclose(found, expected, atol=1e-5)
    node = next(n for n in program.nodes if n.name == "conv2d_1")
    assert not why_not_packed(node, rows)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(12, 16, 2, 2), nn.ConvTranspose2d(12, 8, 4, 2, 1)], ids=str)
def test_a_transposed_segment_is_emitted_with_its_own_zeros(layer: nn.Module, tmp_path: Path) -> None:
    layers = nn.Conv2d(3, 12, 3), layer, nn.Conv2d(layer.out_channels, 3, 1)
    program = capture(nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),), "net")
    (segment,) = [s for s in cut_segments(slrc.pipeline.baseline(program)) if "transpose" in s.anchor]
    own = program.layers["1.weight"]
    weight = own.outputs_first(program.tensors["1.weight"].detach())
    zeros = weight * project(Block(8, 1), weight, 20)
    job = latency_meter._Variants(segment, own, ORT).job(lambda: zeros, Form(FormKind.PACKED, 8), 0.5)
    assert job.emit is None
    emitted = job.program(ORT)
    assert any("block_sparse" in str(node.target) for node in emitted.nodes)
    with torch.no_grad():
        layer.weight.copy_(own.as_stored(zeros))
    expected = layer(*segment.inputs)
    torch.testing.assert_close(emitted.module()(*segment.inputs)[0], expected, atol=1e-5, rtol=1e-5)


class Residual(nn.Module):
    """A residual block between two layers, so that channels are shared, with batch norm and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1, bias=False)
        self.norm, self.depthwise = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.back, self.last = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.back(torch.relu(self.depthwise(torch.relu(self.norm(self.widen(y))))))
        return self.head(torch.relu(self.last(y)).mean(dim=(2, 3)))


@pytest.mark.parametrize("rows", [4, 8])
def test_blocks_of_what_channels_leave_are_blocks_of_what_is_emitted(rows: int) -> None:
    torch.manual_seed(rows)
    program = capture(Residual().eval(), (torch.randn(1, 3, 8, 8),), "net")
    channels = slrc.plan(program, "channel", 0.5, round_to=8, keep_ends=False)
    mixed = choose_options.joined(channels, slrc.plan(program, f"block:{rows}x1", 0.5))
    masks = slrc.Masks.project(mixed, program.tensors)
    masks.check(mixed, program.tensors)
    masked = ApplyMasks(masks)(program).program
    slim = slrc.structure(program, mixed, masks)
    assert slim.num_parameters < program.num_parameters
    for inputs in (program.example_inputs, (torch.randn(3, 3, 8, 8),)):
        assert torch.allclose(masked.module()(*inputs), slim.module()(*inputs), atol=1e-5)
    for name in ("widen.weight", "back.weight", "last.weight"):
        assert slim.tensors[name].shape != program.tensors[name].shape
        assert block_density(slim.tensors[name], rows) == pytest.approx(0.5, abs=0.02)


@pytest.mark.usefixtures("times_are_sizes")
def test_auto_narrows_where_options_alone_do_not_reach(tmp_path: Path) -> None:
    """Depthwise layers have no blocks: only fewer channels make them faster."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 5, groups=64), nn.Conv2d(64, 8, 1), nn.Conv2d(8, 3, 1))
    program = capture(net, (torch.randn(1, 3, 8, 8),), "net")
    with pytest.raises(PlanError, match="cannot be reached") as wide:
        slrc.plan(program, "block:8x1", latency_budget=0.5, threads=1, cache=tmp_path, keep_ends=False)
    with pytest.raises(PlanError, match=r"cannot be reached") as narrow:
        slrc.plan(program, "auto", latency_budget=0.02, threads=1, cache=tmp_path, keep_ends=False)
    left = [int(re.search(r"(\d+)% are left", e.value.message)[1]) for e in (wide, narrow)]  # type: ignore[index]
    assert left[1] < left[0] / 2  # narrower layers reach further, and that is what is told
    plan = slrc.plan(program, "auto", latency_budget=0.5, threads=1, cache=tmp_path, keep_ends=False)
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(0.5, rel=0.1)
    assert any(c.pattern.coupled and c.keep < c.groups for c in plan)
    assert {str(c.pattern) for c in plan} > {"channel"}


@pytest.mark.usefixtures("times_are_sizes")
def test_auto_reaches_what_the_least_widths_leave(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 5, groups=64), nn.Conv2d(64, 8, 1), nn.Conv2d(8, 3, 1))
    program = capture(net, (torch.randn(1, 3, 8, 8),), "net")
    budget = 0.16  # less than three quarters of the channels leave
    plan = slrc.plan(program, "auto", latency_budget=budget, threads=1, cache=tmp_path, keep_ends=False)
    assert plan.latency is not None
    assert plan.latency.predicted <= budget * 1.05
    with pytest.raises(UnreachableError, match=r"a latency of 2% .* with every group at its least width") as error:
        slrc.plan(program, "auto", latency_budget=0.02, threads=1, cache=tmp_path, keep_ends=False)
    within = error.value.least + 0.02
    plan = slrc.plan(program, "auto", latency_budget=within, threads=1, cache=tmp_path, keep_ends=False)
    assert plan.latency is not None
    assert plan.latency.predicted <= within * 1.05


@pytest.mark.usefixtures("times_are_sizes")
@pytest.mark.parametrize(("pattern", "budget"), [("block:8x1", 0.85), ("auto", 0.4)])
def test_transposed_convolutions_take_options(pattern: str, budget: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.ConvTranspose2d(12, 16, 2, 2), nn.Conv2d(16, 3, 1)
    program = capture(nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),), "net")
    plan = slrc.plan(program, pattern, latency_budget=budget, cache=tmp_path)
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(budget, rel=0.05)
    (transposed,) = [c for c in plan if c.name == "2"]
    assert transposed.keep < transposed.groups == 12 * 4 * 16 // getattr(transposed.pattern, "rows", 1)
    slrc.Masks.project(plan, program.tensors).check(plan)


@pytest.mark.usefixtures("times_are_sizes")
@pytest.mark.parametrize("pattern", ["block:8x1", "auto"])
def test_what_the_parts_alone_do_not_reach_is_timed_as_a_whole(
    program: Program, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Plan] = []

    def measure(self: LatencyMeter, plan: Plan) -> Measured:
        planned.append(plan)
        return Measured(0.04 if len(planned) == 1 else 0.05)

    monkeypatch.setattr(LatencyMeter, "measure", measure)
    plan = plan_for(program, pattern, 0.05, tmp_path)
    assert plan.latency is not None
    assert (plan.latency.predicted, plan.shortfall) == (0.05, "")
    fastest, budget = planned[0].options(), planned[0].budget
    assert budget is not None
    least = {menu.name: min(o.ms for o in menu.options) for menu in budget.menus}
    assert {name: option.ms for name, option in fastest.items()} == least


@pytest.mark.usefixtures("times_are_sizes")
def test_auto_takes_other_widths_where_the_whole_misses_the_budget(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[set[str]] = []

    def measure(self: LatencyMeter, plan: Plan) -> Measured:
        planned.append({c.name for c in plan if c.pattern.coupled})
        return Measured(0.9 if planned[-1] == planned[0] else 0.6)

    monkeypatch.setattr(LatencyMeter, "measure", measure)
    plan = plan_for(program, "auto", 0.6, tmp_path)
    assert plan.latency is not None
    assert (plan.latency.predicted, plan.shortfall) == (0.6, "")
    assert {c.name for c in plan if c.pattern.coupled} == planned[-1] != planned[0]


@pytest.mark.usefixtures("times_are_sizes")
def test_a_layer_that_is_faster_dense_is_not_pruned_for_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first plan's options of one layer turn out to be no faster: the second plan has others for it, or none."""
    planned: list[Plan] = []

    def measure(self: LatencyMeter, plan: Plan) -> Measured:
        planned.append(plan)
        return Measured(0.6, {"narrow"} if len(planned) == 1 else set())

    monkeypatch.setattr(LatencyMeter, "measure", measure)
    plan = plan_for(program, "block:8x1", 0.6, tmp_path)
    first, second = (made.options()["narrow"] for made in planned)
    assert first.keep < first.groups
    assert second.ms < first.ms or second.keep == second.groups
    assert plan.options()["narrow"] == second
    offered = next(menu.options for menu in plan.budget.menus if menu.name == "narrow") if plan.budget else ()
    assert all(option.ms < first.ms for option in offered[1:])


@pytest.mark.usefixtures("times_are_sizes")
def test_a_budget_that_is_met_with_an_idle_layer_is_met(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.61, 0.7, 0.8, 0.9])
    monkeypatch.setattr(LatencyMeter, "measure", lambda self, plan: Measured(next(shares), {"narrow", "wide"}))
    plan = plan_for(program, "block:8x1", 0.6, tmp_path)
    assert plan.latency is not None
    assert (plan.latency.predicted, plan.shortfall) == (0.61, "")


def test_what_is_idle_in_the_whole_is_told_by_its_constraint(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = slrc.plan(program, "block:8x1", 0.5)
    choice = FormChoice(target="ort", threads=1, idle=("wide.weight",))
    monkeypatch.setattr(latency_meter, "time_forms", lambda *args: choice)
    found = LatencyMeter(program, ORT, threads=1, cache=tmp_path).measure(plan)
    assert found.idle == {"wide"}
    assert found.share > 0
