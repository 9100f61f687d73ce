"""The options of a `torch` target: the device, and the type that layers compute in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from slrc.backends.base import Target
from slrc.errors import BackendError

DEVICES: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Where a package runs, and the type that its layers compute in."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def precision(self) -> str:
        """The type's name, as in the manifest."""
        return str(self.dtype).removeprefix("torch.")


def parse_options(target: Target) -> Options:
    """Return a target's options.

    Raises:
        BackendError: one is unknown, or two exclude each other.
    """
    given = tuple(dict.fromkeys(target.options))
    devices, types = [d for d in DEVICES if d in given], [o for o in given if o in DTYPES]
    if unknown := [o for o in given if o not in (*devices, *types)]:
        raise BackendError(
            f"target `{target}`: unknown option `{unknown[0]}`: expected {', '.join((*DEVICES, *DTYPES))}",
            hint="such as `--target torch`, `--target torch:cuda` or `--target torch:cuda+bf16`",
        )
    for what, several in (("a package runs on one device", devices), ("a package has one precision", types)):
        if len(several) > 1:
            raise BackendError(f"target `{target}`: {what}, got {' and '.join(several)}", hint="name one, or none")
    return Options(devices[0] if devices else "cpu", DTYPES[types[0]] if types else torch.float32)
