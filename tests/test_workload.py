"""What a workload may be, how its metric is measured, and weights that are trained once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.errors import WorkloadError

X = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": lambda x: x}, "`Workload.model` must be a torch.nn.Module, got a function"),
        ({"example_inputs": X}, "`Workload.example_inputs` must be a tuple of inputs, got a tensor"),
        ({"example_inputs": [X]}, "must be a tuple of inputs, got a list of 1"),
        ({"example_inputs": ()}, "must be a tuple of inputs, got a tuple of 0"),
        ({"train_batches": 3}, "`Workload.train_batches` must be iterable, got a int"),
        ({"train_batches": iter([X])}, "can be read only once"),
        ({"eval_batches": X}, "`Workload.eval_batches` must be an iterable of batches, got a tensor"),
        ({"eval_batches": [X], "evaluate": lambda model: {}}, "`Workload.eval_batches` exclude each other"),
        ({"evaluate_batch": lambda model, batch: {}}, "`Workload.evaluate_batch` needs `eval_batches`"),
    ],
)
def test_what_a_workload_can_get_wrong(fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": nn.Linear(2, 2), "example_inputs": (X,)}
    with pytest.raises(WorkloadError, match=message):
        slrc.Workload(**{**given, **fields})


def test_a_workload_does_not_start_to_read_its_data() -> None:
    class Expensive:
        def __iter__(self) -> Iterator[Any]:
            pytest.fail("starts eight worker processes")

    slrc.Workload(model=nn.Linear(2, 2), example_inputs=(X,), train_batches=Expensive())


def test_measure_gives_the_leading_metric_and_puts_the_mode_back() -> None:
    modes = []

    def evaluate(model: nn.Module) -> dict[str, Any]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"accuracy": torch.tensor(0.75), "loss": 0.5}

    workload = slrc.Workload(model=nn.Linear(2, 2), example_inputs=(X,), evaluate=evaluate)
    for training in (True, False):
        workload.model.train(training)
        assert workload.measure(workload.model) == ("accuracy", 0.75)
        assert workload.model.training is training
    assert modes == [(False, False)] * 2


def test_measure_without_evaluate() -> None:
    assert slrc.Workload(model=nn.Linear(2, 2), example_inputs=(X,)).measure(nn.Linear(2, 2)) is None


LABELS = torch.tensor([0, 1, 1, 1, 0])
BATCHES = [(torch.eye(2)[LABELS[:4]], LABELS[:4]), (torch.eye(2)[LABELS[4:]], 1 - LABELS[4:])]
"""Four samples that a model which returns its inputs gets right, and one that it gets wrong."""


def test_batches_count_as_many_samples_as_they_hold() -> None:
    workload = slrc.Workload(model=nn.Identity(), example_inputs=(X,), eval_batches=BATCHES)
    assert workload.is_evaluated
    assert workload.measure(nn.Identity()) == ("accuracy", 0.8)
    pixels = [(x[:, :, None, None].expand(-1, -1, 3, 2), y[:, None, None].expand(-1, 3, 2)) for x, y in BATCHES]
    segmentation = slrc.Workload(model=nn.Identity(), example_inputs=(X,), eval_batches=pixels)
    assert segmentation.measure(nn.Identity()) == ("accuracy", 0.8)


@pytest.mark.parametrize(
    ("sums", "samples"),
    [((2, 4), 8), ((2.0, 4.0), 8), ((2.5, 4), None), ((2, 4.5), None), ((9, 4), None), ((-1, 4), None)],
)
def test_samples_are_counted_where_each_is_a_whole(sums: tuple[float, float], samples: int | None) -> None:
    def evaluate_batch(model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"share": sums}

    identity = nn.Identity()
    workload = slrc.Workload(model=identity, example_inputs=(X,), eval_batches=[0, 1], evaluate_batch=evaluate_batch)
    found = workload.measure_counted(identity)
    assert found is not None
    assert (found[:2], found.samples) == (workload.measure(identity), samples)


def test_of_a_function_that_evaluates_no_samples_are_known() -> None:
    workload = slrc.Workload(model=nn.Identity(), example_inputs=(X,), evaluate=lambda model: {"accuracy": 0.5})
    assert workload.measure_counted(nn.Identity()) == ("accuracy", 0.5, None)


def test_batches_are_measured_in_evaluation_mode_by_a_function_of_ones_own() -> None:
    modes = []

    def evaluate_batch(model: nn.Module, batch: Any) -> dict[str, Any]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"loss": (batch[0].sum() / 3, len(batch[0])), "other": 1}

    model = nn.Linear(2, 2)
    workload = slrc.Workload(model=model, example_inputs=(X,), eval_batches=BATCHES, evaluate_batch=evaluate_batch)
    assert workload.measure(model) == ("loss", pytest.approx(1 / 3))
    assert modes == [(False, False)] * 2
    assert model.training


@pytest.mark.parametrize(
    ("batches", "found", "message"),
    [
        (BATCHES, {"accuracy": 0.5}, r"must return {\"metric\": \(sum, count\)}, got {'accuracy': 0.5}"),
        (BATCHES, {"accuracy": ("many", 2)}, "must return"),
        (BATCHES, {}, "must return"),
        (BATCHES, None, "must return"),
        (BATCHES, {"loss": (1.0, 0)}, "hold nothing to evaluate: 2 batches, a count of 0"),
        ([], {"loss": (1.0, 1)}, "hold nothing to evaluate: 0 batches"),
    ],
)
def test_what_evaluate_batch_can_get_wrong(batches: Any, found: Any, message: str) -> None:
    workload = slrc.Workload(
        model=nn.Identity(), example_inputs=(X,), eval_batches=batches, evaluate_batch=lambda model, batch: found
    )
    with pytest.raises(WorkloadError, match=message):
        workload.measure(nn.Identity())


def test_errors_in_batches_of_evaluation_name_the_line() -> None:
    def evaluate_batch(model: nn.Module, batch: Any) -> Any:
        return {f"metric {len(batch[0])}": (1.0, 1)} if batch else {}[0]

    def workload(batches: Any, **fields: Any) -> slrc.Workload:
        return slrc.Workload(model=nn.Identity(), example_inputs=(X,), eval_batches=batches, **fields)

    with pytest.raises(WorkloadError, match=r"`evaluate_batch` failed at .*test_workload\.py.*else \{\}\[0\]"):
        workload([()], evaluate_batch=evaluate_batch).measure(nn.Identity())
    with pytest.raises(WorkloadError, match="returned `metric 4` first for one batch, `metric 1` for another"):
        workload(BATCHES, evaluate_batch=evaluate_batch).measure(nn.Identity())
    with pytest.raises(WorkloadError, match="the default `evaluate_batch` needs batches `\\(x, y\\)`"):
        workload([X]).measure(nn.Identity())
    failing = torch.utils.data.DataLoader(BATCHES, batch_size=None, collate_fn=lambda batch: batch[2])
    with pytest.raises(WorkloadError, match=r"reading `eval_batches` failed at .*test_workload\.py"):
        workload(failing).measure(nn.Identity())


def test_cached_weights_trains_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "weights.safetensors"
    trained = []

    def train(model: nn.Module) -> None:
        trained.append(model)
        nn.init.constant_(model.weight, 3.0)

    first = slrc.cached_weights(nn.Linear(2, 2), path, train)
    second = slrc.cached_weights(nn.Linear(2, 2), path, train)
    assert len(trained) == 1
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"]


def test_cached_weights_of_an_interrupted_training_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"

    def fails(model: nn.Module) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slrc.cached_weights(nn.Linear(2, 2), path, fails)
    assert list(tmp_path.iterdir()) == []


def test_cached_weights_whose_writing_fails_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"

    def half_written(model: nn.Module, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("slrc.workload.save_model", half_written)
        with pytest.raises(OSError, match="No space left"):
            slrc.cached_weights(nn.Linear(2, 2), path, lambda m: None)
    assert not path.exists()
    slrc.cached_weights(nn.Linear(2, 2), path, lambda m: None)
    assert path.exists()
