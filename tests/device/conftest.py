"""A device for tests, and what a compile wrote for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import slrc

sys.path.insert(0, str(Path(__file__).parent))

from rig import Device, why_no_sshd


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A device with Python and ONNX Runtime, for all tests."""
    if reason := why_no_sshd():
        pytest.skip(reason)
    device = Device(tmp_path_factory.mktemp("device"), python=sys.executable)
    device.start()
    yield device
    device.stop()


@pytest.fixture
def device(server: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The device with an empty home folder, and the ssh configuration by which it is reached."""
    monkeypatch.setenv("SLRC_SSH_CONFIG", str(server.config))
    monkeypatch.delenv("SLRC_DEVICE_FOLDER", raising=False)
    yield server
    assert not (server.home / ".slrc" / "jobs").exists() or not list((server.home / ".slrc" / "jobs").iterdir())
    os.system(f"rm -rf {server.home}/.slrc {server.home}/other")


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a compile with packed layers wrote; read-only but for `device.json`."""
    folder = tmp_path_factory.mktemp("output") / "build"
    slrc.compile(_workload(), folder, pattern="block:8x1", sparsity=0.75, epochs=0, threads=1)
    return folder


def _workload() -> slrc.Workload:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    return slrc.Workload(model=model, example_inputs=(torch.randn(1, 8, 24, 24),))
