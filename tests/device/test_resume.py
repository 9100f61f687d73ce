"""The link is cut, in a network of its own: a second run goes on where the first was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import NAME, Device, why_no_sshd

from slrc.device.bundle import digest_of
from slrc.device.deploy import bench_on_device
from slrc.device.failures import LinkLostError
from slrc.progress import Quiet


class Network:
    """A network with a loopback interface that can be cut."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "ip link set lo up; exec sleep 600"])
        self.inside = ("nsenter", "-t", str(self._holder.pid), "-n")
        for _ in range(100):
            if subprocess.run([*self.inside, "ip", "link", "show", "lo"], capture_output=True, text=True,
                              check=False).stdout.find("LOWER_UP") > 0:  # fmt: skip
                break
            time.sleep(0.05)

    def cut(self) -> None:
        subprocess.run([*self.inside, "ip", "link", "set", "lo", "down"], check=True)

    def mend(self) -> None:
        subprocess.run([*self.inside, "ip", "link", "set", "lo", "up"], check=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@pytest.fixture
def network() -> Iterator[Network]:
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if os.getuid() != 0 or missing:
        pytest.skip(f"a network of its own is for root, with {' and '.join(missing) or 'unshare'}")
    allowed = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"no network of its own here: {allowed.stderr.strip()}")
    found = Network()
    yield found
    found.close()


@pytest.fixture
def device(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_timing: None) -> Iterator[Device]:
    """A device in the network, and an `ssh` that goes there."""
    if reason := why_no_sshd():
        pytest.skip(reason)
    found = Device(tmp_path / "device", python=sys.executable, wrapper=network.inside)
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {" ".join(network.inside)} {shutil.which("ssh")} "$@"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLRC_SSH_CONFIG", str(found.config))
    found.start()
    yield found
    found.stop()


class Said(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def when(condition: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Act in another thread, as soon as a condition holds."""

    def wait() -> None:
        for _ in range(1200):
            if condition():
                act()
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_copy_that_was_cut_goes_on_with_what_is_missing(device: Device, network: Network, output: Path) -> None:
    """The device takes the runner, the kernels and a part of a model, then no more."""
    kernels = next(output.glob("ort/compiled/*.so")).stat().st_size
    device.program("tar", f"head -c {kernels + 80_000} | {shutil.which('tar')} -xf -; sleep 120")

    def arrived() -> list[Path]:
        return [path for path in device.home.glob(".slrc/incoming/*/*") if path.stat().st_size]

    cutting = when(lambda: len(arrived()) > 2, network.cut)
    with pytest.raises(LinkLostError, match="the link was lost") as lost:
        bench_on_device(output, NAME, None, 1, Quiet())
    cutting.join()
    assert "run the same command again" in str(lost.value.hint)
    whole = sum(digest_of(path) == path.name for path in arrived())
    assert 0 < whole < len(arrived())
    (device.programs / "tar").unlink()
    network.mend()
    second = Said()
    result = bench_on_device(output, NAME, None, 1, second)
    assert result.latency[0].dense_ms.p50 > 0
    sent = int(second.lines[0].split(": ")[1].split()[0])
    assert sent == 9 - whole
    assert not (device.home / ".slrc" / "incoming").is_dir() or not any((device.home / ".slrc/incoming").iterdir())


def test_a_run_that_was_cut_off_goes_on_and_is_collected_once(device: Device, network: Network, output: Path) -> None:
    runs = device.folder / "runs"
    slow = f'case "$1" in bench.py) echo >> {runs}; sleep 3;; esac; exec {sys.executable} "$@"'
    device.program("python3", slow)
    cutting = when(runs.exists, network.cut)
    with pytest.raises(LinkLostError, match="the link was lost"):
        bench_on_device(output, NAME, None, 1, Quiet())
    cutting.join()
    network.mend()
    second, third = Said(), Said()
    first = bench_on_device(output, NAME, None, 1, second)
    assert "a job of an earlier run is" in second.lines[0]
    assert first.latency[0].runs > 0
    assert len(runs.read_text().splitlines()) == 1
    bench_on_device(output, NAME, None, 1, third)
    assert "files sent" in third.lines[0]
    assert len(runs.read_text().splitlines()) == 2
    assert not list((device.home / ".slrc").glob("jobs/*"))
