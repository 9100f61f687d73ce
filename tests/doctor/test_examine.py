"""The examination: each check fails on its own, says where, and stops in time; nothing here depends on real times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc.backends import parse_target
from slrc.config import make_config
from slrc.doctor import examine as examination
from slrc.doctor import times
from slrc.doctor.deadline import Deadline, Overtime
from slrc.doctor.diagnosis import Diagnosis, Finding, Status, Training
from slrc.doctor.examine import examine
from slrc.doctor.practice import STEPS, estimate_hours, practise_evaluation, practise_training
from slrc.doctor.reach import reach_of
from slrc.doctor.times import NO_TIME, patterns_for, time_parts, time_speedups
from slrc.errors import WorkloadError
from slrc.forms.form import Form, FormKind
from slrc.ir.program import Program, capture
from slrc.measuring.clock import Clock
from slrc.measuring.timing import BLOCKS, Budget
from slrc.pipeline import baseline, structure
from slrc.progress import Quiet
from slrc.reporting.doctor_tables import doctor_tables
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import NM, Channel, Columns

pytestmark = pytest.mark.usefixtures("quick_timing")
MakeWorkload = Callable[..., slrc.Workload]
ORT = parse_target("ort")


@pytest.fixture
def one_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pruned network is exported: one for each pattern will do."""
    monkeypatch.setattr(times, "SPARSITIES", (0.5,))


def look(model: str | slrc.Workload, cache: Path, seconds: float = 1000, **options: Any) -> Diagnosis:
    return examine(model, make_config({"threads": 1, **options}), seconds=seconds, cache=cache)


def dense(workload: slrc.Workload) -> Program:
    return baseline(slrc.capture(workload))


def finding(found: Diagnosis, check: str) -> Finding:
    return next(f for f in found.findings if f.check == check)


def failed(found: Diagnosis) -> list[str]:
    return [f.check for f in found.findings if f.status is Status.FAILS]


def test_a_transposed_convolution_is_timed_in_the_blocks_that_it_was_pruned_in() -> None:
    layers = nn.Conv2d(3, 12, 3), nn.ConvTranspose2d(12, 16, 2, 2), nn.Conv2d(16, 3, 1)
    program = baseline(capture(nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),), "net"))
    plan = slrc.plan(program, "block:8x1", 0.75)
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    assert times._forms(slim, ORT)["1.weight"] == Form(FormKind.PACKED, 8)


