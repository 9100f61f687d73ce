"""A device for tests, and what a compile wrote for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import slrc
from slrc.device.ssh_device import SshDevice

sys.path.insert(0, str(Path(__file__).parent))

import arm64
import systems
from rig import NAME, Device, why_no_sshd


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
def device(server: Device, monkeypatch: pytest.MonkeyPatch, quick_timing: None) -> Iterator[Device]:
    """The device with an empty home folder, and the ssh configuration by which it is reached."""
    monkeypatch.setenv("SLRC_SSH_CONFIG", str(server.config))
    monkeypatch.delenv("SLRC_DEVICE_FOLDER", raising=False)
    yield server
    server.write_config()
    server.trust()
    shutil.rmtree(server.home)
    server.home.mkdir()


@pytest.fixture
def connected(device: Device) -> Iterator[SshDevice]:
    with SshDevice(NAME) as found:
        yield found


@pytest.fixture(scope="session")
def arm64_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian for arm64 with Python and ONNX Runtime: the one that `SLRC_EMULATED` names, or a new one."""
    asked = os.environ.get("SLRC_EMULATED", "")
    if reason := "" if asked else "set SLRC_EMULATED=1 to emulate an arm64 device, which takes two minutes":
        pytest.skip(reason)
    if reason := arm64.why_not():
        pytest.skip(reason)
    root = Path(asked)
    if not root.is_dir():
        root = tmp_path_factory.mktemp("arm64") / "root"
        try:
            systems.unpack(arm64.SYSTEM, root)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"an arm64 root cannot be made: {error.stderr.decode()[-200:] or error}")
    return root


def small_workload() -> slrc.Workload:
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


@pytest.fixture
def workload() -> slrc.Workload:
    """A small convolutional network with random weights, and no data."""
    return small_workload()


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a compile with packed layers wrote; read-only but for `device.json`."""
    folder = tmp_path_factory.mktemp("output") / "build"
    slrc.compile(small_workload(), folder, pattern="block:8x1", sparsity=0.75, epochs=0, threads=1)
    return folder
