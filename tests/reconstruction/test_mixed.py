"""Plans that narrow channels and prune blocks of what is left of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.forms.packed_weight import block_density
from slrc.measuring.choose_options import joined


class Inverted(nn.Module):
    """An inverted residual: both its layers of 1×1 lose hidden channels, as inputs or as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1, bias=False)
        self.norm, self.depthwise = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.back, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.back(torch.relu(self.depthwise(torch.relu(self.norm(self.widen(y))))))
        return self.head(y.mean(dim=(2, 3)))


@pytest.mark.parametrize("pattern", ["block:8x1", "columns:2", "unstructured"])
def test_blocks_are_chosen_among_what_channels_leave(pattern: str) -> None:
    torch.manual_seed(0)
    model = Inverted().eval()
    x = torch.randn(64, 3, 8, 8)
    dense = model(x).detach()
    workload = slrc.Workload(model, (x[:1],), calibration=x.split(16))
    program = slrc.capture(workload)
    channels = slrc.plan(program, "channel", 0.5, round_to=8)
    narrowed = [c for c in channels if c.name == "widen"]
    assert [c.keep for c in narrowed] == [16]
    channels = channels.model_copy(update={"constraints": tuple(narrowed)})
    plan = joined(channels, slrc.plan(program, pattern, 0.5))
    trained = slrc.train(workload, plan, method="reconstruct")
    trained.masks.check(plan, trained.tensors)
    slim = slrc.structure(program, plan, trained)
    assert torch.allclose(slim.module()(x), model(x), atol=1e-4)
    assert (model(x) - dense).square().mean() < 0.3 * dense.var()
    assert slim.tensors["widen.weight"].shape == (16, 16, 1, 1)
    if pattern == "block:8x1":
        assert block_density(slim.tensors["widen.weight"], 8) == pytest.approx(0.5, abs=0.04)
        assert block_density(slim.tensors["back.weight"], 8) == pytest.approx(0.5, abs=0.04)
