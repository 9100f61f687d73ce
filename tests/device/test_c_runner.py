"""The runner for devices without Python: it finds what `bench.py` finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arm64
import numpy as np
import onnxruntime
import pytest
import torch
from rig import NAME
from torch import nn

import slrc
from slrc.backends import get_backend, parse_target
from slrc.device.build_bundle import Source, choose_target, make_bundle, sources_of
from slrc.device.build_runner import build_runner
from slrc.device.bundle import PROGRAM, Run, unpack
from slrc.device.results import Result
from slrc.errors import BackendError
from slrc.ir.program import capture
from slrc.kernels.build import family_of, find_compiler

FAMILY = family_of(os.uname().machine)
RUN = Run(models=("dense", "compiled"), seconds=0.0, least_rounds=8, blocks=4)


def library() -> Path:
    """The runtime that this Python's package brings."""
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        find_compiler(FAMILY)
    except BackendError as error:
        pytest.skip(error.message)


@pytest.fixture
def bundle(output: Path, tmp_path: Path) -> Path:
    """The bundle of a model with packed layers, dense and compiled."""
    target = choose_target(output, None)
    (tmp_path / "bundle").mkdir()
    make_bundle(tmp_path / "bundle", "m", target, sources_of(output, target), [RUN], threads=1, program=True)
    shutil.copytree(tmp_path / "bundle", tmp_path / "copy")
    return tmp_path / "copy"


