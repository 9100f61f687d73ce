"""Where timings and compiled kernels are kept from one run to the next."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Return `$SLRC_CACHE`, else the system's folder for caches: on Linux `~/.cache/slrc`.

    Where that cannot be written, it is a folder that goes with the process.
    """
    given = os.environ.get("SLRC_CACHE")
    folder = Path(given).expanduser() if given else user_cache_path("slrc", appauthor=False)
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
