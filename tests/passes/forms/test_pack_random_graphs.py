"""Packed equals masked on random graphs; a failure names its seed, for `SLRC_SEED`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from random_graphs import EXAMPLES, SEED, GraphModel, Shape, Step, graphs

from slrc.forms.form import Form, FormKind
from slrc.ir.program import capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.pipeline import apply_forms, structure
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Block
from slrc.verify import compare, outputs_of

ROWS = 4


@pytest.mark.fuzz
def test_packed_equals_masked(randomized: Any, masked_outputs: Any) -> None:
    """Every graph has a transposed convolution that takes blocks, and half of their orders are changed."""
    seen: set[str] = set()

    @seeded(SEED)
    @settings(
        max_examples=EXAMPLES // 4,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(graph=graphs(), seed=st.integers(0, 2**16), permute=st.booleans())
    def check(graph: tuple[list[Step], list[Shape]], seed: int, permute: bool) -> None:
        steps, shapes = graph
        assume(any(step.op == "transposed" and step.options[0] % ROWS == 0 == step.options[1] - 1 for step in steps))
        note(f"SLRC_SEED={SEED}\n" + "\n".join(map(str, steps)))
        model = randomized(GraphModel(steps, shapes), seed)
        generator = torch.Generator().manual_seed(seed)
        program = capture(model, (torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=generator),))
        plan = allocate_sparsity(program, Block(ROWS, 1), 0.5, keep_ends=False, permute=permute)
        masks = Masks.project(plan, program.tensors)
        slim = structure(program, plan, masks)
        forms = {c.members[0].tensor: Form(FormKind.PACKED, ROWS) for c in plan}
        packed = apply_forms(slim, forms)
        reference = masked_outputs(model, program, masks)
        compare("masked = packed", reference, outputs_of(packed.module(), program.example_inputs), 1e-9)
        seen.add(repr(steps))

    check()
    assert len(seen) >= EXAMPLES // 8
