"""Running a package of AOTInductor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slrc.errors import BackendError
from slrc.ir.quiet import quiet_torch

CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"
"""Else a package reads past the end of inputs that are smaller than those it was compiled for."""


class PackageRunner:
    """A loaded package on the CPU, with so many threads, or on the current GPU.

    Loading runs what the package holds: it must have been checked before.
    """

    def __init__(self, path: Path, device: str, inputs: int, threads: int | None = None) -> None:
        import torch._inductor

        os.environ[CHECK_INPUTS] = "1"
        self._path, self._device, self._count, self._threads = path, torch.device(device), inputs, threads
        try:
            with quiet_torch():
                self._package = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # whatever the loader makes of it
            raise BackendError(f"PyTorch cannot load `{path}`: {str(error).partition(chr(10))[0]}") from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run once.

        Raises:
            BackendError: an input has another shape or type than the package takes, or it failed.
        """
        placed = self._placed(inputs)
        with self._in_threads():
            return [x.cpu() for x in self._run(placed)]

    def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
        """Return a call that runs on these inputs and waits until the device is done."""
        placed = self._placed(inputs)

        def run() -> None:
            with self._in_threads():
                self._run(placed)
                if self._device.type == "cuda":
                    torch.cuda.synchronize()

        return run

    def _placed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if len(inputs) != self._count:
            raise BackendError(f"the model takes {self._count} inputs, got {len(inputs)}")
        return [x.detach().to(self._device).contiguous() for x in inputs]

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            with torch.no_grad():
                outputs: list[Tensor] = self._package.loader.boxed_run(list(inputs))
        except RuntimeError as error:
            given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in inputs)
            raise BackendError(
                f"`{self._path}` failed on inputs {given}", hint="it takes those that the model was compiled for"
            ) from error
        return outputs

    @contextmanager
    def _in_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
