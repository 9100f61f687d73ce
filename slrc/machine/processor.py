"""Which processor this is, and what it can do."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

CPUINFO = Path("/proc/cpuinfo")


class Processor(NamedTuple):
    """A processor's name, and its features as Linux names them, such as `avx512f` or `asimd`."""

    name: str
    features: frozenset[str]

    @property
    def has_vnni(self) -> bool:
        """Whether it has instructions that sum four products of bytes in 32 bits."""
        return bool({"avx512_vnni", "avx_vnni"} & self.features)


@lru_cache(maxsize=1)
def processor() -> Processor:
    """Return this machine's processor; where Linux does not say, asking for it takes a second, once."""
    found = _of_linux() if CPUINFO.is_file() else _of_any_system()
    return found if found.name else Processor(platform.processor() or platform.machine(), found.features)


def _of_linux() -> Processor:
    lines = CPUINFO.read_text().splitlines()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    features = fields.get("flags") or fields.get("Features") or ""
    return Processor(fields.get("model name", ""), frozenset(features.split()))


def _of_any_system() -> Processor:
    import cpuinfo

    found = cpuinfo.get_cpu_info()
    return Processor(found.get("brand_raw", ""), frozenset(found.get("flags", ())))
