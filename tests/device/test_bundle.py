"""Bundles: the same to the last byte, told when damaged, and nothing that leads out of their folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import systems

from slrc.device.build_bundle import RUNNER_FILE, choose_target
from slrc.device.bundle import BUNDLE_VERSION, Manifest, pack, read_bundle, unpack
from slrc.device.probe import DeviceInfo
from slrc.device.results import Block, Result, TimedRun
from slrc.device.ssh_device import caveats
from slrc.errors import DeviceError

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def archive(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tar of a bundle that is timed for a moment."""
    from slrc.device.build_bundle import REPORTED, make_bundle, sources_of

    folder = tmp_path_factory.mktemp("bundle")
    target = choose_target(output, None)
    run = REPORTED.model_copy(update={"seconds": 0.01})
    (folder / "made").mkdir()
    make_bundle(folder / "made", "small", target, sources_of(output, target), [run], threads=1)
    pack(folder / "made", folder / "model.tar")
    return folder / "model.tar"


@pytest.fixture
def unpacked(archive: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    unpack(archive, folder)
    return folder


def test_two_bundles_of_one_output_are_the_same_to_the_last_byte(output: Path, tmp_path: Path, run: Run) -> None:
    for name in ("a.tar", "b.tar"):
        result = run("bundle", output, "-o", tmp_path / name)
        assert result.code == 0, result.err
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_what_is_unpacked_is_what_was_packed(unpacked: Path, tmp_path: Path, archive: Path) -> None:
    manifest = read_bundle(unpacked)
    assert manifest.bundle_version == BUNDLE_VERSION
    assert {m.name for m in manifest.models} == {"dense", "compiled"}
    assert manifest.requires.opset == 21
    assert manifest.requires.onnxruntime == "1.18"
    assert manifest.requires.glibc
    pack(unpacked, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


def test_the_lines_say_what_the_manifest_says(unpacked: Path) -> None:
    manifest = read_bundle(unpacked)
    lines = [line.split("\t") for line in (unpacked / "run.txt").read_text().splitlines()]
    assert lines[0] == ["slrc-bundle", "1"]
    assert {(d, n) for kind, d, *n in lines if kind == "file" for n in n} == {(d, n) for n, d in manifest.files.items()}
    assert [line[1] for line in lines if line[0] == "model"] == [m.name for m in manifest.models]
    assert next(line for line in lines if line[0] == "input")[1:] == ["input", "float32", "1x8x24x24", "inputs/0.bin"]
    assert [line for line in lines if line[0] == "run"] == [["run", "0.01", "20", "10", "0", "dense", "compiled"]]


def bench(folder: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, folder / "bench.py"], capture_output=True, text=True, check=False)


def test_the_runner_proves_and_times(unpacked: Path) -> None:
    done = bench(unpacked)
    assert done.returncode == 0, done.stderr
    assert "compiled, output" in done.stdout
    assert "equal" in done.stdout
    result = Result.read(unpacked)
    assert all(o.passed for o in result.outputs)
    assert len(result.runs[0].kept) >= 1
    assert len(result.runs[0].blocks) >= 10
    assert result.timing(0, "compiled").ms > 0
    assert {"work_ms", "load", "governor"} <= result.before.keys() & result.after.keys()


@pytest.fixture(params=systems.PYTHONS)
def another_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python of another version with ONNX Runtime."""
    version = request.param
    name = f"SLRC_PYTHON{version.replace('.', '')}"
    python = os.environ.get(name) or shutil.which(f"python{version}")
    if python == "fetch":
        if reason := systems.why_not():
            pytest.skip(reason)
        root = tmp_path_factory.mktemp("python") / "root"
        try:
            systems.unpack(systems.PYTHONS[version], root)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"Python {version} cannot be fetched: {error.stderr.decode()[-200:] or error}")
        return str(systems.python_of(systems.PYTHONS[version], root))
    has = python and subprocess.run([python, "-c", "import onnxruntime"], capture_output=True, check=False)
    if not has or has.returncode:
        pytest.skip(f"no python{version} with onnxruntime: name one in {name}, or set it to `fetch`")
    return str(python)


def test_the_runner_passes_on_old_and_new_pythons(unpacked: Path, another_python: str) -> None:
    done = bench(unpacked, another_python)
    assert done.returncode == 0, done.stderr
    assert Result.read(unpacked).failure is None


def test_the_runner_is_written_for_python_3_8() -> None:
    compile(RUNNER_FILE.read_text(), "bench.py", "exec", dont_inherit=True)
    import ast

    ast.parse(RUNNER_FILE.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("name", ["compiled/model.onnx", "inputs/0.bin", "dense/output_0.bin"])
def test_a_flipped_byte_is_caught_there_and_here(unpacked: Path, name: str) -> None:
    content = bytearray((unpacked / name).read_bytes())
    content[len(content) // 2] ^= 1
    (unpacked / name).write_bytes(content)
    done = bench(unpacked)
    assert done.returncode == 2
    assert f"`{name}` is damaged" in done.stderr
    assert Result.read(unpacked).failure is not None
    (unpacked / "result.json").unlink()
    with pytest.raises(DeviceError, match=f"`{name}` is damaged"):
        read_bundle(unpacked)


def edited(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["requires"].update({k: v for k, v in values.items() if k in manifest["requires"]})
    manifest.update({k: v for k, v in values.items() if k not in manifest["requires"]})
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architecture": "riscv64"}, "the bundle is for riscv64"),
        ({"glibc": "9.9"}, "the kernels need 9.9"),
        ({"onnxruntime": "99.0"}, "the models need 99.0"),
        ({"bundle_version": 2}, "version 2"),
    ],
)
def test_a_bundle_for_another_machine_is_refused_there(unpacked: Path, change: dict[str, Any], word: str) -> None:
    edited(unpacked, **change)
    done = bench(unpacked)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b/c", "a\\b", "", "..", "a/../b"])
def test_names_that_lead_out_of_the_folder_are_refused(unpacked: Path, name: str) -> None:
    manifest = json.loads((unpacked / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (unpacked / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DeviceError, match="manifest"):
        read_bundle(unpacked)
    done = bench(unpacked)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_tar_holds_files_alone(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("evil")
    member.type, member.linkname = kind, "/etc/passwd"
    refused(tmp_path, member)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_a_tar_writes_nothing_elsewhere(tmp_path: Path, name: str) -> None:
    refused(tmp_path, tarfile.TarInfo(name))


def refused(place: Path, member: tarfile.TarInfo) -> None:
    with tarfile.open(place / "evil.tar", "w") as tar:
        tar.addfile(member, io.BytesIO())
    (place / "into").mkdir()
    with pytest.raises(DeviceError, match="is not a bundle"):
        unpack(place / "evil.tar", place / "into")
    assert sorted(p.name for p in place.iterdir()) == ["evil.tar", "into"]
    assert not list((place / "into").iterdir())


def test_an_unknown_file_and_a_missing_one_are_told(unpacked: Path) -> None:
    (unpacked / "more.bin").write_bytes(b"x")
    with pytest.raises(DeviceError, match=r"`more\.bin` is unknown"):
        read_bundle(unpacked)
    (unpacked / "more.bin").unlink()
    (unpacked / "inputs/0.bin").unlink()
    with pytest.raises(DeviceError, match=r"`inputs/0\.bin` is missing"):
        read_bundle(unpacked)


def test_a_manifest_names_what_there_is() -> None:
    base = {"model": "m", "slrc": "0", "target": "ort", "requires": {"opset": 21, "ir_version": 10}, "files": {}}
    run = {"models": ["x"], "seconds": 1, "least_rounds": 1}
    with pytest.raises(ValueError, match="a run names the model `x`"):
        Manifest.model_validate({**base, "models": [], "runs": [run]})
    model = {"name": "x", "file": "x/y", "inputs": [], "outputs": []}
    with pytest.raises(ValueError, match="not among the files"):
        Manifest.model_validate({**base, "models": [model]})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"result_version": 2}', "\xff", '{"result_version":1,"runtime":"","outputs":[],"why_not":{},'
     '"runs":[{"models":["a"],"blocks":[{"ms":{}}]}]}'],
)  # fmt: skip
def test_a_result_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(DeviceError, match=r"result\.json"):
        Result.read(tmp_path)


def test_blocks_that_drifted_do_not_count_unless_too_few_are_left() -> None:
    def run(*drift: str) -> TimedRun:
        return TimedRun(models=("a",), blocks=tuple(Block(ms={"a": (float(i),)}, drift=d) for i, d in enumerate(drift)))

    assert run("", "hot", "", "").ms("a") == [0.0, 2.0, 3.0]
    assert run("", "hot", "hot", "").ms("a") == [0.0, 1.0, 2.0, 3.0]
    info = DeviceInfo(host="pi", architecture="aarch64")
    empty = {"result_version": 1, "runtime": "", "outputs": (), "why_not": {}, "runs": ()}
    for governor, word in (("ondemand", "clocks are not locked: governor ondemand"), ("performance", "")):
        result = Result.model_validate({**empty, "before": {"governor": governor}, "after": {"throttled": "x=0x50000"}})
        told = caveats(info, result, run("", "hot", "", ""))
        assert "1 of 4 blocks rejected: hot" in told
        assert "it was throttled (x=0x50000)" in told
        assert (word in told) == bool(word)


@pytest.fixture
def runner() -> Iterator[ModuleType]:
    spec = spec_from_file_location("slrc_bench", RUNNER_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeRuntime:
    """Takes no time; what it is asked for it says took as many milliseconds as the call's number."""

    def rounds(self, calls: list[Callable[[], float]], run: dict[str, Any]) -> int:
        return int(run["least_rounds"])

    def turn(self, call: Callable[[], float]) -> list[float]:
        return [call()]


def test_blocks_in_which_the_clock_drifts_are_rejected_and_timed_again(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock falls to half in the third block, and rises again."""
    mhz = iter([*[2000.0] * 5, 1000.0, *[2000.0] * 100])
    monkeypatch.setattr(runner, "read_clocks", lambda: {"mhz": next(mhz)})
    run = {"models": ["a", "b"], "seconds": 0.0, "least_rounds": 8, "blocks": 4, "race": False}
    found = runner.time_run(FakeRuntime(), {"a": lambda: 2.0, "b": lambda: 1.0}, run)
    assert [bool(b["drift"]) for b in found["blocks"]] == [False, False, True, False, False]
    assert found["blocks"][2]["drift"] == "clock 2000 MHz, then 1000"


def test_where_all_blocks_drift_it_ends(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    degrees = iter(range(0, 10000, 10))
    monkeypatch.setattr(runner, "read_clocks", lambda: {"celsius": float(next(degrees))})
    run = {"models": ["a"], "seconds": 0.0, "least_rounds": 8, "blocks": 4, "race": False}
    found = runner.time_run(FakeRuntime(), {"a": lambda: 2.0}, run)
    assert len(found["blocks"]) == 8
    assert all("°C" in b["drift"] for b in found["blocks"])


def test_in_a_race_the_slow_one_takes_no_more_turns(runner: ModuleType) -> None:
    run = {"models": ["slow", "fast"], "seconds": 0.0, "least_rounds": 20, "blocks": 1, "race": True}
    found = runner.time_run(FakeRuntime(), {"slow": lambda: 9.0, "fast": lambda: 1.0}, run)
    assert len(found["blocks"][0]["ms"]["slow"]) == runner.RACE_ROUNDS


def test_errors_are_shares_of_the_largest_finite_value(runner: ModuleType) -> None:
    import numpy as np

    a = np.array([1.0, -4.0, np.inf, np.nan], dtype=np.float32)
    assert runner.errors(a, a) == (0.0, 0.0)
    assert runner.errors(a, a + np.array([0.5, 0, 0, 0], dtype=np.float32)) == (0.5, 0.125)
    assert runner.errors(a, np.array([1.0, -4.0, 0, np.nan], dtype=np.float32))[1] == np.inf
    assert runner.errors(np.zeros(0), np.zeros(0)) == (0.0, 0.0)
