"""Choosing forms: what is timed, what is taken, and what is said where nothing can be timed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.backends import parse_target
from slrc.forms.form import DENSE, DEPTHWISE, FormKind
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.kernels import build as kernels
from slrc.measuring import choose_forms as form_choice
from slrc.measuring import clock as clocks
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.timing import WHOLE, Budget
from slrc.pipeline import apply_forms, structure
from slrc.sparsity.masks import Masks
from slrc.verify import compare, outputs_of

ORT = parse_target("ort")


def pruned(pattern: str, sparsity: float = 0.75) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    program = capture(model, (torch.randn(1, 3, 8, 8),))
    plan = slrc.plan(program, pattern, sparsity)
    return structure(program, plan, Masks.project(plan, program.tensors))


class FakeClock(clocks.Clock):
    """Says what each form takes without running it."""

    says: dict[str, float]

    def times(self, jobs: Sequence[clocks.Job], budget: Budget) -> tuple[clocks.Timing, ...]:
        """One number for each job, by the operators of its program."""
        found = []
        for job in jobs:
            ops = [op_name(n) for n in job.make().nodes]
            kind = "packed" if any(o.startswith("block_sparse") for o in ops) else "dense"
            kind = "split" if "index_select" in ops else kind
            found.append(clocks.Timing(self.says[kind]))
        return tuple(found)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[FakeClock]:
    monkeypatch.setattr(form_choice, "Clock", FakeClock)
    return FakeClock


def kinds(choice: Any) -> dict[str, str]:
    return {x.weight: str(x.form.kind) for x in choice.layers}


needs_compiler = pytest.mark.skipif(
    bool(slrc.backends.get_backend(ORT).why_not_packed(ORT)), reason="needs a C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize(
    ("says", "taken"),
    [
        ({"dense": 3.0, "packed": 1.0, "split": 2.0}, "packed"),
        ({"dense": 1.0, "packed": 2.0, "split": 3.0}, "dense"),
        ({"dense": 2.0, "packed": 3.0, "split": 1.0}, "split"),
    ],
)
def test_the_fastest_form_is_taken(clock: type[FakeClock], says: dict[str, float], taken: str) -> None:
    clock.says = says
    program = pruned("columns:2")
    choice = choose_forms(program, ORT, threads=1)
    first = "packed" if taken == "packed" else "dense"  # it has no zeros, but few columns
    assert kinds(choice) == {"0.weight": first, "2.weight": taken, "5.weight": taken}
    assert min(choice.whole_ms, key=lambda name: choice.whole_ms[name]) == choice.taken
    formed = apply_forms(program, choice.forms)
    reference, outputs = (outputs_of(p.module(), p.example_inputs) for p in (program, formed))
    compare("slim = formed", reference, outputs, 1e-5)


@needs_compiler
def test_a_network_that_is_slower_with_its_fastest_layers_stays_dense(
    clock: type[FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = pruned("block:8x1")
    clock.says = {"dense": 2.0, "packed": 1.0, "split": 2.0}
    times = clock.times

    def whole_is_slow(self: FakeClock, jobs: Sequence[clocks.Job], budget: Budget) -> tuple[clocks.Timing, ...]:
        if budget == WHOLE:
            self.says = {"dense": 1.0, "packed": 2.0, "split": 2.0}
        return times(self, jobs, budget)

    monkeypatch.setattr(clock, "times", whole_is_slow)
    choice = choose_forms(program, ORT, threads=1)
    assert choice.taken == "all dense"
    assert choice.forms == {}
    assert all(x.form == DENSE and x.density == 1.0 for x in choice.layers)
    assert all(x.ms["packed:4"] == 1.0 for x in choice.layers)


@needs_compiler
@pytest.mark.parametrize("pruned_outputs", [8, 0])
def test_depthwise_layers_are_packed_beside_packed_layers_alone(clock: type[FakeClock], pruned_outputs: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1))
    with torch.no_grad():
        model[0].weight[:pruned_outputs, 1:] = 0
    program = capture(model, (torch.randn(1, 8, 8, 8),))
    clock.says = {"dense": 2.0, "packed": 1.0, "split": 2.0}
    forms = choose_forms(program, ORT, threads=1).forms
    assert forms.get("1.weight") == (DEPTHWISE if pruned_outputs else None)


@needs_compiler
def test_it_is_timed_for_real_and_remembered(tmp_path: Path, quick_timing: None) -> None:
    program = pruned("block:8x1")
    first = choose_forms(program, ORT, threads=1, cache=tmp_path)
    assert {"dense", "packed:4", "packed:8"} <= {f for x in first.layers for f in x.ms}
    assert all(ms > 0 for x in first.layers for ms in x.ms.values())
    assert choose_forms(program, ORT, threads=1, cache=tmp_path) == first


def test_without_a_compiler_layers_are_not_packed(clock: type[FakeClock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_candidates", lambda family: iter([("no-such-compiler",)]))
    clock.says = {"dense": 2.0, "split": 1.0}
    blocks = choose_forms(pruned("block:8x1"), ORT, threads=1)
    assert [note for note in blocks.dropped if "no C++ compiler" in note] == list(blocks.dropped) != []
    assert "packed" not in kinds(blocks).values()
    columns = choose_forms(pruned("columns:2"), ORT, threads=1)
    assert set(kinds(columns).values()) == {"split"}


def test_a_target_that_cannot_run_here_goes_by_the_cost_model() -> None:
    other = next(f for f in kernels.TILE_SETS if f != kernels.family_of(platform.machine()))
    target = parse_target(f"ort:{other}")
    choice = choose_forms(pruned("columns:2", 0.5), target)
    assert choice.taken == "cost model"
    assert all(x.ms == {} for x in choice.layers)
    assert {x.weight for x in choice.layers if x.form != DENSE} == {"2.weight", "5.weight"}
    rtx = choose_forms(pruned("columns:2", 0.5), parse_target("tensorrt-rtx"))
    assert {x.form.kind for x in rtx.layers} <= {FormKind.SPLIT, FormKind.GROUPED}


def test_a_dense_model_has_nothing_to_choose(clock: type[FakeClock]) -> None:
    choice = choose_forms(pruned("channel", 0.5), ORT, threads=1)
    assert choice.layers == ()
    assert choice.forms == {}
