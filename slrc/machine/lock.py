"""A lock on a file, which goes with the process that holds it, however that ends."""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout


def take_lock(path: Path) -> BaseFileLock | None:
    """Lock a file, which is made if it is not there; return `None` if another holds it. `release()` lets it go.

    Raises:
        OSError: the file cannot be written.
    """
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock
