"""What becomes of memory that is freed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told")

SIZE, TIMES = 2**26, 8
PROGRAM = f"""
import resource, sys
import numpy as np
from slrc.machine.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones({SIZE}, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    np.ones({SIZE}, np.uint8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / {SIZE})
"""


def cleared(how: str, **environment: str) -> float:
    """How often the memory of an array was made anew, of `TIMES` arrays of `SIZE` bytes."""
    own = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_") and n != "GLIBC_TUNABLES"}
    own["NUMPY_MADVISE_HUGEPAGE"] = "0"
    run = [sys.executable, "-c", PROGRAM, how]
    return float(subprocess.run(run, capture_output=True, text=True, check=True, env=own | environment).stdout)


def test_memory_that_is_freed_is_used_again() -> None:
    assert cleared("usual") > TIMES - 1
    assert cleared("keep") < 1


def test_what_the_user_chose_stays() -> None:
    assert cleared("keep", MALLOC_MMAP_THRESHOLD_="1000000") > TIMES - 1
