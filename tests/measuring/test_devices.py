"""Whatever is chosen by time asks a device, whichever machine that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import slrc
from slrc.backends import LoweredProgram, Target, parse_target
from slrc.errors import BackendError
from slrc.forms.form import FormKind
from slrc.ir.program import Program, capture
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.clock import Clock
from slrc.measuring.devices import Candidate, Device, LocalDevice, Measured, Timing, local_device
from slrc.measuring.jobs import Job
from slrc.measuring.latency_meter import LatencyMeter
from slrc.measuring.timing import PART, Budget
from slrc.pipeline import structure
from slrc.progress import Reporter
from slrc.sparsity.masks import Masks

ORT = parse_target("ort:stock")


class Board(Device):
    """Says that a model takes as many milliseconds as its file has nodes of an operator."""

    name = "board"
    cores = 3

    def __init__(self, operator: str, why_not: str = "", cpu: str = "A53") -> None:
        self.operator, self.why_not, self.cpu = operator, why_not, cpu
        self.asked: list[int] = []

    def conditions(self) -> Mapping[str, Any]:
        return {"cpu": self.cpu}

    def why_not_run(self, target: Target) -> str:
        return self.why_not

    def times(self, target: Target, candidates: Sequence[Candidate], threads: int, budget: Budget) -> Sequence[Timing]:
        self.asked.append(threads)
        models = [onnx.load(candidate.folder / "model.onnx") for candidate in candidates]
        return [Timing(1.0 + sum(n.op_type == self.operator for n in model.graph.node)) for model in models]

    def latency(
        self,
        dense: LoweredProgram,
        compiled: LoweredProgram,
        inputs: Sequence[torch.Tensor],
        threads: int | None,
        forms: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
        others: Mapping[str, LoweredProgram] | None = None,
    ) -> Measured:
        raise NotImplementedError


def pruned() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    program = capture(model, (torch.randn(1, 8, 9, 9),))
    plan = slrc.plan(program, "columns:2", 0.5)
    return structure(program, plan, Masks.project(plan, program.tensors))


@pytest.mark.parametrize(
    ("operator", "kinds"), [("Conv", {FormKind.DENSE, FormKind.GROUPED}), ("Gather", {FormKind.DENSE})]
)
def test_forms_are_those_that_are_fastest_on_the_device(operator: str, kinds: set[FormKind], tmp_path: Path) -> None:
    """Where a convolution is what costs, none is split in two; where a gather is, nothing is gathered."""
    board = Board(operator)
    choice = choose_forms(pruned(), ORT, cache=tmp_path, device=board)
    assert {layer.form.kind for layer in choice.layers} <= kinds
    assert choice.threads == 3
    assert set(board.asked) == {3}


def test_a_device_that_cannot_run_the_target_leaves_it_to_the_cost_model(tmp_path: Path) -> None:
    board = Board("Conv", why_not="it has no runtime")
    assert choose_forms(pruned(), ORT, cache=tmp_path, device=board).taken == "cost model"
    assert not board.asked
    with pytest.raises(BackendError, match="cannot be timed on `board`: it has no runtime"):
        LatencyMeter(pruned(), ORT, device=board)


def test_what_was_timed_on_one_device_is_not_taken_for_another(tmp_path: Path) -> None:
    job = Job.of_whole(pruned())
    boards = [Board("Conv"), Board("Conv"), Board("Conv", cpu="A72")]
    for board in boards:
        Clock(ORT, 1, tmp_path, board).times([job], PART)
    assert [len(board.asked) for board in boards] == [1, 0, 1]


def test_a_budget_is_met_by_the_devices_times(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), (torch.randn(1, 8, 9, 9),))
    board = Board("Conv")
    table = LatencyMeter(program, ORT, cache=tmp_path, device=board).table()
    assert table.machine == "A53"
    assert table.threads == 3
    assert [s.ms for s in table.segments] == [(2.0,), (2.0,)]
    assert [w.ms for w in table.whole] == [3.0]


def test_this_machine_is_the_device_by_default() -> None:
    assert isinstance(local_device(), LocalDevice)
    assert local_device().name == ""
    assert not local_device().why_not_run(ORT)
    assert local_device().resolve(ORT) == ORT
