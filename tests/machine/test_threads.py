"""Torch's threads sleep where they wait, as OpenMP itself tells when it is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from slrc.machine.threads import SETTINGS, wait_passively


def spins(**given: str) -> list[int]:
    """How often a thread looks before it sleeps, in a process that imports slrc and then torch."""
    own = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = {**own, "OMP_DISPLAY_ENV": "VERBOSE", **given}
    command = [sys.executable, "-c", "import slrc, torch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(count) for count in re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\d+)'", done.stderr)]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP comes with torch for Linux only")
def test_threads_sleep_at_once_unless_the_user_says_otherwise() -> None:
    assert set(spins()) == {0}
    assert min(spins(OMP_WAIT_POLICY="ACTIVE")) > 0


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_users_own_setting_stays_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1000")
    wait_passively()
    assert {other: os.environ[other] for other in SETTINGS if other in os.environ} == {name: "1000"}
