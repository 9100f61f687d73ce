"""Channels in a plan's order: the program computes the same, and blocks are consecutive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from random_graphs import EXAMPLES, SEED, GraphModel, Step, graphs
from torch import Tensor, nn

from slrc.errors import PlanError
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.allocation.check_plan import checked_plan
from slrc.passes.analysis.label_indices import label_indices
from slrc.passes.analysis.unit_layout import UnitLayout
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.passes.structure.permute_channels import PermuteChannels, check_orders
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Block, Channel, Unstructured
from slrc.sparsity.plans import Plan
from slrc.verify import compare, outputs_of

TOLERANCE = 1e-9
IMAGE, TOKENS = (6, 5, 5), (5, 6)
Case = tuple[Callable[[Any, Tensor], object], dict[str, Any], tuple[int, ...]]
F = nn.functional


class Shifted(nn.Module):
    """Adds a buffer that no checkpoint holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(1, width, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def layers(**given: nn.Module) -> dict[str, Any]:
    """What every case has besides its own: a first layer and a last one."""
    return {"a": nn.Conv2d(6, 8, 3, padding=1), "o": nn.Conv2d(8, 4, 1), **given}


def tied() -> dict[str, Any]:
    b, c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    c.weight = b.weight
    return layers(b=b, c=c)


CASES: dict[str, tuple[Case, set[str]]] = {
    "chain with a batch norm": (
        (lambda m, x: m.o(torch.relu(m.n(m.a(x)))), layers(n=nn.BatchNorm2d(8)), IMAGE),
        {"a"},
    ),
    "residual stream": (
        (
            lambda m, x: m.o((y := m.a(x)) + m.c(torch.relu(m.b(y)))),
            layers(b=nn.Conv2d(8, 12, 1), c=nn.Conv2d(12, 8, 1)),
            IMAGE,
        ),
        {"a", "b", "c"},
    ),
    "concatenation with itself": (
        (lambda m, x: m.o(torch.cat([y := m.a(x), y.sigmoid()], 1)), layers(o=nn.Conv2d(16, 4, 1)), IMAGE),
        {"a"},
    ),
    "concatenation with another": (
        (
            lambda m, x: m.o(torch.cat([m.b(x), m.a(x)], 1)),
            layers(b=nn.Conv2d(6, 8, 1, padding=0), a=nn.Conv2d(6, 8, 1), o=nn.Conv2d(16, 4, 1)),
            IMAGE,
        ),
        {"a", "b"},
    ),
    "tied weights": ((lambda m, x: m.o(m.c(torch.relu(m.b(m.a(x))))), tied(), IMAGE), {"a", "c"}),
    "module called twice": (
        (lambda m, x: m.o(m.b(torch.relu(m.b(m.a(x))))), layers(b=nn.Conv2d(8, 8, 1)), IMAGE),
        {"a", "b"},
    ),
    "depthwise consumer": (
        (lambda m, x: m.o(m.d(m.a(x))), layers(d=nn.Conv2d(8, 16, 3, groups=8), o=nn.Conv2d(16, 4, 1)), IMAGE),
        {"a"},
    ),
    "grouped consumer": ((lambda m, x: m.o(m.g(m.a(x))), layers(g=nn.Conv2d(8, 8, 3, groups=2)), IMAGE), set()),
    "linear after flatten": ((lambda m, x: m.l(m.a(x).flatten(1)), layers(l=nn.Linear(200, 4)), IMAGE), {"a"}),
    "gate": (
        (
            lambda m, x: m.o((y := m.a(x)) * m.u(F.silu(m.d(y.mean((2, 3), keepdim=True)))).sigmoid()),
            layers(d=nn.Conv2d(8, 4, 1), u=nn.Conv2d(4, 8, 1)),
            IMAGE,
        ),
        {"a", "d", "u"},
    ),
    "group norm": ((lambda m, x: m.o(m.n(m.a(x))), layers(n=nn.GroupNorm(2, 8)), IMAGE), set()),
    "instance norm": ((lambda m, x: m.o(m.n(m.a(x))), layers(n=nn.InstanceNorm2d(8, affine=True)), IMAGE), {"a"}),
    "a buffer of its own": ((lambda m, x: m.o(m.s(m.a(x))), layers(s=Shifted(8)), IMAGE), {"a"}),
    "two halves": (
        (lambda m, x: m.o((y := m.a(x))[:, :8] * y[:, 8:].sigmoid()), layers(a=nn.Conv2d(6, 16, 1)), IMAGE),
        set(),
    ),
    "perceptron on tokens": (
        (lambda m, x: m.o(F.gelu(m.a(x))), layers(a=nn.Linear(6, 16), o=nn.Linear(16, 4)), TOKENS),
        {"a"},
    ),
    "pinned outputs": ((lambda m, x: (m.a(x), m.o(m.a(x))), layers(), IMAGE), set()),
    "padded channels": (
        (lambda m, x: m.o(F.pad(m.a(x), (0, 0, 0, 0, 4, 4))), layers(o=nn.Conv2d(16, 4, 1)), IMAGE),
        set(),
    ),
    "flipped": ((lambda m, x: m.o((y := m.a(x)) + y.flip(1)), layers(), IMAGE), set()),
    "flipped alone": ((lambda m, x: m.o(m.a(x).flip(1)), layers(), IMAGE), set()),
    "running sum": ((lambda m, x: m.o(m.a(x).cumsum(1)), layers(), IMAGE), set()),
    "slice across runs": (
        (lambda m, x: m.o(m.a(x).repeat_interleave(2, 1)[:, 1:9]), layers(), IMAGE),
        set(),
    ),
}


def planned(case: Case, net: Any, randomized: Any) -> tuple[nn.Module, Program, Plan]:
    run, modules, shape = case
    model = randomized(net(run, **modules))
    torch.manual_seed(0)
    program = capture(model, (torch.randn(2, *shape, dtype=torch.float64),))
    return model, program, allocate_sparsity(program, Block(2, 1), 0.5, keep_ends=False)


def with_random_orders(program: Program, plan: Plan, seed: int = 0) -> Plan:
    """Give every group that can be reordered an order at random."""
    generator = torch.Generator().manual_seed(seed)
    permutable = UnitLayout.of_plan(program, plan).permutable
    drawn: dict[int, tuple[int, ...]] = {}

    def order(c: Constraint) -> Constraint:
        number = permutable.get(c.members[0].tensor)
        if number is None:
            return c
        outputs = program.tensors[c.members[0].tensor].shape[0]
        drawn.setdefault(number, tuple(torch.randperm(outputs, generator=generator).tolist()))
        return c.model_copy(update={"order": drawn[number]})

    return plan.model_copy(update={"constraints": tuple(map(order, plan))})


def check(model: nn.Module, program: Program, plan: Plan, masked_outputs: Any) -> Program:
    """Permute, compare with the masked eager model, look at the blocks, permute again."""
    plan.check(program.tensors, {})
    check_orders(program, plan)
    masks = Masks.project(plan, program.tensors)
    masks.check(plan, program.tensors)
    masked = ApplyMasks(masks)(program).program
    result, modified = PermuteChannels(plan, masks)(masked)
    assert modified == any(c.order is not None for c in plan)
    assert not PermuteChannels(plan, masks)(result).modified
    reference = masked_outputs(model, program, masks)
    compare("masked = permuted", reference, outputs_of(result.module(), program.example_inputs), TOLERANCE)
    for c in plan:
        blocks = Block(2, 1).group_view(result.tensors[c.members[0].tensor])[0]
        assert int((blocks != 0).any(dim=1).sum()) <= c.keep
    assert result.num_parameters == program.num_parameters
    assert result.batch_is_dynamic == program.batch_is_dynamic
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_program_computes_the_same_with_consecutive_blocks(
    name: str, net: Any, randomized: Any, masked_outputs: Any
) -> None:
    case, reordered = CASES[name]
    model, program, plan = planned(case, net, randomized)
    plan = with_random_orders(program, plan)
    assert {c.name for c in plan if c.order is not None} == reordered
    check(model, program, plan, masked_outputs)


@pytest.mark.parametrize("seed", range(1, 6))
def test_random_orders(seed: int, net: Any, randomized: Any, masked_outputs: Any) -> None:
    for name in ("residual stream", "module called twice", "depthwise consumer", "gate"):
        model, program, plan = planned(CASES[name][0], net, randomized)
        check(model, program, with_random_orders(program, plan, seed), masked_outputs)


@pytest.mark.fuzz
def test_random_graphs(randomized: Any) -> None:
    """Every group that can be reordered, in graphs of all the operators that have a rule."""
    reordered: set[str] = set()

    @seeded(SEED)
    @settings(
        max_examples=max(8, EXAMPLES // 8),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(graph=graphs(), seed=st.integers(0, 2**16))
    def run(graph: tuple[list[Step], list[tuple[int, ...]]], seed: int) -> None:
        note(f"SLRC_SEED={SEED}\n" + "\n".join(map(str, graph[0])))
        model = randomized(GraphModel(*graph), seed)
        generator = torch.Generator().manual_seed(seed)
        program = capture(model, (torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=generator),))
        layout = UnitLayout.of(program, label_indices(program))
        orders = {
            number: tuple(torch.randperm(group.units, generator=generator).tolist())
            for number, group in enumerate(layout.labels.groups)
            if number not in layout.fixed
        }
        assume(orders)
        tensors = {n: layout.permute(n, t, orders) for n, t in program.tensors.items()}
        outputs = outputs_of(program.with_tensors(tensors).module(), program.example_inputs)
        compare("as it is = permuted", outputs_of(model, program.example_inputs), outputs, TOLERANCE)
        reordered.update(step.op for step in graph[0])

    run()
    assert len(reordered) > 5


def test_without_an_order_nothing_changes(net: Any, randomized: Any) -> None:
    _, program, plan = planned(CASES["residual stream"][0], net, randomized)
    result = PermuteChannels(plan, Masks.project(plan, program.tensors))(program)
    assert result.program is program
    assert not result.modified


def test_weights_that_are_not_masked_are_left_alone(net: Any, randomized: Any) -> None:
    _, program, plan = planned(CASES["residual stream"][0], net, randomized)
    plan = with_random_orders(program, plan)
    assert not PermuteChannels(plan, Masks.project(plan, program.tensors))(program).modified


def ordered(plan: Plan, orders: dict[str, tuple[int, ...]]) -> Plan:
    changed = (c.model_copy(update={"order": orders[c.name]}) if c.name in orders else c for c in plan)
    return plan.model_copy(update={"constraints": tuple(changed)})


BACKWARDS = tuple(range(8))[::-1]


@pytest.mark.parametrize(
    ("name", "orders", "message"),
    [
        ("pinned outputs", {"a": BACKWARDS}, "constraint `a`: its outputs cannot be reordered in model"),
        ("flipped", {"a": BACKWARDS}, "constraint `a`: its outputs cannot be reordered in model"),
        ("grouped consumer", {"g": BACKWARDS}, "constraint `g`: its outputs cannot be reordered in model"),
        ("residual stream", {"a": BACKWARDS}, "`a` and `c` share their outputs, but not the `order`"),
        ("residual stream", {"a": BACKWARDS, "c": tuple(range(8))}, "`a` and `c` share their outputs"),
    ],
)
def test_an_order_that_cannot_be_applied_is_refused(
    name: str, orders: dict[str, tuple[int, ...]], message: str, net: Any, randomized: Any
) -> None:
    _, program, plan = planned(CASES[name][0], net, randomized)
    plan = ordered(plan, orders)
    masks = Masks.project(plan, program.tensors)
    for refuse in (lambda: PermuteChannels(plan, masks)(program), lambda: checked_plan(program, plan)):
        with pytest.raises(PlanError, match=message) as caught:
            refuse()
        assert "`order`" in str(caught.value.hint)


def test_other_constraints_have_no_say(net: Any, randomized: Any) -> None:
    _, program, _ = planned(CASES["residual stream"][0], net, randomized)
    for pattern in (Channel(), Unstructured()):
        plan = allocate_sparsity(program, pattern, 0.5, keep_ends=False)
        assert not PermuteChannels(plan, Masks.project(plan, program.tensors))(program).modified
