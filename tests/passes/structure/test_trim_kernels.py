"""Kernels without the taps that read padding alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slrc.ir.program import capture
from slrc.passes.structure.trim_kernels import TrimKernels
from slrc.verify import compare, outputs_of

CASES: dict[str, tuple[nn.Conv2d, tuple[int, int], tuple[int, int]]] = {
    "a middle tap": (nn.Conv2d(4, 6, 3, padding=24, dilation=24), (12, 15), (1, 1)),
    "a row of taps": (nn.Conv2d(4, 6, 3, padding=12, dilation=12), (12, 15), (1, 3)),
    "five taps, of which three": (nn.Conv2d(4, 6, 5, padding=8, dilation=4), (6, 40), (3, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=9, dilation=9), (8, 8), (1, 1)),
    "in groups, without a bias": (nn.Conv2d(4, 8, 3, padding=7, dilation=7, groups=4, bias=False), (7, 7), (1, 1)),
    "all read": (nn.Conv2d(4, 6, 3, padding=11, dilation=11), (12, 15), (3, 3)),
    "more padding than taps": (nn.Conv2d(4, 6, 3, padding=20, dilation=12), (12, 12), (3, 3)),
    "only one side": (nn.Conv2d(4, 6, 3, stride=4, padding=1), (1, 1), (1, 1)),
    "less padding than taps": (nn.Conv2d(4, 6, 2, padding=3, dilation=4), (3, 3), (2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_taps_that_read_padding_go(name: str, net: Any) -> None:
    conv, size, kernel = CASES[name]
    torch.manual_seed(0)
    program = capture(net(lambda m, x: m.a(x).relu(), a=conv), (torch.randn(2, 4, *size),))
    result, modified = TrimKernels()(program)
    assert modified == (kernel != tuple(conv.kernel_size))
    assert tuple(result.tensors["a.weight"].shape[2:]) == kernel
    assert result.batch_is_dynamic
    compare("trimmed", *(outputs_of(p.module(), program.example_inputs) for p in (program, result)), 1e-6)
    assert not TrimKernels()(result).modified


def test_a_weight_that_is_read_elsewhere_stays(net: Any) -> None:
    model = net(lambda m, x: m.a(x) + m.a.weight.sum(), a=nn.Conv2d(4, 6, 3, padding=24, dilation=24))
    assert not TrimKernels()(capture(model, (torch.randn(2, 4, 12, 15),))).modified
