"""The most memory that this process had."""

from __future__ import annotations

import contextlib
import sys


def peak_bytes() -> int | None:
    """Return the largest resident size so far; nothing where the system does not tell, as on Windows."""
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it is in KiB
    return None
