"""Backends, one folder each. Factories are lazy: naming a backend imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable

from slrc.backends.base import Artifact, Availability, Backend, LoweredProgram, Runner, Target
from slrc.errors import BackendError


def _ort() -> Backend:
    from slrc.backends.ort import OnnxRuntime

    return OnnxRuntime()


def _tensorrt() -> Backend:
    from slrc.backends.tensorrt import TensorRT

    return TensorRT()


def _tensorrt_rtx() -> Backend:
    from slrc.backends.tensorrt import TensorRTRTX

    return TensorRTRTX()


def _torch() -> Backend:
    from slrc.backends.torch import TorchInductor

    return TorchInductor()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "ort": _ort,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
    "torch": _torch,
}


def get_backend(target: Target) -> Backend:
    """Return the backend of a target."""
    return BACKENDS[target.backend]()


def parse_target(text: str) -> Target:
    """Return the target that `text` names, such as `ort`, `ort+int8` or `tensorrt-rtx:sm86+fp16`.

    Raises:
        BackendError: there is no such backend, or it does not know an option.
    """
    parts = re.fullmatch(r"([^:+]*)(?:[:+](.*))?", text.strip())
    name, options = (parts[1], parts[2] or "") if parts else ("", "")
    if name not in BACKENDS:
        raise BackendError(
            f"unknown target `{text}`: expected one of {', '.join(BACKENDS)}",
            hint="see `slrc targets` for what can be emitted and run here",
        )
    target = Target(name, tuple(o for o in options.split("+") if o))
    get_backend(target).check_target(target)
    return target


__all__ = [
    "BACKENDS",
    "Artifact",
    "Availability",
    "Backend",
    "LoweredProgram",
    "Runner",
    "Target",
    "get_backend",
    "parse_target",
]
