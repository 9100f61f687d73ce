"""A small network with residuals, trained by nobody but with statistics of its own data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slrc

sys.path.insert(0, str(Path(__file__).parent))


class ResidualNet(nn.Module):
    """Images `(n, 4, 8, 8)` to four numbers: batch norm, biases, a residual, a shared layer, a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.shared = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.bare = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm0(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(y)))
        x = torch.relu(self.shared(x))
        x = torch.relu(self.shared(x))
        x = self.grouped(x).mean(dim=(2, 3))
        return self.head(torch.relu(self.bare(x)))


def images(count: int, seed: int = 0) -> Tensor:
    """`(count, 4, 8, 8)`, smooth, so that neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 4, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=2.0, mode="bilinear") + 0.3


@pytest.fixture(scope="session")
def residual_net() -> Callable[[], nn.Module]:
    """Makes the network, the same each time, in evaluation mode."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = ResidualNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.momentum = None
        with torch.no_grad():
            model.train()(images(64, seed=1))
        return model.eval()

    return make


@pytest.fixture
def residual_workload(residual_net: Callable[[], nn.Module]) -> slrc.Workload:
    """The network with 96 images to calibrate."""
    x = images(96)
    return slrc.Workload(model=residual_net(), example_inputs=(x[:1],), calibration=x.split(40))
