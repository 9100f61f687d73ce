"""Running an ONNX model with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from slrc.errors import BackendError
from slrc.machine import denormals
from slrc.machine.processor import processor


class OnnxRuntimeRunner:
    """A session on the CPU.

    `threads` is the size of its pool, `None` for the runtime's choice; `kernels` a library of operators.
    """

    def __init__(self, path: Path, threads: int | None = None, kernels: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Else the threads of the session that ran last would take the cores from the one timed in turn with it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if not processor().has_vnni:
            # Else products of uint8 and int8 are summed in 16 bits, which overflow; with VNNI it only costs time.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            if kernels is not None:
                options.register_custom_ops_library(str(kernels))
            # The option is for the session's threads, but the first session sets the one that makes it, too.
            with denormals.unchanged():
                self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            raise BackendError(f"ONNX Runtime cannot load `{path}`: {str(error).splitlines()[0]}") from error
        self._inputs = [i.name for i in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run once."""
        return [torch.from_numpy(array) for array in self._session.run(None, self._feed(inputs))]

    def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
        """Return a call that runs on these inputs."""
        feed, run = self._feed(inputs), self._session.run
        return lambda: run(None, feed)

    def _feed(self, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        if len(inputs) != len(self._inputs):
            raise BackendError(f"the model takes {len(self._inputs)} inputs, got {len(inputs)}")
        return {n: x.detach().cpu().contiguous().numpy() for n, x in zip(self._inputs, inputs, strict=True)}
