"""What options are measured to cost, with neither labels nor a clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.errors import PlanError
from slrc.ir.program import Program, capture
from slrc.measuring.choose_widths import losses_of_widths
from slrc.measuring.latency_meter import Menus, SegmentTimes, make_menus
from slrc.measuring.weigh_options import weigh_options, weigh_widths, weighed
from slrc.reconstruction import errors
from slrc.reconstruction.calibration import Inputs, calibration_inputs
from slrc.reconstruction.errors import divergence, group_divergences, layer_errors, output_divergences
from slrc.sparsity.choices import Metric
from slrc.sparsity.constraints import with_option
from slrc.sparsity.patterns import Block
from slrc.sparsity.plans import Plan


class TwoPaths(nn.Module):
    """Two layers alike, of which the second one's result hardly counts."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.loud, self.quiet, self.logits = nn.Linear(16, 16), nn.Linear(16, 16), logits
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.head(self.loud(x) + 0.05 * self.quiet(x))
        return y if self.logits else y.reshape(-1, 5, 1, 1)


Case = tuple[Program, Plan, Menus, list[Inputs]]


@pytest.fixture
def make() -> Callable[[bool], Case]:
    def case(logits: bool = True) -> Case:
        torch.manual_seed(0)
        model = TwoPaths(logits)
        workload = slrc.Workload(model, (torch.randn(1, 12),), calibration=list(torch.randn(256, 12).split(64)))
        program = capture(model.eval(), workload.example_inputs, "net")
        plan = slrc.plan(program, "block:8x1", 0.0)
        patterns = {p: {0.5: 0.5, 0.1: 0.2} for p in (Block(8, 1), Block(4, 1))}
        menus = make_menus([SegmentTimes(c.name, c, 1.0, patterns, 1.0) for c in plan], plan, program)
        return program, plan, menus, calibration_inputs(program, workload, 256, 0)

    return case


def loss_of(program: Program, plan: Plan, menus: Menus, name: str, place: int) -> float:
    constraint = next(c for c in plan if c.name == name)
    option = next(m for m in menus.menus if m.name == name).options[place]
    lost = with_option(constraint, option).lost(program.tensors, [option.keep])[0]
    return float(-np.log(1 - lost) * option.weight)


def test_the_dense_weights_lose_what_was_measured(make: Callable[..., Case]) -> None:
    program, plan, menus, inputs = make()
    found = weighed(menus, weigh_options(program, plan, menus.menus, inputs, Metric.ERROR))
    options = [o for o in found.menus[0].options if o.pattern == Block(8, 1)][1:]
    constraint = next(c for c in plan if c.name == found.menus[0].name)
    (measured,) = layer_errors(
        program, inputs, {constraint.name: [with_option(constraint, o) for o in options]}
    ).values()
    losses = [loss_of(program, plan, found, constraint.name, k) for k in range(1, 1 + len(options))]
    assert losses == pytest.approx(measured, rel=1e-6)
    assert losses == sorted(losses)
    assert [o.ms for o in found.menus[0].options] == [o.ms for o in menus.menus[0].options]
    of_four = [k for k, o in enumerate(found.menus[0].options) if o.pattern == Block(4, 1)]
    assert loss_of(program, plan, found, constraint.name, of_four[3]) < losses[3]  # smaller blocks lose less


@pytest.mark.parametrize("logits", [True, False])
def test_what_hardly_moves_the_outputs_costs_little(make: Callable[..., Case], logits: bool) -> None:
    program, plan, menus, inputs = make(logits)
    by_error, by_divergence = (
        weighed(menus, weigh_options(program, plan, menus.menus, inputs, metric))
        for metric in (Metric.ERROR, Metric.DIVERGENCE)
    )
    names = [menu.name for menu in menus.menus]
    assert names == ["loud", "quiet"]
    loud, quiet = (loss_of(program, plan, by_error, name, 5) for name in names)
    assert loud == pytest.approx(quiet, rel=0.01)
    loud, quiet = (loss_of(program, plan, by_divergence, name, 5) for name in names)
    assert quiet < 0.02 * loud


