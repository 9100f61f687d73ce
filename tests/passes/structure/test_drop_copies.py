"""Operators that only copy, dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.nodes import op_name
from slrc.ir.program import capture
from slrc.passes.structure.drop_copies import DropCopies
from slrc.verify import compare, outputs_of

F = nn.functional
CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "a pad by nothing": (lambda x: F.pad(x, (0, 0, 0, 0)).tanh(), ["tanh"]),
    "a pad": (lambda x: F.pad(x, (0, 1, 0, 0)).tanh(), ["pad", "tanh"]),
    "a crop": (lambda x: F.pad(x, (0, 0, -1, 0)).tanh(), ["pad", "tanh"]),
    "a slice of everything": (lambda x: x[:, :, :7].tanh(), ["tanh"]),
    "a slice of some": (lambda x: x[:, :, :6].tanh(), ["slice", "tanh"]),
    "a slice from the second on": (lambda x: x[:, 1:].tanh(), ["slice", "tanh"]),
    "every second": (lambda x: x[:, ::2].tanh(), ["slice", "tanh"]),
    "a roll": (lambda x: x.roll(3, 1).tanh(), ["index_select", "tanh"]),
    "a roll of two dimensions": (lambda x: x.roll((-2, 9), (1, -1)).tanh(), ["index_select", "index_select", "tanh"]),
    "a roll of the batch": (lambda x: x.roll(1, 0).tanh(), ["roll", "tanh"]),
    "a roll of the flat values": (lambda x: x.roll(1).tanh(), ["roll", "tanh"]),
    "a permutation undone": (lambda x: x.permute(2, 0, 1).permute(1, -1, 0).tanh(), ["tanh"]),
    "two permutations": (lambda x: x.permute(2, 0, 1).permute(2, 0, 1).tanh(), ["permute", "permute", "tanh"]),
    "one after the other": (lambda x: F.pad(x[:, :5], (0, 0)).roll(1, 2)[:, :, :7].tanh(), ["index_select", "tanh"]),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_copies_goes(name: str, net: Any) -> None:
    run, kept = CASES[name]
    torch.manual_seed(0)
    program = capture(net(lambda m, x: run(x)), (torch.randn(2, 5, 7),))
    result, modified = DropCopies()(program)
    compare("same", *(outputs_of(p.module(), program.example_inputs) for p in (program, result)), 0.0)
    before, after = ([op_name(n) for n in p.nodes if not op_name(n).startswith("sym_")] for p in (program, result))
    assert after == kept
    assert modified == (before != after)
    assert not DropCopies()(result).modified
