"""How much a pruned network is like the dense one, without labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.reconstruction.likeness import LEAST, SAMPLES, Likeness, likeness_to_dense

LINEAR = 4


def workload(batches: list[Tensor]) -> slrc.Workload:
    torch.manual_seed(0)
    return slrc.Workload(
        model=nn.Sequential(nn.Linear(LINEAR, 3)), example_inputs=(torch.randn(2, LINEAR),), calibration=batches
    )


def alike(batches: list[Tensor], scale: Tensor, refitted: int = 0, logits: bool | None = None) -> Likeness:
    """Compare a layer with itself, its rows scaled."""
    made = workload(batches)
    program = slrc.capture(made)
    scaled = {name: (t.T * scale).T for name, t in program.tensors.items()}
    pruned = program.with_tensors(scaled)
    return likeness_to_dense(program, pruned, made, 0, refitted=refitted, logits=logits)


def test_the_dense_network_is_like_itself() -> None:
    found = alike([torch.randn(10, LINEAR)], torch.ones(3))
    assert found == Likeness(samples=10, fresh=False, agreement=1.0, error=0.0)


def test_agreement_and_error_are_those_of_the_outputs() -> None:
    x, scale = torch.randn(50, LINEAR), torch.tensor([1.0, 0.5, -1.0])
    found = alike([x], scale)
    dense = workload([x]).model(x).detach()
    pruned = dense * scale
    assert found.agreement == pytest.approx(float((dense.argmax(1) == pruned.argmax(1)).double().mean()))
    assert 0 < found.agreement < 1
    spread = (dense - dense.mean()).square().sum()
    assert found.error == pytest.approx(float(((dense - pruned).square().sum() / spread).sqrt()), rel=1e-5)


def test_samples_that_layers_were_refitted_on_are_left_out() -> None:
    """Those are so large that they would make all the error."""
    seen, fresh = 1e4 * torch.randn(40, LINEAR), torch.randn(SAMPLES, LINEAR)
    found = alike([seen, fresh], torch.tensor([1.0, 1.0, 2.0]), refitted=40)
    assert found == replace(alike([fresh], torch.tensor([1.0, 1.0, 2.0])), fresh=True)
    assert found.samples == SAMPLES
    assert "no layer was refitted on" in str(found)


def test_where_there_are_no_others_those_are_compared() -> None:
    found = alike([torch.randn(40, LINEAR)], torch.ones(3) * 2, refitted=512)
    assert (found.samples, found.fresh) == (40, False)
    assert "40 samples of its data" in str(found)


def test_outputs_that_are_no_classes_have_no_agreement() -> None:
    found = alike([torch.randn(8, LINEAR)], torch.ones(3) * 2, logits=False)
    assert found.agreement is None
    assert "greatest" not in str(found)


def test_few_others_are_not_enough() -> None:
    found = alike([torch.randn(40, LINEAR), torch.randn(LEAST - 1, LINEAR)], torch.ones(3) * 2, refitted=40)
    assert (found.samples, found.fresh) == (40 + LEAST - 1, False)


def test_inputs_may_be_in_containers() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(LINEAR, 3)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.layer(x["a"] + x["b"])

    def batch(n: int) -> tuple[dict[str, Tensor]]:
        return ({"a": torch.randn(n, LINEAR), "b": torch.randn(n, LINEAR)},)

    made = slrc.Workload(model=Gathered(), example_inputs=batch(2), calibration=[batch(8)])
    program = slrc.capture(made)
    assert likeness_to_dense(program, program, made, 0).error == 0


def test_the_spread_is_about_the_mean_of_all_samples() -> None:
    """Two calls of one sample each, whose outputs are alike within each."""
    x = torch.stack([torch.zeros(LINEAR), torch.ones(LINEAR)])
    assert alike(list(x.split(1)), torch.ones(3) * 2).error == pytest.approx(alike([x], torch.ones(3) * 2).error)
