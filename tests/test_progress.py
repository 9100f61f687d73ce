"""What stands on a line of progress, for consoles of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slrc.progress import WIDE, Bars

NOTE = "loss 28.9939, 1.4 samples/s, 0:52:54 to go"


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("width", [80, WIDE, 1000])
def test_the_note_is_whole(width: int, is_terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    with Bars(console).task("gradual epoch 12/20", 128) as task:
        for _ in range(128):
            task.advance(NOTE)
    line = [line for line in file.getvalue().splitlines() if "gradual epoch 12/20" in line][-1]
    assert "128/128 0:00:0" in line
    assert NOTE in line
    assert ("━" in line) is (is_terminal and width >= WIDE)
