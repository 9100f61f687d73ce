"""Shared fixtures: tiny models and workloads whose steps take milliseconds."""

from __future__ import annotations

import gc
import importlib
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._subclasses import fake_impls
from torch.export import exported_program
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc import cli
from slrc.measuring import timing


class Result(NamedTuple):
    """What a command printed, and the code that it ended with."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    gc.set_threshold(20_000, 20, 100)  # an export makes hundreds of thousands of objects


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards that a test has run the command line with `--debug`, which lets torch log."""
    monkeypatch.setenv("SLRC_DEBUG", "")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `slrc` with arguments, in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["slrc", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(autouse=True, scope="module")
def _imported_for_good() -> None:
    """Accelerate collects garbage before each phase: what was imported by then need not be searched every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _overrides_made_once() -> Iterator[None]:
    """Torch overrides a thousand operators anew at every export, for a quarter of what exporting a tiny model takes.

    `make fuzz` exports as torch does.
    """
    name = "_override_composite_implicit_decomp"
    override = getattr(exported_program, name, None)
    if override is None or "SLRC_FUZZ" in os.environ:
        yield
        return
    made: dict[frozenset[Any], dict[Any, tuple[Any, ...]]] = {}

    @contextmanager
    def once(table: dict[Any, Any]) -> Iterator[None]:
        key = frozenset(table.items())
        if len(set(table.values())) > 1:  # as that of an export to ONNX, whose functions are new every time
            with override(table):
                yield
            return
        before = {op: op.py_kernels for op in table}
        if key not in made or any(own != before[op] for op, (own, _, _) in made[key].items()):
            copies = {op: dict(kernels) for op, kernels in before.items()}
            with override(table):
                fakes = fake_impls.op_implementations_dict
                made[key] = {op: (own, dict(op.py_kernels), fakes.get(op)) for op, own in copies.items()}
                yield
            return
        for op, (_, kernels, fake) in made[key].items():
            op.py_kernels = kernels
            op._dispatch_cache.clear()
            if fake is not None and op not in fake_impls.op_implementations_dict:
                fake_impls.register_op_impl(op)(fake)
        try:
            yield
        finally:
            for op, kernels in before.items():
                op.py_kernels = kernels
                op._dispatch_cache.clear()
                fake_impls._deregister_op_impl(op)

    with mock.patch.object(exported_program, name, once):
        yield


class Finished(NamedTuple):
    code: int
    out: str
    err: str


class Started:
    """Python code in a process of its own that has torch and slrc imported already; its output goes to files."""

    SCRIPT = """
import os, sys
os.chdir({cwd!r})
for number, name in ((1, {out!r}), (2, {err!r})):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.update({environment!r})
{code}
"""

    def __init__(self, context: Any, code: str, cwd: Path, logs: Path, environment: dict[str, str]) -> None:
        self._files = [logs / "out", logs / "err"]
        out, err = map(str, self._files)
        script = self.SCRIPT.format(cwd=str(cwd), out=out, err=err, environment=environment, code=code)
        # A function of the standard library: those of tests have no name to import them by.
        self._process = context.Process(target=exec, args=(script, {"__name__": "__main__"}), daemon=True)
        self._process.start()

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def finish(self, timeout: float = 240) -> Finished:
        """Wait for the end; a signal's number is negative in the code, as that of `subprocess`."""
        self._process.join(timeout)
        if self.is_running:
            self.kill()
            pytest.fail(f"still running after {timeout} s")
        return Finished(self._process.exitcode, *(f.read_text() for f in self._files))


@pytest.fixture(scope="session")
def start_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Started]:
    """Starts Python code in a process forked from one that has imported what a compile needs, for seconds less each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_process"])
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()

    def start(code: str, cwd: Path, **environment: str) -> Started:
        return Started(context, code, cwd, tmp_path_factory.mktemp("process"), environment)

    return start


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a handful of runs only: what is tested is that there are figures, not which."""
    monkeypatch.setattr(timing, "PATIENCE", 0.0)


class TinyNet(nn.Module):
    """Images `(n, 4, 6, 6)` to three logits; every pattern fits `conv2` and `conv3`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(torch.relu(self.conv3(x)).mean(dim=(2, 3)))


@pytest.fixture
def tiny_net() -> Callable[[], nn.Module]:
    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return TinyNet()

    return make


@pytest.fixture
def tiny_data() -> TensorDataset:
    """48 images; the class is the brightest of the first three channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, 6, 6, generator=generator)
    y = x.mean(dim=(2, 3))[:, :3].argmax(1)
    return TensorDataset(x, y)


@pytest.fixture
def tiny_workload(tiny_net: Callable[[], nn.Module], tiny_data: TensorDataset) -> Callable[..., slrc.Workload]:
    """Makes a workload of `TinyNet`; keyword arguments replace its fields."""

    def make(**fields: Any) -> slrc.Workload:
        def evaluate(model: nn.Module) -> dict[str, float]:
            x, y = tiny_data.tensors
            return {"accuracy": (model(x).argmax(1) == y).float().mean().item()}

        given: dict[str, Any] = {
            "model": tiny_net(),
            "example_inputs": (tiny_data.tensors[0][:1],),
            "train_batches": DataLoader(tiny_data, batch_size=8, shuffle=True),
            "evaluate": evaluate,
        }
        return slrc.Workload(**{**given, **fields})

    return make


WORKLOAD_FILE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
import slrc.measuring.timing

slrc.measuring.timing.PATIENCE = 0.0
torch.set_num_threads(1)


def workload():
    torch.manual_seed(0)
    x = torch.randn(48, 4, 6, 6)
    y = x.mean(dim=(2, 3))[:, :3].argmax(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )
    return slrc.Workload(
        model=model,
        example_inputs=(x[:1],),
        train_batches=DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
        evaluate=lambda m: {"accuracy": (m(x).argmax(1) == y).float().mean().item()},
    )
"""


@pytest.fixture(scope="session")
def workload_source() -> str:
    """The text of a workload file of a tiny convolutional network."""
    return WORKLOAD_FILE


@pytest.fixture
def import_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports an example by its name, with an empty data folder and a cache of its own."""
    for name in ("SLRC_MODEL", "SLRC_SUBSET", "SLRC_DENSE_EPOCHS", "SLRC_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module


@pytest.fixture
def write_coco_pack(tmp_path: Path) -> Callable[[int], None]:
    """Writes `data/coco128.npz` of so many images a split: bright rectangles on dark, of class 1 if wide, else 0."""

    def write(count: int) -> None:
        side, generator = 64, np.random.default_rng(0)
        pack: dict[str, np.ndarray] = {}
        for split in ("train", "val"):
            files, boxes = [], []
            for _ in range(count):
                pixels = generator.integers(40, 70, (side, side, 3), np.uint8)
                width, height = [(36, 18), (18, 36)][generator.integers(2)]
                left, top = generator.integers(0, side - width), generator.integers(0, side - height)
                pixels[top : top + height, left : left + width] = 220
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=95)
                files.append(file.getvalue())
                boxes.append([width > height, left + width / 2, top + height / 2, width, height])
            pack[f"{split}_img"] = np.frombuffer(b"".join(files), np.uint8)
            pack[f"{split}_offset"] = np.cumsum([0, *map(len, files)])
            pack[f"{split}_box"] = (np.array(boxes) / [1, *[side] * 4]).astype(np.float32)
            pack[f"{split}_box_image"] = np.arange(count)
        (folder := tmp_path / "data").mkdir(exist_ok=True)
        np.savez(folder / "coco128.npz", **pack)

    return write
