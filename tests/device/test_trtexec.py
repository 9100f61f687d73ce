"""TensorRT on a device, driven by its trtexec, which a stub plays: see `stub_trtexec.py` for what its logs are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import slrc
from slrc.backends import get_backend, parse_target
from slrc.backends.engine_summary import EngineSummary
from slrc.device.build_bundle import Source, make_bundle
from slrc.device.bundle import Run
from slrc.device.results import Result
from slrc.device.runner import bench
from slrc.ir.program import capture

STUB = Path(__file__).parent / "stub_trtexec.py"
VERSIONS = {"8.5": "8502", "8.6": "8601", "10.3": "100300", "11.1": "110100"}
RUN = Run(models=("dense", "compiled"), seconds=0.0, least_rounds=2, blocks=3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Ran(NamedTuple):
    code: int
    result: Result
    calls: list[list[str]]
    said: str

    @property
    def builds(self) -> list[list[str]]:
        return [call for call in self.calls if any(flag.startswith("--onnx=") for flag in call)]


class Stub:
    """A folder with a `trtexec` in it, and one for engines."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.engines = folder / "programs", folder / "engines"
        self.programs.mkdir()
        shutil.copy(STUB, self.programs)
        shutil.copytree(STUB.parent / "trtexec_logs", self.programs / "trtexec_logs")
        (self.programs / "trtexec").write_text(
            f'#!/bin/sh\nexec {sys.executable} {self.programs}/stub_trtexec.py "$@"\n'
        )
        (self.programs / "trtexec").chmod(0o755)

    def run(self, bundle: Path, version: str, **settings: Any) -> Ran:
        (self.programs / "stub.json").write_text(json.dumps({"version": VERSIONS[version], **settings}))
        (self.programs / "calls.jsonl").write_text("")
        environment = {"PATH": f"{self.programs}:{os.environ['PATH']}", "SLRC_ENGINES": str(self.engines)}
        command = [sys.executable, "-S", str(bundle / "bench.py")]  # no packages: the standard library must do
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        calls = [json.loads(line) for line in (self.programs / "calls.jsonl").read_text().splitlines()]
        return Ran(done.returncode, Result.read(bundle), calls, done.stdout + done.stderr)


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the bundle of a small network for a target, once."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def make(text: str) -> Path:
        if text not in made:
            target, place, sources = parse_target(text), folder / text, []
            for seed, name in enumerate(("dense", "compiled")):
                torch.manual_seed(seed)
                program = capture(Net(), (torch.randn(2, 8, 6, 6),), "net")
                (place / name).mkdir(parents=True)
                get_backend(target).lower(program, target, place / name)
                sources.append(Source(name, place / name, program.flat_inputs()))
            (place / "links").mkdir()
            make_bundle(place / "links", "net", target, sources, [RUN])
            made[text] = place / "links"
        copy = folder / f"{text}-{len(list(folder.iterdir()))}"
        shutil.copytree(made[text], copy)
        return copy

    return make


BUILD = ["--sparsity=enable", "--skipInference", "--profilingVerbosity=detailed", "--dumpLayerInfo", "--verbose"]
SHAPES = ["--minShapes=x:1x8x6x6", "--optShapes=x:2x8x6x6", "--maxShapes=x:32x8x6x6"]


@pytest.mark.parametrize(
    ("version", "target", "flags"),
    [
        ("8.5", "tensorrt:8.5+fp16", [*BUILD, *SHAPES, "--fp16", "--buildOnly"]),
        ("8.5", "tensorrt:8.5", [*BUILD, *SHAPES, "--noTF32", "--buildOnly"]),
        ("8.6", "tensorrt:8.6+fp16", [*BUILD, *SHAPES, "--fp16"]),
        ("8.6", "tensorrt:8.6+int8", [*BUILD, *SHAPES, "--int8", "--noTF32"]),
        ("10.3", "tensorrt:10.3+fp16", [*BUILD, *SHAPES, "--stronglyTyped"]),
        ("10.3", "tensorrt:10.3", [*BUILD, *SHAPES, "--stronglyTyped", "--noTF32"]),
        ("10.3", "tensorrt:10.3+int8", [*BUILD, *SHAPES, "--stronglyTyped", "--noTF32"]),
        ("10.3", "tensorrt:10.3+dla", [*BUILD, "--fp16", "--useDLACore=0", "--allowGPUFallback"]),
        ("11.1", "tensorrt:10.3+fp16", [*BUILD, *SHAPES]),
        ("11.1", "tensorrt:11.1", [*BUILD, *SHAPES, "--noTF32"]),
    ],
)
def test_each_version_is_given_its_flags_and_its_log_is_read(version, target, flags, stub, bundle):
    ran = stub.run(bundle(target), version)
    assert (ran.code, ran.result.failure, ran.result.why_not) == (0, None, {}), ran.said
    assert ran.result.runtime == ".".join(
        str(int(p)) for p in bench.trt_version(f"[TensorRT v{VERSIONS[version]}]").split(".")
    )
    expected = set(flags) - ({"--skipInference"} if "--buildOnly" in flags else set())
    for build in ran.builds:
        assert {f for f in build if f.split("=")[0] not in ("--onnx", "--saveEngine", "--timingCacheFile")} == expected
    assert [output.passed for output in ran.result.outputs] == [True, True]
    assert ran.result.timing(0, "dense").ms == pytest.approx(2.01)
    assert ran.result.timing(0, "compiled").ms == pytest.approx(1.01)
    assert all(len(block.ms[name]) <= 500 for block in ran.result.runs[0].blocks for name in block.ms)
    summary = ran.result.engine("compiled")
    assert summary == EngineSummary(layers=2, precisions={"float16": 2}, sparse_eligible=3, sparse_chosen=1)
    is_dla = "dla" in target
    for call in ran.calls:
        if any(flag.startswith("--loadEngine=") for flag in call):
            assert ("--useDLACore=0" in call) == is_dla
            assert ("--shapes=x:2x8x6x6" in call) == (not is_dla)


