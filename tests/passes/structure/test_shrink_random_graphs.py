"""Slim equals masked on random graphs; a failure names its seed, for `SLRC_SEED`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from random_graphs import EXAMPLES, SEED, GraphModel, Shape, Step, graphs

from slrc.ir.program import capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.analysis.label_indices import label_indices
from slrc.sparsity.choices import Allocation, LayerNorm
from slrc.sparsity.patterns import Channel
from slrc.sparsity.plans import Plan

SHARDS = 8
"""Parts of the test, each with graphs of its own, that workers share."""


@pytest.mark.fuzz
@pytest.mark.parametrize("shard", range(SHARDS))
def test_slim_equals_masked(randomized: Any, slim_equals_masked: Any, shard: int) -> None:
    """`sparsity` is shared out by `allocate_sparsity`; with `None` every group keeps a random number."""
    seen: set[str] = set()

    @seeded(SEED * SHARDS + shard)
    @settings(
        max_examples=-(-EXAMPLES // SHARDS),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(
        graph=graphs(),
        seed=st.integers(0, 2**16),
        sparsity=st.sampled_from([None, 0.3, 0.5, 0.8]),
        layer_norm=st.sampled_from(LayerNorm),
    )
    def check(graph: tuple[list[Step], list[Shape]], seed: int, sparsity: float | None, layer_norm: LayerNorm) -> None:
        steps, shapes = graph
        assume(repr(steps) not in seen)
        note(f"SLRC_SEED={SEED}, shard {shard}\n" + "\n".join(map(str, steps)))
        model = randomized(GraphModel(steps, shapes), seed)
        generator = torch.Generator().manual_seed(seed)
        program = capture(model, (torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=generator),))
        assume(any(group.units > 1 for group in label_indices(program, layer_norm=layer_norm).groups))
        plan = allocate_sparsity(
            program, Channel(), sparsity, allocation=Allocation.GLOBAL, keep_ends=False, layer_norm=layer_norm
        )
        if sparsity is None:
            plan = _random_keeps(plan, seed)
        slim_equals_masked(model, program, plan)
        seen.add(repr(steps))

    check()
    assert len(seen) >= EXAMPLES // SHARDS


def _random_keeps(plan: Plan, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    changed = tuple(c.model_copy(update={"keep": int(rng.integers(1, c.groups + 1))}) for c in plan)
    return plan.model_copy(update={"constraints": changed})
