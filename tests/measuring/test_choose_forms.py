"""Choosing forms: what is timed, what is taken, and what is said where nothing can be timed."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.backends import Target, parse_target
from slrc.errors import CaptureError
from slrc.forms.form import DENSE, DEPTHWISE, DEPTHWISE_INT8, FLOAT32, Form, FormChoice, FormKind
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.kernels import build as kernels
from slrc.measuring import choose_forms as form_choice
from slrc.measuring import clock as clocks
from slrc.measuring import jobs as what_is_timed
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.jobs import Job
from slrc.measuring.timing import WHOLE_RACE, Budget
from slrc.pipeline import apply_forms, structure
from slrc.sparsity.masks import Masks
from slrc.verify import compare, outputs_of

ORT, INT8 = parse_target("ort"), parse_target("ort+int8")


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

    def times(self, jobs: Sequence[Job], budget: Budget) -> tuple[clocks.Timing, ...]:
        """One number for each job, by the operators of its program."""
        found = []
        for job in jobs:
            nodes = list(job.program(self.target).nodes)
            ops = [op_name(n) for n in nodes]
            kind = "packed" if any(o.startswith("block_sparse") for o in ops) else "dense"
            kind = "split" if "index_select" in ops else kind
            if self.target.is_integer and kind == "dense":
                weights = [n for n in nodes if op_name(n) == "fake_quantize" and n.args[5] == 127]
                kind = "packed-int8" if any(len(n.args) > 6 for n in weights) else "dense" if weights else "float32"
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
def test_layers_that_lost_blocks_for_nothing_are_named(clock: type[FakeClock]) -> None:
    """Not the first one, which could be packed but has no zeros."""
    clock.says = {"dense": 1.0, "packed": 2.0, "split": 3.0}
    program = pruned("block:8x1")
    names = {weight: layer.name for weight, layer in program.layers.items()}
    choice = choose_forms(program, ORT, threads=1)
    assert choice.notes(names) == ("on ort `2` and 1 more lost blocks and run dense: that is faster there",)
    assert choice.dropped == ()
    clock.says = {"dense": 2.0, "packed": 1.0, "split": 3.0}
    assert choose_forms(program, ORT, threads=1).notes(names) == ()


@needs_compiler
def test_compiling_the_kernels_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, said, built = slrc.backends.get_backend(ORT), list[str](), list[str]()
    module = sys.modules[type(backend).__module__]
    monkeypatch.setattr(module, "is_built", lambda *_, **__: bool(built))
    monkeypatch.setattr(module, "build", lambda family, **_: built.append(family))
    for _ in range(2):
        backend.make_ready(ORT, said.append)
    assert len(built) == len(said) == 1
    assert "compiling the kernels for" in said[0]
    backend.make_ready(parse_target("ort:stock"), said.append)
    assert len(said) == 1


@needs_compiler
@pytest.mark.parametrize("taken", ["packed-int8", "packed", "float32", "dense"])
def test_an_int8_target_takes_the_fastest_form_in_either_type(clock: type[FakeClock], taken: str) -> None:
    clock.says = {**dict.fromkeys(("dense", "packed", "packed-int8", "float32", "split"), 2.0), taken: 1.0}
    choice = choose_forms(pruned("block:8x4"), INT8, threads=1)
    found = kinds(choice)
    assert found["2.weight"] == taken
    assert found["0.weight"] == taken  # of few channels: it needs no zeros
    assert set(choice.layers[1].ms) == {"dense", "packed:4", "packed:8", "packed-int8:4", "packed-int8:8", "float32"}


@needs_compiler
def test_layers_that_are_to_stay_in_float32_have_no_other_form(clock: type[FakeClock]) -> None:
    clock.says = {"dense": 1.0, "packed": 3.0, "packed-int8": 1.0, "float32": 2.0, "split": 1.0}
    choice = choose_forms(pruned("block:8x4"), INT8, threads=1, in_float=["2.weight"])
    layer = next(x for x in choice.layers if x.weight == "2.weight")
    assert set(layer.ms) == {"packed:4", "packed:8", "float32"}
    assert layer.form == FLOAT32


@needs_compiler
def test_a_network_that_is_slower_with_its_fastest_layers_stays_dense(
    clock: type[FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = pruned("block:8x1")
    clock.says = {"dense": 2.0, "packed": 1.0, "split": 2.0}
    times = clock.times

    def whole_is_slow(self: FakeClock, jobs: Sequence[Job], budget: Budget) -> tuple[clocks.Timing, ...]:
        if budget == WHOLE_RACE:
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
@pytest.mark.parametrize(("target", "packed"), [(ORT, DEPTHWISE), (INT8, DEPTHWISE_INT8)])
def test_depthwise_layers_are_packed_beside_packed_layers_alone(
    clock: type[FakeClock], pruned_outputs: int, target: Target, packed: Form
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1))
    with torch.no_grad():
        model[0].weight[:pruned_outputs, 1:] = 0
    program = capture(model, (torch.randn(1, 8, 8, 8),))
    clock.says = {"dense": 2.0, "split": 2.0, "float32": 3.0, "packed": 3.0} | {str(packed.kind): 1.0}
    forms = choose_forms(program, target, threads=1).forms
    assert forms.get("1.weight") == (packed if pruned_outputs else None)


@needs_compiler
def test_it_is_timed_for_real_and_remembered(tmp_path: Path, quick_timing: None) -> None:
    program = pruned("block:8x1")
    first = choose_forms(program, ORT, threads=1, cache=tmp_path)
    assert {"dense", "packed:4", "packed:8"} <= {f for x in first.layers for f in x.ms}
    assert all(ms > 0 for x in first.layers for ms in x.ms.values())
    assert choose_forms(program, ORT, threads=1, cache=tmp_path) == first


@needs_compiler
@pytest.mark.usefixtures("quick_timing")
def test_a_form_that_fails_is_dropped_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def applied(program: Program, forms: Any) -> Program:
        if any(f.kind is FormKind.SPLIT for f in forms.values()):
            raise CaptureError("no such layer\nand more")
        return apply_forms(program, forms)

    monkeypatch.setattr(what_is_timed, "apply_forms", applied)
    choice = choose_forms(pruned("columns:2"), ORT, threads=1, cache=tmp_path)
    assert choice.dropped == ("on ort 2.weight and 1 more are not split:2: no such layer",)
    assert {"dense", "grouped:2"} <= set(choice.layers[1].ms)
    assert "split:2" not in choice.layers[1].ms
    assert FormChoice.model_validate_json(choice.model_dump_json()) == choice


@needs_compiler
@pytest.mark.usefixtures("quick_timing")
def test_networks_that_fail_are_dropped_and_dense_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pruned("block:8x1")

    def applied(given: Program, forms: Any) -> Program:
        if given is program and forms:
            raise CaptureError("too much at once")
        return apply_forms(given, forms)

    monkeypatch.setattr(what_is_timed, "apply_forms", applied)
    choice = choose_forms(program, ORT, threads=1, cache=tmp_path)
    assert choice.taken in ("all dense", "each its fastest")
    assert choice.forms == {}
    assert all("too much at once" in note for note in choice.dropped)
    assert choice.dropped


@needs_compiler
@pytest.mark.usefixtures("quick_timing")
def test_a_runtime_that_fails_with_every_form_leaves_layers_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slrc.backends.ort.OnnxRuntime, "load", lambda *_, **__: 1 / 0)
    choice = choose_forms(pruned("block:8x1"), ORT, threads=1, cache=tmp_path)
    assert (choice.taken, choice.forms, choice.whole_ms) == ("all dense", {}, {})
    assert any("division by zero" in note for note in choice.dropped)


@needs_compiler
def test_what_the_kernels_do_not_take_stays_dense_with_a_note(clock: type[FakeClock]) -> None:
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Conv2d(8, 16, 3, stride=80), nn.Conv2d(16, 16, 1)), (torch.randn(1, 8, 99, 99),))
    plan = slrc.plan(program, "block:8x1", 0.75, keep_ends=False)
    program = structure(program, plan, Masks.project(plan, program.tensors))
    clock.says = {"dense": 2.0, "packed": 1.0, "split": 2.0}
    choice = choose_forms(program, ORT, threads=1)
    assert list(choice.forms) == ["1.weight"]
    assert choice.dropped == ("on ort 0.weight is not packed:4 or packed:8: stride 80 (the kernels take up to 64)",)
    forced = apply_forms(program, {"0.weight": Form(FormKind.PACKED, 8)})
    assert "block_sparse_conv" not in {op_name(n) for n in forced.nodes}


MAPS = """
import sys
from pathlib import Path
import torch
from torch import nn
import slrc
from slrc.backends import parse_target
from slrc.ir.program import capture
from slrc.measuring import devices, timing
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.jobs import Job
from slrc.pipeline import structure

loaded = set()
timing.PATIENCE = 0.0


def looked_at(*arguments):
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded.update(line.split()[4] for line in maps if "libslrc_kernels" in line)
    return timing.time_in_turns(*arguments)


devices.time_in_turns = looked_at
program = capture(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1)), (torch.randn(1, 8, 9, 9),))
plan = slrc.plan(program, "block:8x1", 0.75, keep_ends=False)
program = structure(program, plan, slrc.Masks.project(plan, program.tensors))
choice = choose_forms(program, parse_target("ort"), threads=1, cache=Path(sys.argv[1]))
assert sum(len(x.ms) for x in choice.layers) >= 6, choice
print(loaded)  # by their number on the disk
"""


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_one_library_of_kernels_is_loaded_however_many_forms_are_timed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MAPS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(ast.literal_eval(done.stdout)) == 1


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
