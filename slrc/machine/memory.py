"""The memory of this process: the most that it had, and what becomes of what it frees."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's `mallopt`."""


def peak_bytes() -> int | None:
    """Return the largest resident size so far; nothing where the system does not tell, as on Windows."""
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it is in KiB
    return None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next, in place of giving it back, unless the user chose.

    It gives back what is larger than 32 MB at once, and the system then clears such memory anew for each value of a
    large network: up to two fifths of the time of running one.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform == "linux" and not chosen:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_TRIM_THRESHOLD, -1)
            libc.mallopt(M_MMAP_MAX, 0)
