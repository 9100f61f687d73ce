"""slrc's folder on a device: files by content, and jobs that are found again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from rig import NAME, Device

from slrc.device.bundle import Manifest, Requirements, digest_of, digests, write_manifest
from slrc.device.remote import Stage
from slrc.device.ssh_device import SshDevice
from slrc.errors import DeviceError


def stage(folder: Path, **files: str) -> Stage:
    """A bundle with no models."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    needs = Requirements(opset=21, ir_version=10)
    manifest = Manifest(model="m", slrc="0", target="ort", requires=needs, files=digests(folder), models=())
    write_manifest(manifest, folder)
    return Stage(folder, manifest)


@pytest.fixture
def made(tmp_path: Path) -> Stage:
    return stage(tmp_path / "bundle", a="one", b="two", c="two")


def brought(device: SshDevice, made: Stage) -> None:
    device.remote.send(made)
    device.remote.place(made, f"jobs/{made.id}")


def test_contents_are_sent_once_each(device: Device, connected: SshDevice, made: Stage) -> None:
    assert len(connected.remote.missing(made)) == 4
    assert connected.remote.send(made) == 4  # `b` and `c` are one, and there are the manifest and its lines
    assert connected.remote.send(made) == 0
    connected.remote.place(made, "models/m")
    there = device.home / ".slrc/models/m"
    assert {p.name: p.read_text() for p in there.iterdir() if len(p.name) == 1} == {"a": "one", "b": "two", "c": "two"}
    assert all(digest_of(p) == p.name for p in (device.home / ".slrc/store").iterdir())


def test_a_content_that_arrived_damaged_is_told_and_not_kept(device: Device, connected: SshDevice, made: Stage) -> None:
    """What changes between being named and being sent, as on a bad disk."""
    (made.folder / "a").write_text("other")
    with pytest.raises(DeviceError, match="arrived damaged"):
        connected.remote.send(made)
    assert device.files() == []


def test_a_job_is_started_found_and_collected_once(
    device: Device, connected: SshDevice, made: Stage, tmp_path: Path
) -> None:
    remote = connected.remote
    assert remote.state(made) == "none"
    brought(connected, made)
    go = device.home / "go"
    remote.start(made, f"sh -c 'echo working; while [ ! -f {go} ]; do sleep 0.1; done; echo 1 > result.json; exit 5'")
    with SshDevice(NAME) as other:
        waited: list[int] = []
        waiting = threading.Thread(target=lambda: waited.append(other.remote.wait(made)))
        waiting.start()
        go.touch()
        waiting.join(60)
        assert waited == [5]
        assert other.remote.state(made) == "ended"
        assert other.remote.collect(made, tmp_path) == "working\n"
    assert (tmp_path / "result.json").read_text() == "1\n"
    assert remote.state(made) == "none"


def test_a_job_that_ended_without_a_word_is_told(device: Device, connected: SshDevice, made: Stage) -> None:
    brought(connected, made)
    connected.remote.start(made, "kill -9 0")
    with pytest.raises(DeviceError, match="the system killed it"):
        connected.remote.wait(made)
    assert connected.remote.state(made) == "dead"


def test_remove_ends_jobs(device: Device, connected: SshDevice, made: Stage) -> None:
    brought(connected, made)
    connected.remote.start(made, "sleep 300")
    pid = device.home / ".slrc/jobs" / made.id / "pid"
    while not pid.exists() or not pid.read_text().strip():
        pass
    process = Path(f"/proc/{pid.read_text().strip()}")
    assert process.exists()
    assert connected.remote.remove()
    for _ in range(200):
        if not process.exists():
            break
        threading.Event().wait(0.05)
    assert not process.exists()
    assert device.files() == []


def test_forgetting_all_leaves_nothing(device: Device, connected: SshDevice, made: Stage) -> None:
    brought(connected, made)
    connected.remote.drop_job(made)
    connected.remote.forget(made.paths)
    assert device.files() == []