def test_engines_run_in_turns_in_processes_of_their_own(stub, bundle):
    ran = stub.run(bundle("tensorrt:10.3+fp16"), "10.3")
    timed = [call for call in ran.calls if any(flag.startswith("--exportTimes=") for flag in call)]
    engines = [next(flag for flag in call if flag.startswith("--loadEngine=")) for call in timed]
    dense, compiled = engines[:2]
    blocks = len(ran.result.runs[0].blocks)
    assert engines == ([dense, compiled, compiled, dense] * blocks)[: 2 * blocks]
    assert all({"--noDataTransfers", "--useSpinWait", "--useCudaGraph"} <= set(call) for call in timed)


def test_an_engine_is_built_once_for_a_model_a_version_and_a_gpu(stub, bundle, monkeypatch):
    first = stub.run(bundle("tensorrt:8.6+fp16"), "8.6")
    assert len(first.builds) == 2
    assert not first.result.engines["compiled"]["cached"]
    again = stub.run(bundle("tensorrt:8.6+fp16"), "8.6")
    assert again.builds == []
    assert again.result.engines["compiled"]["cached"]
    assert again.result.engine("compiled") == first.result.engine("compiled")
    assert len(stub.run(bundle("tensorrt:8.6+fp16"), "10.3").builds) == 2
    assert len(stub.run(bundle("tensorrt:8.6"), "8.6").builds) == 2
    (stub.programs / "nvidia-smi").write_text("#!/bin/sh\necho Another GPU\n")
    (stub.programs / "nvidia-smi").chmod(0o755)
    assert len(stub.run(bundle("tensorrt:8.6+fp16"), "8.6").builds) == 2


@pytest.mark.parametrize("killed", [False, True])
def test_a_build_that_is_out_of_memory_is_tried_with_half_the_workspace(killed, stub, bundle):
    ran = stub.run(bundle("tensorrt:10.3+fp16"), "10.3", most_workspace_mib=1000, killed=killed)
    assert ran.code == 0, ran.said
    limits = [[flag for flag in call if flag.startswith("--memPoolSize=")] for call in ran.builds]
    # The device has 7620 MiB.
    assert limits == 2 * [[], *([f"--memPoolSize=workspace:{mib}"] for mib in (3810, 1905, 952))]
    assert ran.result.engines["dense"]["workspace_mib"] == 952
    assert "with a workspace of 952 MiB" in ran.said


@pytest.mark.parametrize("killed", [False, True])
def test_a_build_that_never_has_enough_memory_says_so_in_one_line(killed, stub, bundle):
    ran = stub.run(bundle("tensorrt:10.3+fp16"), "10.3", most_workspace_mib=1, killed=killed)
    assert ran.code == 2
    assert ran.result.failure is not None
    assert ran.result.failure.kind == "memory"
    assert "ran out of memory" in ran.result.failure.what
    assert "swap" in ran.result.failure.hint
    assert "Traceback" not in ran.said
    assert list(stub.engines.glob("*.engine")) == list(stub.engines.glob("*.partial")) == []


def test_what_the_builder_refuses_is_said_in_its_words(stub, bundle):
    ran = stub.run(bundle("tensorrt:8.6"), "8.6", refuses="No importer registered for op: Gelu")
    assert ran.code == 1
    assert "No importer registered for op: Gelu" in ran.result.why_not["dense"]
    assert len(ran.builds) == 2


def test_outputs_that_differ_are_found(stub, bundle):
    ran = stub.run(bundle("tensorrt:10.3"), "10.3", error=1.0)
    assert (ran.code, ran.result.runs) == (1, ())
    assert [output.passed for output in ran.result.outputs] == [False, False]


@pytest.mark.parametrize(
    ("target", "version", "says"),
    [
        ("tensorrt:10.3", "8.6", "TensorRT is 8.6.1 here, and the models were written for 10.0"),
        ("tensorrt", "10.3", "10.13"),
    ],
)
def test_a_version_older_than_the_file_is_refused(target, version, says, stub, bundle):
    ran = stub.run(bundle(target), version)
    assert ran.result.failure is not None
    assert says in ran.result.failure.what
    assert "--target tensorrt:" in ran.result.failure.hint
    assert ran.builds == []


