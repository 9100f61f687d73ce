"""Running an engine on a GPU, with torch's CUDA tensors as buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slrc.backends.tensorrt.log import message_log
from slrc.errors import BackendError

DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""By the names of `trt.DataType`, those that an engine's inputs and outputs can have and torch has too."""


class TensorRTRunner:
    """An engine on the current GPU.

    `trt` is the flavour's module; `inputs` and `outputs` are names, in the order of the program's flattened
    inputs and outputs. Work is done on a stream of its own: on the default one TensorRT synchronises more.

    Raises:
        BackendError: the engine was built for other GPUs or by another version, or the GPU's memory is full.
    """

    def __init__(self, path: Path, trt: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._trt, self._log = trt, message_log(trt)
        self._path, self._inputs, self._outputs = path, tuple(inputs), tuple(outputs)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self._log.clear()
        # TensorRT wants the runtime to outlive its engines.
        self._runtime = trt.Runtime(self._log.ilogger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{trt.__name__} {trt.__version__} cannot load `{path}`: {self._log.last_error}",
                hint="an engine runs on the GPUs and the version it was built for: its manifest names them",
            )
        self._names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        self._context = self._create_context()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run once; the batch may be any that the engine's profile holds.

        Raises:
            BackendError: an input has a shape or type that the engine does not take, or the run failed.
        """
        with self._on_stream():
            buffers = self._bind(self._context, inputs)
            self._execute(self._context)
            outputs = [buffers[name].cpu() for name in self._outputs]
            self._stream.synchronize()
        return outputs

    def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
        """Return a call that runs on these inputs and waits until the GPU is done.

        The call has a context and buffers of its own, so that other calls of this runner leave it as it is.
        """
        context = self._create_context()
        with self._on_stream():
            buffers = self._bind(context, inputs)
            self._stream.synchronize()

        # The context holds addresses only: the default argument keeps the tensors alive.
        def run(_buffers: Mapping[str, Tensor] = buffers) -> None:
            self._execute(context)
            self._stream.synchronize()

        return run

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Make the runner's stream current; inputs may still be on their way on the caller's."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _create_context(self) -> Any:
        self._log.clear()
        trt, engine = self._trt, self._engine
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX compiles a shape's kernels in the background while slower ones run: a measurement
            # would begin with those.
            config = engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise BackendError(
                f"`{self._path}` cannot run: no execution context: {self._log.last_error}",
                hint="the GPU's memory may be in use by others",
            )
        return context

    def _bind(self, context: Any, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Copy the inputs to the device, allocate the outputs, and tell the context where they are."""
        if len(inputs) != len(self._inputs):
            raise BackendError(f"the model takes {len(self._inputs)} inputs, got {len(inputs)}")
        self._log.clear()
        buffers: dict[str, Tensor] = {}
        for name, value in zip(self._inputs, inputs, strict=True):
            if name in self._names:  # an input that nothing reads may have been dropped
                buffers[name] = self._input(context, name, value)
        for name in self._outputs:
            buffers[name] = self._output(context, name)
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise BackendError(f"`{self._path}` cannot bind `{name}`: {self._log.last_error}")
        return buffers

    def _input(self, context: Any, name: str, value: Tensor) -> Tensor:
        expected, shape = self._dtype(name), tuple(value.shape)
        if value.dtype != expected:
            raise BackendError(
                f"input `{name}` is {expected} in the engine, got {value.dtype}",
                hint=f"convert it: `x.to({expected})`",
            )
        if not context.set_input_shape(name, shape):
            raise BackendError(
                f"input `{name}` cannot have shape {shape} in this engine: {self._log.last_error}",
                hint=self._shapes_hint(name),
            )
        # A new tensor even for one on the device: TensorRT wants aligned buffers, and a view may not be.
        return torch.empty(shape, dtype=expected, device=self._place(name)).copy_(value.detach())

    def _output(self, context: Any, name: str) -> Tensor:
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(
                f"output `{name}` has shape {shape}: its size depends on the values of the inputs",
                hint="use `--target ort` for such a model",
            )
        return torch.empty(shape, dtype=self._dtype(name), device=self._place(name))

    def _dtype(self, name: str) -> torch.dtype:
        data_type = self._engine.get_tensor_dtype(name).name
        if data_type not in DTYPES:
            raise BackendError(f"`{name}` is {data_type} in the engine, which torch does not have")
        return DTYPES[data_type]

    def _place(self, name: str) -> torch.device:
        """Return where a buffer must lie: inputs whose values are shapes are read on the host."""
        on_host = self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        return torch.device("cpu") if on_host else self._device

    def _shapes_hint(self, name: str) -> str:
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return f"it takes {shape}, as in the example inputs it was built with"
        smallest, _, largest = (tuple(s) for s in self._engine.get_tensor_profile_shape(name, 0))
        return f"it takes {smallest} to {largest}"

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise BackendError(f"`{self._path}` failed to run: {self._log.last_error}")
