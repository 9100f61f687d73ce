"""The kernels, compiled once for all tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slrc.errors import BackendError
from slrc.kernels.build import build

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def library() -> Path:
    try:
        return build(int8=True)
    except BackendError as error:
        if "no C++ compiler" in error.message:
            pytest.skip(error.message)
        raise
