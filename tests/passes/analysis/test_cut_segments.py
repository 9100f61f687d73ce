"""Segments: each layer with what follows it, as programs of their own that compute what the whole does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.program import Program, capture
from slrc.passes.analysis.cut_segments import anchors, cut_segments
from slrc.passes.structure.fold_batch_norm import FoldBatchNorm
from slrc.verify import outputs_of


class Branches(nn.Module):
    """Two layers on one value, a residual, a view over the batch, a scale that is a constant product, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(2, 8, 1, 1))
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.norm(self.stem(x * 0.5)))
        y = y + self.left(y) * torch.sigmoid(self.right(y)) * (self.scale[0] * self.scale[1])
        t = y.flatten(2).transpose(1, 2)
        n = t.shape[0]
        q, k, v = self.qkv(t).view(n, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        return {"logits": self.head(a.transpose(1, 2).reshape(n, -1, 8).mean(1)), "map": y}


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(Branches().eval(), (torch.randn(1, 3, 4, 4),), "branches")


def test_every_layer_and_product_starts_a_segment(program: Program) -> None:
    segments = cut_segments(program)
    assert [s.anchor for s in segments] == [n.name for n in anchors(program)]
    assert len(segments) == 6
    assert sum(s.macs for s in segments) == program.macs


@pytest.mark.parametrize("fold", [False, True])
def test_segments_one_after_another_compute_what_the_whole_does(program: Program, fold: bool) -> None:
    if fold:
        program = FoldBatchNorm()(program).program
    known = list(program.example_inputs)
    for segment in cut_segments(program):
        # Whatever a segment takes was computed by those before it, or by the caller.
        for x in segment.inputs:
            assert any(x.shape == y.shape and torch.equal(x, y) for y in known), segment.anchor
        known += outputs_of(segment.program().module(), segment.inputs)
    for expected in outputs_of(program.module(), program.example_inputs):
        assert any(expected.shape == y.shape and torch.allclose(expected, y, atol=1e-6) for y in known)


def test_a_program_that_multiplies_nothing_has_no_segments() -> None:
    assert cut_segments(capture(nn.ReLU(), (torch.randn(1, 3),))) == []
