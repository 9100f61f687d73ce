"""Each way to a device that fails: one line of what and where, what to do, no trace, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
from rig import NAME, Device, free_port, why_no_sshd

import slrc
from slrc.device.build_bundle import RUNNER_FILE
from slrc.device.failures import LinkLostError, job_failure, ssh_failure
from slrc.device.ssh import Connection
from slrc.errors import DeviceError

Run = Callable[..., Any]


@contextmanager
def programs(device: Device, **scripts: str) -> Iterator[None]:
    """Replace programs of the device."""
    kept = {name: (device.programs / name).read_text() for name in scripts if (device.programs / name).exists()}
    for name, script in scripts.items():
        device.program(name, script)
    try:
        yield
    finally:
        for name in scripts:
            if name in kept:
                (device.programs / name).write_text(kept[name])
            else:
                (device.programs / name).unlink()


def fails(run: Run, device: Device, output: Path, *words: str) -> None:
    result = run("deploy", output, "--device", NAME, "--threads", 1)
    error, _, hint = result.err.partition("\nhint: ")
    line = [x for x in error.splitlines() if x.startswith("error: ")]
    assert result.code == 2, result.err
    assert len(line) == 1
    assert "Traceback" not in result.err
    assert hint.strip()
    assert "\n" not in hint.strip()
    for word in (NAME, *words):
        assert word in result.err
    assert device.files() == []


def test_a_key_that_is_refused(device: Device, output: Path, run: Run) -> None:
    device.write_config(IdentityFile=device.folder / "host_key")
    fails(run, device, output, "refused the key", "ssh-copy-id")


def test_nothing_listens(device: Device, output: Path, run: Run) -> None:
    device.write_config(Port=free_port())
    fails(run, device, output, "nothing listens")


def test_an_unknown_host(device: Device, output: Path, run: Run) -> None:
    device.write_config(HostName="nowhere.invalid")
    fails(run, device, output, "no host of that name")


def test_a_host_key_that_is_not_known(device: Device, output: Path, run: Run) -> None:
    device.known.write_text("")
    fails(run, device, output, "host key is not known", "by hand")


def test_a_host_key_that_changed(device: Device, output: Path, run: Run) -> None:
    device.trust("user_key")
    fails(run, device, output, "not the one that is known", "ssh-keygen -R")


def test_no_runtime(device: Device, output: Path, run: Run) -> None:
    with programs(device, python3=f'exec {sys.executable} -S "$@"'):
        fails(run, device, output, "no ONNX Runtime", "No module named", "pip install onnxruntime")


def test_a_compile_for_a_device_that_runs_nothing_ends_before_it_trains(
    device: Device, workload: slrc.Workload, tmp_path: Path
) -> None:
    with (
        programs(device, python3=f'exec {sys.executable} -S "$@"'),
        pytest.raises(DeviceError, match=r"target `ort` cannot run there: .*cannot import it: Module"),
    ):
        slrc.compile(workload, tmp_path / "build", device=NAME)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DeviceError, match="cannot run there: it is for aarch64, and `device` is x86_64"):
        slrc.compile(workload, tmp_path / "build", device=NAME, target="ort:aarch64")


def test_a_runtime_for_newer_processors(device: Device, output: Path, run: Run) -> None:
    with programs(device, python3="kill -4 $$"):
        fails(run, device, output, "illegal instruction")


def test_a_runtime_that_is_too_old(device: Device, output: Path, run: Run) -> None:
    old = 'case "$*" in *onnxruntime*) echo ort 1.16.3;; *) echo 3.8.10;; esac'
    with programs(device, python3=old):
        fails(run, device, output, "onnxruntime is 1.16.3", "needs 1.18")


def test_a_glibc_that_is_too_old(device: Device, output: Path, run: Run) -> None:
    with programs(device, getconf="echo glibc 2.1"):
        fails(run, device, output, "its glibc is 2.1", "ort:stock")


def test_another_architecture(device: Device, output: Path, run: Run) -> None:
    with programs(device, uname='case "$1" in -m) echo aarch64;; *) exec /usr/bin/uname "$@";; esac'):
        result = run("deploy", output, "--device", NAME)
        assert "has no target for aarch64" in result.err
        assert "--target ort:aarch64" in result.err
        forced = run("deploy", output, "--device", NAME, "--target", "ort")
        assert "the bundle is for x86_64, and the device is aarch64" in forced.err
    assert device.files() == []


def test_a_disk_that_fills_up_on_the_way(device: Device, output: Path, run: Run) -> None:
    full = 'cat > /dev/null; echo "tar: store: Cannot write: No space left on device" >&2; exit 2'
    with programs(device, tar=full):
        fails(run, device, output, "copying", "disk is full", "--remove")


def test_a_run_that_is_killed(device: Device, output: Path, run: Run) -> None:
    killed = f'case "$1" in bench.py) kill -9 $$;; esac; exec {sys.executable} "$@"'
    with programs(device, python3=killed):
        fails(run, device, output, "running", "killed it", "memory")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_timing: None) -> Iterator[Device]:
    """A device whose home is a file system of 700 KiB."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a small disk is mounted by root, with unshare")
    if reason := why_no_sshd():
        pytest.skip(reason)
    home = tmp_path / "device" / "home"
    mount = f'mount -t tmpfs -o size=700k none {home} && exec "$@"'
    device = Device(tmp_path / "device", python=sys.executable, wrapper=("unshare", "-m", "sh", "-c", mount, "-"))
    monkeypatch.setenv("SLRC_SSH_CONFIG", str(device.config))
    device.start()
    yield device
    device.stop()


