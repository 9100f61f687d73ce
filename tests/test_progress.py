"""What stands on a line of progress, for consoles of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slrc.progress import WIDE, Bars

NOTE = "loss 28.9939, 1.4 samples/s, 0:52:54 to go"


@pytest.mark.parametrize("width", [80, WIDE])
def test_the_note_is_whole(width: int) -> None:
    file = io.StringIO()
    with Bars(Console(file=file, width=width)).task("gradual epoch 12/20", 128) as task:
        for _ in range(128):
            task.advance(NOTE)
    (line,) = file.getvalue().splitlines()
    assert line.startswith("gradual epoch 12/20")
    assert "128/128 0:00:0" in line
    assert line.rstrip().endswith(NOTE)
    assert ("━" in line) is (width >= WIDE)