def test_the_banner_of_each_version_is_read():
    for digits, version in (
        ("8502", "8.5.2"),
        ("100300", "10.3.0"),
        ("110100", "11.1.0"),
        ("11.1.0.106", "11.1.0.106"),
    ):
        assert bench.trt_version(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{digits}] # x") == version


def test_before_version_9_an_int64_input_is_sent_as_int32(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    (tmp_path / "0.bin").write_bytes(np.array([3, -1], dtype="<i8").tobytes())
    model = {"name": "m", "inputs": [{"name": "a:b", "dtype": "int64", "shape": [2], "file": "0.bin"}]}
    assert bench.input_flags(model, False) == ["--loadInputs='a:b':0.bin"]
    assert bench.input_flags(model, True) == ["--loadInputs='a:b':m.input_0.int32"]
    assert np.fromfile(tmp_path / "m.input_0.int32", dtype="<i4").tolist() == [3, -1]


def test_numbers_that_json_does_not_have_are_read(tmp_path):
    (tmp_path / "o.json").write_text(
        '[ { "name" : "y"\n  , "dimensions" : "3"\n  , "values" : [ nan, -inf, 1e-05 ]\n  } ]'
    )
    values = bench.read_exported(tmp_path / "o.json")[0]["values"]
    assert np.isnan(values[0])
    assert values[1:] == [-np.inf, 1e-05]


def test_engines_that_were_not_used_for_the_longest_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MOST_CACHED_BYTES", 10)
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / f"{name}.engine").write_bytes(b"12345678")
        os.utime(tmp_path / f"{name}.engine", (1000 - age, 1000 - age))
    bench.make_room(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new.engine"]


# Over ssh


@pytest.fixture
def jetson(device: Any) -> Any:
    """The device with the stub's trtexec, of TensorRT 10.3, on its PATH."""
    shutil.copy(STUB, device.programs)
    shutil.copytree(STUB.parent / "trtexec_logs", device.programs / "trtexec_logs", dirs_exist_ok=True)
    (device.programs / "stub.json").write_text(json.dumps({"version": "100300"}))
    device.program("trtexec", f'exec {sys.executable} {device.programs}/stub_trtexec.py "$@"')
    yield device
    (device.programs / "trtexec").unlink()


def test_a_compile_asks_the_device_for_its_tensorrt_and_brings_its_engines_back(jetson, workload, tmp_path, run):
    from rig import NAME

    options = {"pattern": "2:4", "method": "magnitude", "threads": 1, "device": NAME}
    report = slrc.compile(workload, tmp_path / "out", target="tensorrt:fp16", **options)
    (target,) = report.targets
    assert (target.target, target.not_run, target.precision) == ("tensorrt:10.3+fp16", "", "float16")
    assert target.engine is not None
    assert target.engine.compiled == EngineSummary(
        layers=2, precisions={"float16": 2}, sparse_eligible=3, sparse_chosen=1
    )
    assert report.latency[0].compiled_ms.p50 == pytest.approx(1.01)
    assert report.latency[0].speedup == pytest.approx(2.01 / 1.01)
    steps = {check.step for check in report.checks}
    assert "masked module = tensorrt:10.3+fp16, as ONNX on this CPU" in steps
    assert f"tensorrt:10.3+fp16, compiled: here = on {NAME}" in steps

    done = run("deploy", tmp_path / "out", "--device", NAME)
    assert done.code == 0, done.err
    assert "2:4: 3 eligible, 1 chosen" in done.out
    builds = (jetson.programs / "calls.jsonl").read_text().count("--onnx=")
    assert builds == 2  # those of the compile serve the deploy
    assert run("deploy", "--remove", "--device", NAME).code == 0
    assert jetson.files() == []


def test_forms_are_timed_by_the_devices_trtexec(jetson, workload, tmp_path):
    from rig import NAME

    options = {"pattern": "columns:2", "sparsity": 0.5, "method": "magnitude", "threads": 1, "device": NAME}
    report = slrc.compile(workload, tmp_path / "out", target="tensorrt", **options)
    forms = report.targets[0].forms
    assert forms is not None
    assert {"dense", "split:2"} <= set(forms.layers[0].ms)
    assert all(ms == pytest.approx(1.01) for layer in forms.layers for ms in layer.ms.values())
    assert forms.whole_ms


def test_a_device_without_tensorrt_or_with_an_older_one_is_refused_before_a_model_is_sent(
    device, workload, tmp_path, run
):
    from rig import NAME

    slrc.compile(workload, tmp_path / "out", pattern="2:4", method="magnitude", target="tensorrt:10.3", threads=1)
    done = run("deploy", tmp_path / "out", "--device", NAME, "--target", "tensorrt:10.3")
    assert done.code == 2
    assert "there is no trtexec: TensorRT is not installed" in done.err
    assert device.files() == []
