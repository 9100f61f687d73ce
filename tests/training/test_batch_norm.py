"""Batch-norm statistics taken anew."""

from __future__ import annotations

import torch
from torch import nn

from slrc.training.batch_norm import adopt_statistics, recalibrate_batch_norm


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, 2))


BATCHES = [torch.randn(16, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(4)]


def test_statistics_are_the_average_over_the_batches() -> None:
    model = make_model().train()
    recalibrate_batch_norm(model, lambda m, x: m(x), BATCHES, 3)
    with torch.no_grad():
        inner = [model[0](x) for x in BATCHES[:3]]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean(0) for y in inner]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var(0) for y in inner]).mean(0))
    assert (model[1].momentum, model[1].num_batches_tracked) == (0.3, 3)
    assert all(m.training for m in model.modules())


def test_only_batch_norm_trains_meanwhile_and_nothing_has_a_gradient() -> None:
    model, modes = make_model().eval(), []

    def forward(m: nn.Module, x: torch.Tensor) -> None:
        modes.append((m[1].training, m[2].training, m(x).requires_grad))

    recalibrate_batch_norm(model, forward, BATCHES, 1)
    assert modes == [(True, False, False)]
    assert not any(m.training for m in model.modules())


def test_statistics_stay_where_there_is_nothing_to_take_them_from() -> None:
    for batches, count in (([], 5), (BATCHES, 0)):
        model = make_model()
        model[1].running_mean.fill_(7.0)
        recalibrate_batch_norm(model, lambda m, x: m(x), batches, count)
        assert (model[1].running_mean == 7.0).all()


def test_norms_that_a_model_does_not_train_keep_their_statistics() -> None:
    class Settled(nn.Sequential):
        def train(self, mode: bool = True) -> Settled:
            super().train(mode)
            self[0].eval()
            return self

    torch.manual_seed(0)
    model = Settled(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    recalibrate_batch_norm(model, lambda m, x: m(x), BATCHES[2:], 2)
    assert not model[0].running_mean.any()
    adopt_statistics(model, lambda m, x: m(x), BATCHES, 2)
    assert not model[0].running_mean.any()
    assert (model[0].weight == 1).all()
    recalibrate_batch_norm(model, lambda m, x: m(x), BATCHES[2:], 2)
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(0) for x in BATCHES[2:]]).mean(0))
    assert not any(m.training for m in model.modules())


def test_a_model_without_running_statistics_is_not_run() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> None:
        raise AssertionError

    recalibrate_batch_norm(
        nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False)), forward, BATCHES, 2
    )


def test_a_model_computes_the_same_with_its_own_statistics() -> None:
    """And then in training mode too, on the batch that they were taken from."""
    model = make_model().eval()
    with torch.no_grad():
        model[1].running_mean += torch.randn(4)
        model[1].running_var *= 5.0
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
        x = torch.cat(BATCHES)
        before = model(x)
        adopt_statistics(model, lambda m, x: m(x), [x], 3)
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
        torch.testing.assert_close(model[1].running_var, model[0](x).var(0, correction=0))
        assert not model.training
        model[1].train()
        torch.testing.assert_close(model(x), before)
