"""An arm64 device under qemu: kernels for NEON, the newest ONNX Runtime, and figures that are marked as emulated.

It takes one or two minutes, half of it to unpack the system, so it runs where `SLRC_EMULATED` is set: `1`, or a root
that was unpacked before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import arm64
import pytest
from rig import NAME, Device, why_no_sshd

import slrc
from slrc.backends import parse_target
from slrc.device.deploy import deploy_output
from slrc.device.ssh_device import SshDevice
from slrc.measuring.choose_forms import choose_forms
from slrc.pipeline import structure
from slrc.progress import Quiet
from slrc.sparsity.masks import Masks


@pytest.fixture(scope="module")
def server(arm64_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    if reason := why_no_sshd():
        pytest.skip(reason)
    root = arm64_root
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


def test_an_emulated_arm64_device_runs_the_kernels_returns_the_same_and_times_forms(
    device: Device, workload: slrc.Workload, tmp_path: Path
) -> None:
    options = {"pattern": "block:8x1", "sparsity": 0.75, "epochs": 0, "threads": 1}
    slrc.compile(workload, tmp_path / "build", target="ort:aarch64", **options)
    assert list((tmp_path / "build/ort-aarch64/compiled").glob("libslrc_kernels_aarch64*.so"))
    result = deploy_output(tmp_path / "build", NAME, None, 1, Quiet())
    assert result.device.architecture == "aarch64"
    assert result.device.emulated
    assert result.runtime == result.device.onnxruntime == "1.32.0"
    assert {o.model for o in result.outputs} == {"dense", "compiled"}
    assert all(o.passed for o in result.outputs)
    assert any("emulated" in caveat for caveat in result.latency.caveats)

    program = slrc.capture(workload)
    plan = slrc.plan(program, "block:8x1", 0.75, skip=("4",))
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    with SshDevice(NAME) as found:
        target = found.resolve(parse_target("ort"))
        choice = choose_forms(slim, target, threads=1, cache=tmp_path / "cache", device=found)
    assert choice.target == "ort:aarch64"
    assert choice.taken != "cost model"
    assert all({"dense", "packed:8"} <= layer.ms.keys() for layer in choice.layers if layer.weight == "2.weight")
    assert not choice.dropped
