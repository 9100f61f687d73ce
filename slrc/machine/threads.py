"""How the threads that torch computes with wait for each other."""

from __future__ import annotations

import os

SETTINGS = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
"""What a user may have chosen already."""


def wait_passively() -> None:
    """Let OpenMP's threads sleep where they would wait spinning, unless the user chose; it holds if torch comes later.

    Where another process takes a core, threads that spin keep it from the one that they wait for: training a small
    network then takes forty times as long.
    """
    if not SETTINGS & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
