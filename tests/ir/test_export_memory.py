"""What is remembered between exports, and that torch is left as it was."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._C import DispatchKey
from torch._ops import OperatorBase
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


def test_kernels_are_registered_as_torch_registers_them() -> None:
    own, table = OperatorBase.py_impl, {}
    for name, quick in (("own", contextlib.nullcontext), ("plain", export_memory.registered_plainly)):
        operator = OperatorBase()
        operator._dispatch_cache[DispatchKey.CPU] = DispatchKey.Meta
        with quick():
            assert operator.py_impl(DispatchKey.CPU)(abs) is abs
            assert not operator._dispatch_cache
            with pytest.raises(AssertionError, match="mode"):
                operator.py_impl(DispatchKey.Python)(abs)
            with pytest.raises(AssertionError, match="DispatchKey"):
                operator.py_impl("CPU")(abs)  # type: ignore[arg-type]
        table[name] = operator.py_kernels
    assert table["own"] == table["plain"] == {DispatchKey.CPU: abs}
    assert OperatorBase.py_impl is own


def test_an_export_leaves_the_operators_as_they_were() -> None:
    linear = torch.ops.aten.linear.default
    before = dict(linear.py_kernels)
    program = capture(nn.Linear(2, 2), (torch.randn(1, 2),))
    with export_memory.remembered():
        program.exported.run_decompositions()
    assert linear.py_kernels == before
