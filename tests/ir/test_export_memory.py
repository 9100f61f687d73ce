"""What is remembered between exports, and that torch is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import exported_program

from slrc.ir import export_memory
from slrc.ir.program import capture


def test_operators_are_listed_once_and_again_when_one_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    listings: list[int] = []
    own = exported_program._collect_all_valid_cia_ops

    def counted() -> set[Any]:
        listings.append(1)
        return own()

    monkeypatch.setattr(exported_program, export_memory.LISTING, counted)
    monkeypatch.setattr(export_memory, "_listed", {})
    for _ in range(2):
        capture(nn.Linear(2, 2), (torch.randn(1, 2),))
    assert len(listings) == 1
    assert exported_program._collect_all_valid_cia_ops is counted
    library = torch.library.Library("slrc_test_export_memory", "DEF")
    library.define("added(Tensor x) -> Tensor")
    capture(nn.Linear(2, 2), (torch.randn(1, 2),))
    assert len(listings) == 2
