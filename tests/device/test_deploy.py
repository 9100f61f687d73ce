"""To a real sshd and back: what a deploy sends, proves, measures and leaves there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import NAME, Device

import slrc
from slrc.device.deploy import bench_on_device, deploy_output
from slrc.device.probe import probe
from slrc.device.remote import MARK
from slrc.device.ssh_device import SshDevice
from slrc.measuring import timing
from slrc.progress import Quiet
from slrc.reporting.bench import bench_output


class Said(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_deploy_proves_measures_and_leaves_the_model_there(device: Device, output: Path) -> None:
    result = deploy_output(output, NAME, None, 1, Said())
    assert {o.model for o in result.outputs} == {"dense", "compiled"}
    assert all(o.passed and o.error <= o.tolerance for o in result.outputs)
    assert result.latency.device == NAME
    assert result.latency.threads == 1
    assert {"governor", "load"} <= result.latency.states["before"].keys() & result.latency.states["after"].keys()
    assert result.latency.dense_ms.p50 > 0
    assert result.latency.speedup_spread[0] <= result.latency.speedup_spread[1]
    there = device.home / result.folder
    assert (there / "compiled" / "model.onnx").read_bytes() == (output / "ort/compiled/model.onnx").read_bytes()
    assert list((there / "compiled").glob("libslrc_kernels_*.so"))
    assert json.loads((output / "device.json").read_text())["folder"] == result.folder
    assert not [name for name in device.files() if not name.startswith(".slrc")]
    assert not list((device.home / ".slrc" / "jobs").iterdir())


def test_a_second_deploy_sends_only_what_is_missing(device: Device, output: Path) -> None:
    first, second, third = Said(), Said(), Said()
    deploy_output(output, NAME, None, 1, first)
    deploy_output(output, NAME, None, 1, second)
    deploy_output(output, NAME, None, 2, third)  # another number of threads is another manifest
    assert "9 of 9 files sent" in first.lines[0]
    assert "0 of 9 files sent" in second.lines[0]
    assert "2 of 9 files sent" in third.lines[0]


def test_remove_leaves_nothing_and_takes_only_what_slrc_made(
    device: Device, output: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy_output(output, NAME, None, 1, Quiet())
    (device.home / "own").mkdir()
    result = run("deploy", "--device", NAME, "--remove")
    assert result.code == 0, result.err
    assert "MB removed" in result.out
    assert device.files() == ["own"]
    assert "nothing of slrc" in run("deploy", "--device", NAME, "--remove").out
    monkeypatch.setenv("SLRC_DEVICE_FOLDER", "own")
    (device.home / "own" / "letter").touch()
    used = run("deploy", output, "--device", NAME)
    assert used.code == 2
    assert "it will not be used" in used.err
    refused = run("deploy", "--device", NAME, "--remove")
    assert refused.code == 2
    assert "was not made by slrc" in refused.err
    assert device.files() == ["own", "own/letter"]


def test_an_environment_of_python_may_lie_in_the_folder_before(
    device: Device, output: Path, run: Callable[..., Any]
) -> None:
    (device.home / ".slrc/venv/bin").mkdir(parents=True)
    (device.home / ".slrc/venv/bin/python").symlink_to(device.programs / "python3")
    result = run("deploy", output, "--device", NAME, "--threads", 1, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["device"]["python"] == f"{device.home}/.slrc/venv/bin/python"
    assert run("deploy", "--device", NAME, "--remove").code == 0
    assert device.files() == []


@pytest.mark.parametrize("name", ["../up", "~", "/", "", "a b", "$(x)", "a/../b"])
def test_a_folder_that_could_be_anything_is_refused(run: Callable[..., Any], name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("SLRC_DEVICE_FOLDER", name)
    result = run("targets", "--device", NAME)
    assert result.code == 2
    assert "SLRC_DEVICE_FOLDER" in result.err


def test_a_bench_keeps_kernels_and_runner_alone(device: Device, output: Path, run: Callable[..., Any]) -> None:
    result = run("bench", output, "--device", NAME, "--threads", 1, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["latency"][0]["device"] == NAME
    kept = list((device.home / ".slrc" / "store").iterdir())
    assert len(kept) == 2
    assert {MARK, "store"} == {path.name for path in (device.home / ".slrc").iterdir()}


def test_targets_says_what_is_there(device: Device, run: Callable[..., Any]) -> None:
    result = run("targets", "--device", NAME)
    assert result.code == 0, result.err
    for word in ("architecture", "glibc", "ONNX Runtime", "free disk", "governor", "power mode", "TensorRT"):
        assert word in result.out
    assert device.files() == []


def test_a_jetson_is_told_from_what_its_programs_print(device: Device, connected: SshDevice) -> None:
    device.program("trtexec", 'echo "&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help"')
    device.program("nvpmodel", 'printf "NV Power Mode: MAXN\\n0\\n"')
    try:
        info = probe(connected.connection, ".slrc")
    finally:
        for name in ("trtexec", "nvpmodel"):
            (device.programs / name).unlink()
    assert info.tensorrt == "8.5.2"
    assert info.trtexec.endswith("/trtexec")
    assert info.power_mode == "NV Power Mode: MAXN;0"


def test_there_and_here_take_alike_times(device: Device, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are this machine: of three tries, in one the speed-ups agree within a tenth or their ranges overlap."""
    monkeypatch.setattr(timing, "PATIENCE", 0.3)
    apart = []
    for _ in range(3):
        there = bench_on_device(output, NAME, None, 1, Quiet()).latency[0]
        here = bench_output(output, 1, Quiet()).latency[0]
        apart.append(there.speedup / here.speedup - 1)
        (low, high), (least, most) = there.speedup_spread, here.speedup_spread
        if abs(apart[-1]) <= 0.1 or (low <= most and least <= high):
            return
    pytest.fail(f"speed-ups differ by {apart}")


