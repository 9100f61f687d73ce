"""Where timings and compiled kernels are kept from one run to the next."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path


def cache_folder() -> Path:
    """Return `$SLRC_CACHE`, else `~/.cache/slrc`; where that cannot be written, a folder that goes with the process."""
    folder = Path(os.environ.get("SLRC_CACHE") or "~/.cache/slrc").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _passing_folder()
    return folder if os.access(folder, os.W_OK) else _passing_folder()


@lru_cache(maxsize=1)
def _passing_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="slrc-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