def bench(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program in an empty environment."""
    command = [str(folder / PROGRAM), *map(str, arguments or (library(), folder))]
    return subprocess.run(command, capture_output=True, text=True, env={}, timeout=120, check=False)


def test_it_finds_the_same_numbers_as_the_runner_in_python(bundle: Path) -> None:
    done = bench(bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Result.read(bundle)
    (bundle / "result.json").unlink()
    subprocess.run([sys.executable, bundle / "bench.py"], check=True, capture_output=True)
    python = Result.read(bundle)
    assert found.runtime == python.runtime == onnxruntime.__version__
    # The kernels and the runtime are the same, and so are their outputs.
    assert [o.model_dump() for o in found.outputs] == [o.model_dump() for o in python.outputs]
    assert [o.model for o in found.outputs] == ["dense", "compiled"]
    for model in RUN.models:
        assert found.timing(0, model).ms == pytest.approx(python.timing(0, model).ms, rel=3.0)
    assert {len(block.ms["dense"]) for block in found.runs[0].blocks} == {2}
    assert all(block.before["work_ms"] > 0 for block in found.runs[0].blocks)


def test_each_line_that_it_prints_is_json(bundle: Path) -> None:
    lines = [json.loads(line) for line in bench(bundle).stdout.splitlines()]
    assert [(line["model"], line["passed"]) for line in lines if "passed" in line] == [
        ("dense", True),
        ("compiled", True),
    ]
    assert [line["model"] for line in lines if "median_ms" in line] == ["dense", "compiled"]


def test_the_kernels_are_loaded(bundle: Path) -> None:
    next((bundle / "compiled").glob("*.so")).write_bytes(b"no library")
    sums = (bundle / "run.txt").read_text().splitlines()
    (bundle / "run.txt").write_text("\n".join(line for line in sums if ".so" not in line or "model" in line))
    done = bench(bundle)
    assert done.returncode == 1
    assert "libslrc_kernels" in Result.read(bundle).why_not["compiled"]


def all_types_bundle(folder: Path, error: float = 0.0) -> Path:
    class Types(nn.Module):
        def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x * 3 + i
            return (
                y,
                y.half(),
                y.double(),
                y.to(torch.int8),
                y.to(torch.int32),
                y.long(),
                y > 0,
                y.abs().to(torch.uint8),
                y.sum(),
            )

    inputs = (torch.linspace(-9, 9, 12).reshape(3, 4), torch.tensor([1, 2, 3, -4]))
    program, target = capture(Types(), inputs, "types"), parse_target("ort:stock")
    (folder / "artifact").mkdir(parents=True)
    (folder / "bundle").mkdir()
    get_backend(target).lower(program, target, folder / "artifact")
    run = Run(models=("m",), seconds=0.0, least_rounds=2)
    manifest = make_bundle(
        folder / "bundle", "m", target, [Source("m", folder / "artifact", inputs)], [run], program=True
    )
    for output in manifest.models[0].outputs if error else ():
        assert output.file is not None
        path = folder / "bundle" / output.file
        values = np.fromfile(path, dtype=output.dtype)
        path.write_bytes(
            (~values if output.dtype == "bool" else values + np.array(error).astype(output.dtype)).tobytes()
        )
    return folder / "bundle"


def test_every_type_of_tensor_is_compared(tmp_path: Path) -> None:
    folder = all_types_bundle(tmp_path)
    done = bench(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(Result.read(folder).outputs) == 9


def test_every_type_of_tensor_that_differs_is_found(tmp_path: Path) -> None:
    folder = all_types_bundle(tmp_path, error=1.0)
    lines = (folder / "run.txt").read_text().splitlines()
    (folder / "run.txt").write_text("\n".join(line for line in lines if not line.startswith("file")))
    done = bench(folder)
    found = Result.read(folder)
    assert (done.returncode, found.runs) == (1, ())
    assert [output.passed for output in found.outputs] == [False] * 9


def _damage(folder: Path) -> None:
    data = bytearray((folder / "inputs/0.bin").read_bytes())
    data[0] ^= 1
    (folder / "inputs/0.bin").write_bytes(data)


def _rewrite(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "run.txt").write_text((folder / "run.txt").read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "arguments", "kind", "says"),
    [
        (_damage, (), "damaged", "`inputs/0.bin` is damaged"),
        (lambda folder: (folder / "dense/model.onnx").unlink(), (), "damaged", "`dense/model.onnx` is damaged"),
        (lambda folder: (folder / "run.txt").unlink(), (), "manifest", "run.txt cannot be read"),
        (_rewrite("slrc-bundle\t1", "slrc-bundle\t9"), (), "manifest", "version 9, this runner takes 1"),
        (_rewrite("dense/model.onnx", "../model.onnx"), (), "manifest", "is no file of the bundle"),
        (lambda folder: None, ("libm.so.6",), "runtime", "is not ONNX Runtime"),
        (lambda folder: None, ("missing.so",), "runtime", "`missing.so` cannot be loaded"),
    ],
)
def test_what_keeps_a_bundle_from_running_is_one_line(
    change: Callable[[Path], Any], arguments: tuple[str, ...], kind: str, says: str, bundle: Path
) -> None:
    change(bundle)
    done = bench(bundle, *(arguments or (library(),)), bundle)
    assert done.returncode == 2
    failure = Result.read(bundle).failure
    assert failure is not None
    assert failure.kind == kind
    assert says in failure.what
    assert done.stderr.splitlines()[0] == f"error: {failure.what}"


def test_a_bundle_file_brings_it_along_to_run(output: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    made = run("bundle", output, "-o", tmp_path / "model.tar", "--threads", 1, "--without-python")
    assert made.code == 0, made.err
    subprocess.run(["tar", "-xf", tmp_path / "model.tar", "-C", tmp_path], check=True)
    done = subprocess.run([tmp_path / PROGRAM, library()], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unpack(tmp_path / "model.tar", tmp_path / "again")


def test_the_program_is_made_for_another_processor_and_an_old_system(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    data = build_runner("aarch64", tmp_path).read_bytes()
    assert data[:4] == b"\x7fELF"
    assert int.from_bytes(data[18:20], "little") == 183  # EM_AARCH64
    assert b"GLIBC_2.29" not in data
    assert build_runner("aarch64", tmp_path) == next(tmp_path.iterdir())


def test_on_arm64_it_finds_the_same_outputs(arm64_root: Path, workload: slrc.Workload, tmp_path: Path) -> None:
    """The program, the kernels for NEON and the runtime of its wheel for arm64, under qemu."""
    target = parse_target("ort:aarch64")
    slrc.compile(
        workload, tmp_path / "build", pattern="block:8x1", sparsity=0.75, epochs=0, threads=1, target=str(target)
    )
    (tmp_path / "bundle").mkdir()
    sources = sources_of(tmp_path / "build", target)
    manifest = make_bundle(tmp_path / "bundle", "m", target, sources, [RUN], threads=1, program=True)
    assert manifest.requires.architecture == "aarch64"
    place = arm64_root / "tmp" / f"bundle-{os.getpid()}"
    there = next(arm64_root.glob("usr/local/lib/python3*/dist-packages/onnxruntime/capi/libonnxruntime.so*"))
    within = [Path("/") / path.relative_to(arm64_root) for path in (place / PROGRAM, there, place)]
    command = [sys.executable, arm64.__file__, arm64_root, "chroot", arm64.PLACE, *within]
    try:
        shutil.copytree(tmp_path / "bundle", place)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = Result.read(place)
    finally:
        shutil.rmtree(place)
    assert [(o.model, o.passed) for o in found.outputs] == [("dense", True), ("compiled", True)]
    assert found.outputs[1].error < 1e-5
    assert found.timing(0, "compiled").ms > 0


@pytest.fixture
def bare(device: Any) -> Any:
    """The device without Python, but with the library of ONNX Runtime in slrc's folder."""
    device.program("python3", "exit 127")
    (device.home / ".slrc").mkdir()
    shutil.copy(library(), device.home / ".slrc")
    yield device
    device.program("python3", f'exec {sys.executable} "$@"')


def test_a_device_without_python_is_measured_by_it(
    bare: Any, output: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert "without Python" in run("targets", "--device", NAME).out
    done = run("bench", output, "--device", NAME, "--threads", 1, "--json")
    assert done.code == 0, done.err
    (latency,) = json.loads(done.out)["latency"]
    assert latency["device"] == NAME
    assert latency["dense_ms"]["p50"] > 0
    for flags, says in (((), "the bundle has no runner without"), (("--without-python",), "")):
        assert run("bundle", output, "-o", tmp_path / "m.tar", "--threads", 1, *flags).code == 0
        of_file = run("deploy", tmp_path / "m.tar", "--device", NAME)
        assert (of_file.code, says in of_file.err) == (2 if says else 0, True), of_file.err
    deployed = run("deploy", output, "--device", NAME, "--threads", 1)
    assert deployed.code == 0, deployed.err
    assert (bare.home / ".slrc/models").exists()
