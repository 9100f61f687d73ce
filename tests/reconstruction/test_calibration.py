"""Where calibration inputs come from, how many are taken, and what is wrong with those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import slrc
from slrc.errors import WorkloadError
from slrc.reconstruction import calibration
from slrc.reconstruction.calibration import calibration_inputs

MakeWorkload = Callable[..., slrc.Workload]


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x) + shift


def take(workload: slrc.Workload, images: int = 100, seed: int = 0) -> list[list[Tensor]]:
    return calibration_inputs(slrc.capture(workload), workload, images, seed)


def test_tensors_are_taken_as_they_are_and_cut(tiny_workload: MakeWorkload, tiny_data: Any) -> None:
    x = tiny_data.tensors[0]
    workload = tiny_workload(calibration=x.split(20), train_batches=None)
    assert [len(chunk[0]) for chunk in take(workload, images=30)] == [20, 10]
    assert torch.equal(torch.cat([chunk[0] for chunk in take(workload)]), x)


def test_large_batches_go_in_chunks(tiny_workload: MakeWorkload, tiny_data: Any) -> None:
    workload = tiny_workload(calibration=[tiny_data.tensors[0]])
    assert [len(chunk[0]) for chunk in take(workload, images=40)] == [calibration.CHUNK, 40 - calibration.CHUNK]


def test_tuples_are_the_arguments() -> None:
    x, shift = torch.randn(6, 3), torch.randn(6, 2)
    workload = slrc.Workload(model=Two(), example_inputs=(x[:1], shift[:1]), calibration=[(x, shift)])
    ((found, other),) = take(workload)
    assert torch.equal(found, x)
    assert torch.equal(other, shift)


def test_the_loss_of_training_batches_says_what_the_model_gets() -> None:
    seen = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = model(shift=batch["shift"], x=2 * batch["x"])  # by name, and not as it lies in the batch
        seen.append(found)
        return mse_loss(found, batch["y"])

    batch = {"x": torch.randn(6, 3), "shift": torch.randn(6, 2), "y": torch.randn(6, 2)}
    model = Two()
    example = (batch["x"][:1], batch["shift"][:1])
    workload = slrc.Workload(model=model, example_inputs=example, train_batches=[batch], loss=loss)
    ((x, shift),) = take(workload)
    assert torch.equal(x, 2 * batch["x"])
    assert torch.equal(shift, batch["shift"])
    assert not seen, "the call was not stopped"
    assert not model._forward_pre_hooks


def test_calibration_wins_over_training_batches(tiny_workload: MakeWorkload) -> None:
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(take(tiny_workload(calibration=[x]))[0][0], x)


def test_the_seed_draws_the_training_batches(tiny_workload: MakeWorkload) -> None:
    first, again, other = (torch.cat([c[0] for c in take(tiny_workload(), 16, seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_fixed_batch_is_taken_whole() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).reshape(4, 2).cumsum(0)

    x = torch.randn(12, 3)
    workload = slrc.Workload(model=Fixed(), example_inputs=(x[:4],), calibration=x.split(4))
    assert [len(chunk[0]) for chunk in take(workload, images=6)] == [4, 4]


X = torch.randn(4, 4, 6, 6)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"calibration": None, "train_batches": None}, "needs calibration data, and the workload has none"),
    ({"calibration": []}, "`calibration` yielded nothing"),
    (
        {"calibration": [X[:, :, :5]]},
        r"batch 1 of `calibration` does not fit the model: expected .*\(1, 4, 6, 6\), got",
    ),
    ({"calibration": [X, X.double()]}, r"batch 2 of `calibration` does not fit the model: .* got torch.float64"),
    ({"calibration": [(X, torch.zeros(4))]}, "batch 1 of `calibration` does not fit the model"),
    ({"calibration": [X / 0]}, "batch 1 of `calibration` holds values that are not finite"),
    ({"loss": lambda model, batch: torch.zeros(())}, "does not call the model"),
    ({"loss": lambda model, batch: batch["x"]}, r"`loss\(model, batch\)` failed"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_what_cannot_be_used_is_told(tiny_workload: MakeWorkload, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        take(tiny_workload(**fields))


def test_an_error_of_the_users_iterable_names_the_field(tiny_workload: MakeWorkload) -> None:
    class Broken:
        def __iter__(self) -> Any:
            raise OSError("no such folder")

    with pytest.raises(WorkloadError, match=r"reading `calibration` failed.*no such folder"):
        take(tiny_workload(calibration=Broken()))


@pytest.mark.parametrize(
    ("value", "said"), [(3, "must be iterable, got a int"), (iter([X]), "can be read only once"), (X, "got a tensor")]
)
def test_the_field_is_checked_as_training_batches_are(tiny_workload: MakeWorkload, value: Any, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        tiny_workload(calibration=value)
