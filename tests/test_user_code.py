"""Which line of a trace is the user's own."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import accelerate
import pytest
import torch

import slrc
from slrc.user_code import LONGEST, Line, first_line, reason_of, said_first, users_line

PACKAGES = Path(sysconfig.get_paths()["purelib"])
SLRC, PASS = slrc.__file__, str(Path(slrc.__file__).parent / "passes" / "base.py")
TORCH, LOADER, PYTHON = torch.__file__, accelerate.__file__, json.__file__
TIMM = str(PACKAGES / "timm" / "models" / "resnet.py")
MINE, OTHER = "/home/me/model.py", "loss.py"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([SLRC, MINE, OTHER, TORCH, PYTHON], OTHER),
        ([SLRC, MINE, TIMM, TORCH], MINE),
        ([SLRC, TIMM, TORCH, PYTHON], TIMM),
        ([SLRC, PASS, TORCH, LOADER, PYTHON, "<string>"], None),
        ([], None),
    ],
)
def test_the_line_to_show(files: list[str], found: str | None) -> None:
    line = users_line([Line(file, number, "code") for number, file in enumerate(files)])
    assert (line and line.file) == found


@pytest.mark.parametrize(
    ("error", "said", "line"),
    [
        (ValueError("\n  too wide\nby far"), "too wide", "ValueError: too wide"),
        (KeyError(), "", "KeyError"),
        (RuntimeError("x" * 999), "x" * 999, f"RuntimeError: {'x' * LONGEST} …"),
    ],
)
def test_what_an_error_says_first(error: Exception, said: str, line: str) -> None:
    assert said_first(error) == said
    assert first_line(error) == line
    assert reason_of(error) == (said or "KeyError")
