"""The runner of TensorRT engines, on an engine and a stream that need no GPU."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slrc.backends.tensorrt.run import TensorRTRunner
from slrc.errors import BackendError


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx")


class FakeContext:
    """Doubles `x`, of shape (batch, 3), into `y`, in the host's memory."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        size = int(np.prod(self.shape))
        x, y = (np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.addresses[n])) for n in ("x", "y"))
        y[:] = 2 * x
        return True


class FakeEngine:
    """Says that its tensors lie on the host, so that the runner's buffers need no GPU."""

    num_io_tensors = 2

    def __init__(self, trt) -> None:
        self._trt = trt

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_dtype(self, name: str):
        return self._trt.DataType.FLOAT

    def get_tensor_location(self, name: str):
        return self._trt.TensorLocation.HOST

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (32, 3)]

    def create_runtime_config(self):
        return SimpleNamespace()

    def create_execution_context(self, runtime_config=None) -> FakeContext:
        return FakeContext()


@pytest.fixture
def runner(trt, tmp_path, monkeypatch):
    """A runner whose engine and stream are fakes with the methods of the real ones."""
    for fake, real in ((FakeContext, trt.IExecutionContext), (FakeEngine, trt.ICudaEngine)):
        assert all(hasattr(real, name) for name in vars(fake) if not name.startswith("_"))
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    engine = FakeEngine(trt)
    monkeypatch.setattr(trt, "Runtime", lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine))
    (tmp_path / "model.engine").write_bytes(b"engine")
    return TensorRTRunner(tmp_path / "model.engine", trt, ["x", "unused"], ["y"])


def test_the_runner_binds_by_name_and_takes_any_batch(runner):
    unused = torch.zeros(1)
    for batch in (2, 5):
        x = torch.randn(3, batch).T  # not contiguous
        assert torch.equal(runner(x, unused)[0], 2 * x)


def test_a_prepared_call_keeps_its_inputs(runner):
    x, unused = torch.randn(2, 3), torch.zeros(1)
    call = runner.prepare(x, unused)
    runner(torch.randn(4, 3), unused)
    call()
    call()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((torch.zeros(33, 3), torch.zeros(1)), r"cannot have shape \(33, 3\)(.|\n)*\(1, 3\) to \(32, 3\)"),
        ((torch.zeros(2, 3).double(), torch.zeros(1)), "is torch.float32 in the engine, got torch.float64"),
        ((torch.zeros(2, 3),), "takes 2 inputs, got 1"),
    ],
)
def test_the_runner_says_what_it_does_not_take(runner, inputs, says):
    with pytest.raises(BackendError, match=says):
        runner(*inputs)
