"""The loop of the examples' dense training: it learns, says so, holds the gradient and ends on the CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("common.dense_training")


def squared(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def train(training: ModuleType, epochs: int, clip: float | None) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).to(training.DEVICE)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    x = torch.ones(4, 1)
    training.train_epochs(model, [(x, 3 * x)], squared, optimizer, schedule, epochs, "line", clip=clip)
    return model


def test_it_learns_and_says_each_epochs_loss(training: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    model = train(training, 2, None)
    assert model.weight.item() == pytest.approx(3.0)
    assert model.weight.device == torch.device("cpu")
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(",")[0] for line in said] == [
        "dense line: epoch 1/2, loss 9.000",
        "dense line: epoch 2/2, loss 0.000",
    ]


def test_the_rate_rises_and_falls_once(training: ModuleType) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.5)
    schedule, rates = training.rise_and_fall(optimizer, 40), []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    highest = rates.index(max(rates))
    assert rates[0] == 0.125
    assert highest == 3
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_the_gradient_is_clipped(training: ModuleType) -> None:
    assert train(training, 1, 1.0).weight.item() == pytest.approx(0.5, rel=1e-4)
