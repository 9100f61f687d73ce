"""An arm64 device under qemu: kernels for NEON, the newest ONNX Runtime, and figures that are marked as emulated.

It takes one or two minutes, half of it to unpack the system, so it runs where `SLRC_EMULATED` is set: `1`, or a root
that was unpacked before.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import arm64
import pytest
import torch
from rig import NAME, Device, why_no_sshd

import slrc
from slrc.device.deploy import deploy_output
from slrc.device.ssh_device import SshDevice
from slrc.progress import Quiet


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    asked = os.environ.get("SLRC_EMULATED", "")
    reason = "" if asked else "set SLRC_EMULATED=1 to emulate an arm64 device, which takes two minutes"
    if reason := reason or why_no_sshd() or arm64.why_not():
        pytest.skip(reason)
    root = Path(asked)
    if not root.is_dir():
        root = tmp_path_factory.mktemp("arm64") / "root"
        try:
            arm64.make_root(root)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"an arm64 root cannot be made: {error.stderr.decode()[-200:] or error}")
    settings = f"ChrootDirectory {arm64.PLACE}\n"
    wrapper = (sys.executable, arm64.__file__, str(root))
    device = Device(tmp_path_factory.mktemp("device"), settings=settings, wrapper=wrapper)
    device.start()
    yield device
    device.stop()


@pytest.fixture
def device(server: Device, monkeypatch: pytest.MonkeyPatch, quick_timing: None) -> Device:
    monkeypatch.setenv("SLRC_SSH_CONFIG", str(server.config))
    return server


def test_an_emulated_arm64_device_runs_the_kernels_and_returns_the_same(
    device: Device, workload: slrc.Workload, tmp_path: Path
) -> None:
    with SshDevice(NAME) as found:
        info = found.info
    assert info.architecture == "aarch64"
    assert info.emulated
    assert info.onnxruntime == "1.32.0"
    slrc.compile(
        workload, tmp_path / "build", pattern="block:8x1", sparsity=0.75, epochs=0, threads=1, target="ort:aarch64"
    )
    assert list((tmp_path / "build/ort-aarch64/compiled").glob("libslrc_kernels_aarch64*.so"))
    result = deploy_output(tmp_path / "build", NAME, None, 1, Quiet())
    assert all(o.passed for o in result.outputs)
    assert {o.model for o in result.outputs} == {"dense", "compiled"}
    assert any("emulated" in caveat for caveat in result.latency.caveats)


def test_a_target_without_a_processor_is_compiled_for_the_device(device: Device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
    workload = slrc.Workload(model=model, example_inputs=(torch.randn(1, 8, 12, 12),))
    options = {"pattern": "block:8x1", "sparsity": 0.75, "epochs": 0, "threads": 1, "keep_ends": False}
    report = slrc.compile(workload, tmp_path / "build", device=NAME, **options)
    assert report.targets[0].target == "ort:aarch64"
    assert report.targets[0].forms is not None
    assert report.targets[0].forms.taken != "cost model"
    steps = [c.step for c in report.checks]
    assert "masked module = ort:aarch64 without kernels" in steps
    assert "ort:aarch64, compiled: here = on device" in steps