def test_a_layer_alone_moves_the_outputs_as_if_it_had_been_replaced(make: Callable[..., Case]) -> None:
    program, plan, menus, inputs = make(False)
    constraint = with_option(next(c for c in plan if c.name == "loud"), menus.menus[0].options[5])
    before = {n: t.clone() for n, t in program.tensors.items()}
    moved = output_divergences(program, inputs, {"loud": constraint})["loud"]
    assert 0 < moved < 1
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    whole = constraint.model_copy(update={"keep": constraint.groups})
    assert output_divergences(program, inputs, {"loud": whole})["loud"] == pytest.approx(0, abs=1e-6)


def test_a_map_of_logits_moves_as_logits_do(make: Callable[..., Case]) -> None:
    moved = []
    for is_flat in (True, False):
        program, plan, menus, inputs = make(is_flat)
        constraint = with_option(next(c for c in plan if c.name == "loud"), menus.menus[0].options[5])
        moved.append(output_divergences(program, inputs, {"loud": constraint}, logits=True)["loud"])
        if not is_flat:
            squared = output_divergences(program, inputs, {"loud": constraint})["loud"]
    assert moved[0] == pytest.approx(moved[1], rel=1e-6)
    assert squared != pytest.approx(moved[1], rel=0.1)


@pytest.mark.parametrize(("logits", "of_classes"), [(None, True), (True, True), (False, False)])
def test_two_dimensions_are_classes_unless_the_workload_says_otherwise(logits: bool | None, of_classes: bool) -> None:
    """A shift of all outputs alike is nothing to classes, and something to coordinates."""
    dense, moved = [torch.tensor([[1.0, 2.0], [3.0, 5.0]])], [torch.tensor([[2.0, 3.0], [4.0, 6.0]])]
    assert (divergence(dense, moved, logits) < 1e-12) == of_classes


def test_a_class_that_is_ruled_out_moves_nothing() -> None:
    out = [torch.tensor([[0.5, -torch.inf, 1.0]])]
    assert divergence(out, out, None) == 0
    assert divergence(out, [torch.tensor([[1.0, -torch.inf, 1.0]])], None) > 0


def test_outputs_that_are_not_finite_cannot_weigh_options(make: Callable[..., Case]) -> None:
    program, plan, menus, inputs = make()
    constraint = with_option(next(c for c in plan if c.name == "loud"), menus.menus[0].options[5])
    program.tensors["head.bias"].data[0] = torch.inf
    with pytest.raises(PlanError, match=r"once `loud\.weight` is pruned, are not finite") as error:
        output_divergences(program, inputs, {"loud": constraint})
    assert "budget-metric" in (error.value.hint or "")


def test_of_large_outputs_fewer_batches_are_compared(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, plan, menus, inputs = make()
    constraint = with_option(next(c for c in plan if c.name == "loud"), menus.menus[0].options[5])
    whole = output_divergences(program, inputs, {"loud": constraint})["loud"]
    monkeypatch.setattr(errors, "MOST_OUTPUTS", 64 * 5)
    some = output_divergences(program, inputs, {"loud": constraint})["loud"]
    assert some != whole
    assert some == pytest.approx(whole, rel=0.5)


def test_half_of_a_group_costs_what_it_was_measured_to(make: Callable[..., Case]) -> None:
    program, _, _, inputs = make()
    plan = slrc.plan(program, "channel", 0.5, keep_ends=False)
    assert [c.groups // c.keep for c in plan] == [2] * len(plan.constraints)
    weights, moved = weigh_widths(program, plan, inputs), group_divergences(program, inputs, plan.constraints)
    for c in plan:
        assert weights[c.name] * losses_of_widths(c, program)[c.keep] == pytest.approx(moved[c.name])
        assert moved[c.name] > 0