@pytest.mark.usefixtures("one_sparsity")
def test_a_workload_that_works(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    workload = tiny_workload()
    before = {n: t.clone() for n, t in workload.model.state_dict().items()}
    found = look(workload, tmp_path)
    assert found.is_healthy, found.findings
    assert all(torch.equal(t, before[n]) for n, t in workload.model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in workload.model.modules())
    patterns = [str(p) for p in patterns_for(ORT)]
    assert [x.pattern for x in found.reach] == patterns
    assert all(0 < x.params <= 1 and 0 < x.macs <= 1 for x in found.reach)
    assert [p.name for p in found.parts] == ["conv1", "conv2", "conv3", "head"]
    assert all(p.ms and p.ms > 0 for p in found.parts)
    assert [(p.pattern, p.sparsity) for p in found.speedups] == [(p, 0.5) for p in patterns]
    assert all(p.speedup and p.spread and p.spread[0] <= p.spread[1] for p in found.speedups)
    assert found.training is not None
    assert (found.training.samples, found.training.steps, found.training.evaluation_is_whole) == (8, 6, True)
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found
    titles = [str(table.title) for table in doctor_tables(found)]
    assert [title.split()[0] for title in titles[1:]] == ["what", "where", "how", "what"]


def test_what_was_timed_before_is_not_timed_again(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, clock = dense(tiny_workload()), Clock(ORT, 1, tmp_path)
    first = time_parts(program, clock, Deadline(1000), Quiet())
    monkeypatch.setattr(Clock, "_emit", None)
    assert time_parts(program, clock, Deadline(1000), Quiet()) == first


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            x = x + 1
        return self.conv(x).mean(dim=(2, 3))


def test_a_model_that_cannot_be_captured_still_shows_whether_it_trains(
    tiny_workload: MakeWorkload, tmp_path: Path
) -> None:
    found = look(tiny_workload(model=Branching()), tmp_path)
    assert failed(found) == ["capture"]
    said = finding(found, "capture")
    assert "if x.sum() > 0:" in said.said
    assert said.hint
    assert found.training is not None
    assert not found.reach
    assert not found.speedups


def test_inputs_that_the_model_does_not_take(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    found = look(tiny_workload(example_inputs=(torch.zeros(1, 7, 6, 6),)), tmp_path)
    assert failed(found) == ["capture"]
    said = finding(found, "capture")
    assert "the model fails on its example inputs" in said.said
    assert "\n" not in said.said
    assert "(1, 7, 6, 6)" in str(said.hint)


@pytest.mark.usefixtures("one_sparsity")
def test_no_evaluation_is_a_note(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    found = look(tiny_workload(evaluate=None), tmp_path)
    assert found.is_healthy
    said = finding(found, "evaluation")
    assert (said.status, "no accuracy will be measured" in said.said) == (Status.NOTE, True)
    assert found.training is not None
    assert found.training.evaluation_seconds is None


@pytest.mark.usefixtures("one_sparsity")
def test_each_function_of_the_user_fails_on_its_own(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("no such label")

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float("nan")}

    found = look(tiny_workload(loss=loss, evaluate=evaluate), tmp_path)
    assert failed(found) == ["training data, loss and optimiser", "evaluation"]
    assert "no such label" in finding(found, "training data, loss and optimiser").said
    assert "nan" in finding(found, "evaluation").said
    assert found.training is None
    assert all(p.speedup for p in found.speedups)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    found = look("missing.py", tmp_path)
    assert failed(found) == ["workload"]
    assert "`missing.py` does not exist" in finding(found, "workload").said
    assert finding(found, "target ort").status is not Status.FAILS


def test_a_target_that_is_not_known(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    found = look(tiny_workload(), tmp_path, target=("abacus",))
    assert failed(found) == ["target abacus"]
    assert not found.parts


def test_a_pattern_that_fits_nothing_says_why(tiny_workload: MakeWorkload) -> None:
    program = slrc.capture(tiny_workload())
    config = make_config({"skip": ("conv2", "conv3")})
    channel, columns = reach_of(program, [Channel(), Columns(3)], config)
    assert "skipped by the user" in " ".join(pin.reason for pin in (*channel.pins, *columns.pins))
    assert columns.params == 0.0


def test_where_time_is_over_nothing_more_begins(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    program, over = dense(tiny_workload()), Deadline(0.0, lambda: 0.0)
    parts = time_parts(program, Clock(ORT, 1, tmp_path), over, Quiet())
    assert [p.ms for p in parts] == [None] * 4
    points = time_speedups(program, [Channel()], make_config({}), ORT, 1, over, Quiet())
    assert [(p.speedup, p.why_not) for p in points] == [(None, NO_TIME)] * 3


class Stuck:
    """A clock on which time is over from the moment on that something does not come to an end."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def forever(self, *_: Any, **__: Any) -> Any:
        self.time = 1000.0
        while True:
            pass


def test_the_largest_parts_are_timed_first_and_kept(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third never ends: it is interrupted."""
    program, clock, stuck = dense(tiny_workload()), Clock(ORT, 1, tmp_path), Stuck()
    times_of = iter([clock.times, clock.times, stuck.forever])
    monkeypatch.setattr(clock, "times", lambda *given: next(times_of)(*given))
    parts = time_parts(program, clock, Deadline(0.01, stuck), Quiet())
    timed = [p for p in parts if p.ms is not None]
    assert len(timed) == 2
    assert min(p.macs for p in timed) >= max(p.macs for p in parts if p.ms is None)


def test_what_leaves_a_quarter_of_the_weights_is_timed_first() -> None:
    order = [(str(p), s) for p, s in times._wanted([Channel(), NM(2, 4), Columns(2)])]
    assert order[:3] == [("channel", 0.5), ("2:4", 0.5), ("columns:2", 0.75)]
    assert sorted(order[3:]) == [("channel", 0.75), ("channel", 0.9), ("columns:2", 0.5), ("columns:2", 0.9)]


def test_pruned_networks_that_were_timed_are_kept(tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third never ends: it is interrupted."""
    program, stuck = dense(tiny_workload()), Stuck()
    measures = iter([times.measure, times.measure, stuck.forever])
    monkeypatch.setattr(times, "measure", lambda *given, **more: next(measures)(*given, **more))
    monkeypatch.setattr(times, "WHOLE", Budget(0.0, BLOCKS))
    points = time_speedups(program, [Channel()], make_config({}), ORT, 1, Deadline(0.01, stuck), Quiet())
    assert [(p.sparsity, p.speedup is not None, p.why_not) for p in points] == [
        (0.5, True, ""),
        (0.75, True, ""),
        (0.9, False, NO_TIME),
    ]


def test_a_capture_that_does_not_end_is_stopped_with_a_word(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck()
    monkeypatch.setattr(examination, "capture", stuck.forever)
    config = make_config({"threads": 1})
    found = examine(tiny_workload(), config, seconds=0.01, cache=tmp_path, now=stuck)
    said = finding(found, "capture")
    assert said.status is Status.NOTE
    assert said.said == "not done: it was stopped after 1000.0 s"
    assert "--seconds" in str(said.hint)
    assert finding(found, "training data, loss and optimiser").status is Status.NOTE
    assert not found.reach


def test_an_evaluation_is_stopped_in_time_whatever_it_catches(tiny_workload: MakeWorkload) -> None:
    stuck = Stuck()

    def evaluate(model: nn.Module) -> dict[str, float]:
        while True:
            with suppress(Exception):
                stuck.forever()

    metric, seconds = practise_evaluation(tiny_workload(evaluate=evaluate), Deadline(0.01, stuck))
    assert metric is None
    assert seconds == 1000.0


class Endless:
    """Batches without end; each step between two of them takes so many seconds of a clock."""

    def __init__(self, clock: Stuck, step_seconds: float) -> None:
        self.clock, self.step_seconds, self.read = clock, step_seconds, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.read += 1
            yield torch.zeros(2, 4, 6, 6), torch.zeros(2, dtype=torch.long)
            self.clock.time += self.step_seconds


def test_training_is_stopped_in_time(tiny_workload: MakeWorkload) -> None:
    clock = Stuck()
    data = Endless(clock, 1.0)
    slow = practise_training(tiny_workload(train_batches=data), make_config({}), Deadline(0.5, clock))
    assert (slow.samples, slow.step_seconds, slow.steps, slow.epoch_seconds) == (2, 1.0, None, None)
    assert data.read < STEPS


def test_a_step_that_does_not_end_is_not_counted(tiny_workload: MakeWorkload) -> None:
    clock = Stuck()
    data = Endless(clock, 1e-3)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return clock.forever() if data.read > 3 else model(batch[0]).sum()

    found = practise_training(tiny_workload(train_batches=data, loss=loss), make_config({}), Deadline(0.01, clock))
    assert found.step_seconds == pytest.approx(1e-3)


def test_not_one_step_in_time(tiny_workload: MakeWorkload) -> None:
    clock = Stuck()
    with pytest.raises(Overtime):
        practise_training(tiny_workload(loss=clock.forever), make_config({}), Deadline(0.01, clock))


def test_the_users_line_is_named_where_the_data_fail(tiny_workload: MakeWorkload) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            raise FileNotFoundError("images/")
            yield

    with pytest.raises(WorkloadError, match=r"reading `train_batches` failed at .*FileNotFoundError: images/"):
        practise_training(tiny_workload(train_batches=Broken()), make_config({}), Deadline(1000))


def test_a_short_loader_will_do(tiny_workload: MakeWorkload, tiny_data: TensorDataset) -> None:
    two = DataLoader(tiny_data, batch_size=24)
    assert practise_training(tiny_workload(train_batches=two), make_config({}), Deadline(1000)).steps == 2


def test_hours_of_all_steps_and_evaluations() -> None:
    training = Training(
        samples=8,
        step_seconds=0.5,
        steps=100,
        epoch_seconds=50.0,
        evaluation_seconds=10.0,
        evaluation_is_whole=True,
        hours=None,
    )
    config = make_config({"epochs": 3, "retrain_epochs": 1})
    assert estimate_hours(training, config).hours == pytest.approx((400 * 0.5 + 2 * 5 * 10.0) / 3600)
    usual = estimate_hours(training, make_config({})).hours
    assert usual == pytest.approx((2000 * 0.5 + 2 * 21 * 10.0) / 3600)
    unknown = training.model_copy(update={"steps": None})
    assert estimate_hours(unknown, config).hours is None