def test_a_budget_is_measured_over_ssh(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(8, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, padding=1)
    workload = slrc.Workload(model=torch.nn.Sequential(*layers), example_inputs=(torch.randn(1, 8, 16, 16),))
    options = {"pattern": "columns:2", "speedup": 1.3, "epochs": 0, "threads": 1}
    report = slrc.compile(workload, tmp_path / "build", device=NAME, **options)
    assert report.latency[0].device == NAME
    assert report.latency[0].predicted_ms is not None
    steps = [c.step for c in report.checks]
    assert "ort, compiled: here = on device" in steps
    assert list((tmp_path / "cache" / "latency").rglob("*.json"))


def test_the_four_models_of_an_int8_target_are_timed_on_the_device(device: Device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1)
    workload = slrc.Workload(model=torch.nn.Sequential(*layers), example_inputs=(torch.randn(1, 8, 8, 8),))
    options = {"target": "ort+int8", "sparsity": 0.5, "epochs": 0, "threads": 1, "keep_ends": False}
    report = slrc.compile(workload, tmp_path / "build", device=NAME, **options)
    int8 = report.targets[0].int8
    assert int8 is not None
    assert all(corner.latency_ms is not None for corner in int8.corners)
    assert (report.latency[0].device, report.latency[0].target) == (NAME, "ort:int8")
    assert report.latency[0].compiled_ms == int8.corners[3].latency_ms
    compared = {c.step for c in report.checks if "here = on" in c.step}
    models = ("dense", "compiled", "dense-float32", "compiled-float32")
    assert compared == {f"ort:int8, {model}: here = on {NAME}" for model in models}


def test_clocks_are_locked_after_a_yes_alone_and_set_back(
    device: Device, output: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    done = device.folder / "clocks"
    device.program("sudo", '[ "$1" = -n ] && shift && exec "$@"')
    device.program("jetson_clocks", f'[ "$1" = --show ] || echo "$1" >> {done}')
    try:
        for answer in (False, True):
            monkeypatch.setattr("typer.confirm", lambda text, answer=answer, **_: asked.append(text) or answer)
            result = run("bench", output, "--device", NAME, "--threads", 1, "--lock-clocks")
            assert result.code == 0, result.err
            assert done.exists() is answer
    finally:
        for name in ("sudo", "jetson_clocks"):
            (device.programs / name).unlink()
    assert "jetson_clocks --restore" in asked[0]
    assert done.read_text().splitlines() == ["--store", "", "--restore"]


def test_clocks_that_cannot_be_locked_are_told(device: Device, output: Path, run: Callable[..., Any]) -> None:
    result = run("bench", output, "--device", NAME, "--lock-clocks")
    if result.code == 0:
        pytest.skip("this machine's clocks can be locked")
    assert "its clocks cannot be locked" in result.err or "Aborted" in result.err
    assert device.files() == []


def test_a_bundles_file_is_deployed_as_the_output_it_was_made_of(
    device: Device, output: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    assert run("bundle", output, "-o", tmp_path / "model.tar", "--threads", 1).code == 0
    result = run("deploy", tmp_path / "model.tar", "--device", NAME, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["latency"]["threads"] == 1
    assert told["latency"]["batch"] == 1
    assert (device.home / told["folder"] / "manifest.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.tar"]
    content = bytearray((tmp_path / "model.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.tar").write_bytes(content)
    refused = run("deploy", tmp_path / "model.tar", "--device", NAME)
    assert refused.code == 2
    assert "is damaged" in refused.err


def test_what_the_users_shell_prints_is_not_taken_for_an_answer(device: Device, run: Callable[..., Any]) -> None:
    login = (device.programs / "login").read_text()
    noisy = login.replace("#!/bin/sh\n", "#!/bin/sh\necho hello; echo welcome >&2\n")
    (device.programs / "login").write_text(noisy)
    try:
        with SshDevice(NAME) as found:
            assert found.connection.run("echo answer").out == b"answer\n"
            assert found.info.architecture
    finally:
        (device.programs / "login").write_text(login)


def test_control_characters_of_a_device_do_not_reach_the_terminal(device: Device, run: Callable[..., Any]) -> None:
    device.program("nvpmodel", r"printf '\033[31mMAXN\033[0m\n'")
    try:
        result = run("targets", "--device", NAME)
    finally:
        (device.programs / "nvpmodel").unlink()
    assert "MAXN" in result.out
    assert "\x1b" not in result.out
