"""Boxes: against torchvision's overlap and non-maximum suppression."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import ops

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from common.boxes import corners, intersection, iou, nms


def random_boxes(count: int, *shape: int) -> Tensor:
    centre, extent = torch.rand(*shape, count, 2) * 60, torch.rand(*shape, count, 2) * 40 + 1
    return corners(torch.cat([centre, extent], -1))


def test_corners_lie_around_the_centre() -> None:
    assert corners(torch.tensor([10.0, 20.0, 4.0, 6.0])).tolist() == [8, 17, 12, 23]


def test_overlap_is_torchvisions() -> None:
    torch.manual_seed(0)
    a, b = random_boxes(20), random_boxes(30)
    assert torch.equal(iou(a, b), ops.box_iou(a, b))
    assert intersection(a[:1], torch.tensor([[1000.0, 0.0, 1001.0, 1.0]])).item() == 0


def test_overlap_of_several_images_at_once() -> None:
    torch.manual_seed(0)
    a, b = random_boxes(5, 2), random_boxes(7, 2)
    assert torch.equal(iou(a, b), torch.stack([ops.box_iou(a[i], b[i]) for i in range(2)]))
    assert iou(a, b[:, :0]).shape == (2, 5, 0)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.45, 0.7, 1.0])
def test_suppression_is_torchvisions(threshold: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        boxes, classes = random_boxes(60), torch.randint(3, (60,))
        scores = torch.randint(20, (60,)) / 20  # with ties
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
        assert torch.equal(nms(boxes, scores, threshold, classes), ops.batched_nms(boxes, scores, classes, threshold))


def test_suppression_of_nothing() -> None:
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