def test_a_disk_that_is_full_is_told_before_the_copy_and_in_it(small_disk: Device, output: Path, run: Run) -> None:
    fails(run, small_disk, output, "its disk is full", "are free")
    lies = "echo; echo none 99999999 0 99999999 0% /"
    large = output.parent / "large"
    shutil.copytree(output, large, dirs_exist_ok=True)
    model = onnx.load(large / "ort/dense/model.onnx")
    model.doc_string = "x" * 2**20
    onnx.save(model, large / "ort/dense/model.onnx")
    with programs(small_disk, df=lies):
        fails(run, small_disk, large, "copying", "disk is full")
    with Connection(NAME) as connection:
        assert connection.run("ls -A").out == b""


def test_a_layer_that_computes_something_else_is_named(device: Device, output: Path, run: Run, tmp_path: Path) -> None:
    """Its blocks are others where the runtime has the kernels: what the file means stays as it was."""
    runner = RUNNER_FILE.read_text()
    spoilt = runner.replace('        if model["kernels"]:', '        spoil(model)\n        if model["kernels"]:')
    assert spoilt != runner
    spoilt += SPOIL
    spoilt = spoilt.replace('\nif __name__ == "__main__":\n    sys.exit(main())\n', "") + "\nsys.exit(main())\n"
    path = tmp_path / "bench.py"
    path.write_text(spoilt)
    there = f"cp {path} spoilt.py; exec {sys.executable} spoilt.py"
    script = f'case "$1" in bench.py) {there};; esac; exec {sys.executable} "$@"'
    with programs(device, python3=script):
        fails(run, device, output, "of the compiled model differs", "layer `4.weight`, form packed:")


SPOIL = '''

def spoil(model):
    """Change the weights of one packed layer, as kernels that are wrong for it would."""
    import numpy
    import onnx

    if model["name"] != "dense":
        path = HERE / model["file"]
        loaded = onnx.load(str(path))
        for tensor in loaded.graph.initializer:
            if tensor.name == "4.values":
                values = onnx.numpy_helper.to_array(tensor) * 1.5
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        path.unlink()
        onnx.save(loaded, str(path))
'''


@pytest.mark.parametrize("host", ["-oProxyCommand=true", "", "a b", "a\nb"])
def test_a_host_that_is_an_option_or_none_is_refused(host: str) -> None:
    with pytest.raises(DeviceError, match="expected a host"):
        Connection(host)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("ssh: connect to host x port 22: Network is unreachable", "does not answer"),
        ("ssh: connect to host x port 22: Connection timed out", "does not answer"),
        ("/x/config: line 1: Bad configuration option: nope", "configuration cannot be read"),
    ],
)
def test_what_ssh_says_is_told_in_one_line(said: str, word: str) -> None:
    error = ssh_failure("pi", said)
    assert word in error.message
    assert "`pi`" in error.message
    assert not isinstance(error, LinkLostError)
    assert error.hint


def test_a_lost_link_is_told_from_one_that_never_was() -> None:
    assert isinstance(ssh_failure("pi", "Timeout, server 10.0.0.7 not responding."), LinkLostError)
    assert isinstance(ssh_failure("pi", ""), LinkLostError)


@pytest.mark.parametrize("said", ["Connection timed out", "Connection refused", "No route to host"])
def test_a_device_that_was_reached_and_answers_no_more_is_a_lost_link(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its job would be dropped as one that failed."""
    ssh, once = tmp_path / "ssh", tmp_path / "once"
    refuse = f"echo 'ssh: connect to host 10.0.0.7 port 22: {said}' >&2; exit 255"
    ssh.write_text(f"#!/bin/sh\n[ -e {once} ] || {{ {refuse}; }}\nrm {once}; echo; echo slrc-begins; echo there\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Connection("pi") as connection:
        with pytest.raises(DeviceError) as unreached:
            connection.run("true")
        once.touch()
        assert connection.run("true").out == b"there\n"
        with pytest.raises(LinkLostError, match=rf"the link was lost \(.*{said}\)"):
            connection.run("true")
    assert not isinstance(unreached.value, LinkLostError)


@pytest.mark.parametrize(
    ("code", "said", "word"),
    [
        (1, "x.so: /lib/libc.so.6: version `GLIBC_2.38' not found (required by x.so)", "glibc is too old"),
        (127, "sh: ./run: cannot execute: required file not found", "cannot run what was sent"),
        (137, "", "killed it"),
        (132, "", "illegal instruction"),
        (1, "[W] Skipping tactic 3 due to insufficient memory on requested size", "ran out of memory"),
        (7, "\x1b[31mred\x1b[0m\n", "status 7"),
    ],
)
def test_what_fails_there_is_told_in_one_line(code: int, said: str, word: str) -> None:
    error = job_failure("pi", "running", code, said)
    assert word in error.message
    assert error.message.isprintable()
