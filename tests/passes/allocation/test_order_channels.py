"""Orders that put rows with alike columns into one block."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.allocation.order_channels import RowEnergies, form_blocks, kept_share, takes_order
from slrc.sparsity.choices import Allocation
from slrc.sparsity.patterns import AnyPattern, Block, parse_pattern
from slrc.sparsity.plans import Plan


def shuffled_kinds(kinds: int, size: int, columns: int) -> Tensor:
    """Return rows of some kinds in a random order; rows of a kind have the same large columns."""
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(kinds, columns, generator=generator) < 0.25
    rows = torch.where(large.repeat(size, 1), 1.0, 0.01) * (
        0.5 + torch.rand(kinds * size, columns, generator=generator)
    )
    return rows[torch.randperm(kinds * size, generator=generator)]


def chain(*widths: int) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths)))
    return capture(model, (torch.randn(2, widths[0]),), "chain")


def orders(plan: Plan) -> dict[str, tuple[int, ...] | None]:
    return {c.name: c.order for c in plan}


def kept(program: Program, plan: Plan) -> dict[str, float]:
    return {c.name: kept_share(c, program.tensors) for c in plan}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rows_of_a_kind_end_up_in_one_block(size: int) -> None:
    energy = shuffled_kinds(6, size, 64)
    order = form_blocks(RowEnergies(energy, torch.full((64,), 0.5 * size)), size)
    assert sorted(order.tolist()) == list(range(6 * size))
    large = (energy > 0.1)[order].reshape(6, size, 64)
    assert bool((large == large[:, :1]).all())


def test_orders_are_written_in_one_way() -> None:
    """Rows rise within a block, and blocks by their first row: what does not matter is not drawn."""
    order = form_blocks(RowEnergies(torch.rand(12, 9), torch.full((9,), 1.0)), 4).reshape(3, 4)
    assert bool((order.sort(dim=1).values == order).all())
    assert order[:, 0].tolist() == sorted(order[:, 0].tolist())


@pytest.mark.parametrize("energy", [torch.zeros(8, 5), torch.full((8, 5), 1e-30), torch.eye(8)])
def test_degenerate_weights(energy: Tensor) -> None:
    order = form_blocks(RowEnergies(energy, torch.zeros(energy.shape[1])), 4)
    assert sorted(order.tolist()) == list(range(8))


@pytest.mark.parametrize("pattern", ["block:4x1", "block:2x1"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("allocation", [Allocation.UNIFORM, Allocation.GLOBAL])
def test_more_energy_survives_at_the_same_sparsity(pattern: str, sparsity: float, allocation: Allocation) -> None:
    program = chain(16, 32, 24, 4)
    program = program.with_tensors({"0.weight": shuffled_kinds(8, 4, 16)})
    plain, permuted = (
        allocate_sparsity(
            program, parse_pattern(pattern), sparsity, allocation=allocation, keep_ends=False, permute=permute
        )
        for permute in (False, True)
    )
    assert [c.keep for c in plain] == [c.keep for c in permuted]
    before, after = kept(program, plain), kept(program, permuted)
    assert after["0"] > before["0"]
    assert after["1"] > before["1"]
    assert orders(permuted)["2"] is None  # an output of the model
    assert orders(plain) == dict.fromkeys("012")


def test_layers_of_a_residual_stream_share_one_order(net: Any) -> None:
    torch.manual_seed(0)
    model = net(
        lambda m, x: m.o((y := m.a(x)) + m.c(torch.relu(m.b(y)))),
        a=nn.Linear(6, 16),
        b=nn.Linear(16, 12),
        c=nn.Linear(12, 16),
        o=nn.Linear(16, 4),
    )
    program = capture(model, (torch.randn(2, 6),))
    plain, permuted = (
        allocate_sparsity(program, Block(4, 1), 0.5, keep_ends=False, permute=permute) for permute in (False, True)
    )
    found = orders(permuted)
    assert found["a"] == found["c"] is not None
    assert found["b"] is not None
    before, after = kept(program, plain), kept(program, permuted)
    assert after["a"] + after["c"] > before["a"] + before["c"]
    assert after["b"] > before["b"]
    alone = allocate_sparsity(program, Block(4, 1), 0.5, keep_ends=False, permute=True, skip=["c"])
    assert orders(alone)["a"] not in (None, found["a"])


def test_an_order_that_gains_nothing_is_left_out() -> None:
    program = chain(6, 8, 4)
    uniform = program.with_tensors({"0.weight": torch.ones(8, 6)})
    assert orders(allocate_sparsity(uniform, Block(4, 1), 0.5, keep_ends=False, permute=True))["0"] is None
    whole = allocate_sparsity(program, Block(4, 1), 0.0, keep_ends=False, permute=True)
    assert orders(whole) == {"0": None, "1": None}


@pytest.mark.parametrize("pattern", ["block:1x2", "block:4x2", "columns:2", "unstructured", "2:4", "channel"])
def test_other_patterns_keep_the_order(pattern: str) -> None:
    parsed: AnyPattern = parse_pattern(pattern)
    assert not takes_order(parsed)
    plan = allocate_sparsity(chain(8, 8, 4), parsed, keep_ends=False, permute=True)
    assert set(orders(plan).values()) == {None}


def test_the_same_plan_every_time() -> None:
    program = chain(16, 32, 24, 4)
    first, second = (allocate_sparsity(program, Block(4, 1), 0.75, permute=True) for _ in range(2))
    assert first == second
