"""Overlaps of rotated boxes against areas worked out by hand, and against counted points."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("common.rotated_boxes")


SQUARE = (0, 0, 2, 2, 0)
BY_HAND = {
    "itself": (SQUARE, SQUARE, 4.0),
    "a quarter turn": ((1, 2, 4, 2, 0), (1, 2, 2, 4, np.pi / 2), 8.0),
    "shifted": (SQUARE, (1, 0.5, 2, 2, 0), 1.5),
    "inside": ((0, 0, 6, 6, 0.3), (0.5, 0, 1, 2, 1.0), 2.0),
    "an octagon": (SQUARE, (0, 0, 2, 2, np.pi / 4), 8 * (2**0.5 - 1)),
    "a corner": (SQUARE, (2, 0, 2**0.5, 2**0.5, np.pi / 4), 0.0),
    "a corner reaches in": (SQUARE, (1.5, 0, 2**0.5, 2**0.5, np.pi / 4), 0.25),
    "a cross": ((0, 0, 10, 1, 0.2), (0, 0, 10, 2, 0.2 + np.pi / 2), 2.0),
    "apart": (SQUARE, (5, 0, 2, 2, 1), 0.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_areas_worked_out_by_hand(boxes: ModuleType, name: str) -> None:
    first, second, area = BY_HAND[name]
    a, b = np.array([first], dtype=float), np.array([second], dtype=float)
    assert boxes.overlaps(a, b)[0, 0] == pytest.approx(area, abs=1e-6)
    assert boxes.overlaps(b, a)[0, 0] == pytest.approx(area, abs=1e-6)


def test_random_areas_against_counted_points(boxes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    given = [np.column_stack([rng.uniform(-1, 1, (20, 2)), rng.uniform(0.5, 3, (20, 2)), rng.uniform(-4, 4, 20)])] * 2
    points = rng.uniform(-4, 4, (40_000, 2))

    def inside(box: np.ndarray) -> np.ndarray:
        turned = (points - box[:2]) @ np.array([[np.cos(box[4]), -np.sin(box[4])], [np.sin(box[4]), np.cos(box[4])]])
        return (np.abs(turned) <= box[2:4] / 2).all(1)

    first, second = given[0], given[1][::-1]
    counted = [64 * (inside(a) & inside(b)).mean() for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(boxes.intersection(first, second), counted, atol=0.15)


def test_corners_go_round(boxes: ModuleType) -> None:
    found = boxes.corners(np.array([[1.0, 2.0, 4.0, 2.0, np.pi / 2]]))
    np.testing.assert_allclose(found, [[[0, 4], [0, 0], [2, 0], [2, 4]]], atol=1e-12)


def test_worse_boxes_that_overlap_are_suppressed(boxes: ModuleType) -> None:
    given = np.array([[0, 0, 2, 2, 0], [0.2, 0, 2, 2, 0.1], [1.9, 0, 2, 2, 0], [9, 9, 2, 2, 0]], dtype=float)
    assert boxes.suppress(given, np.array([0.5, 0.9, 0.8, 0.1]), 0.2) == [1, 2, 3]
    assert boxes.suppress(given, np.array([0.5, 0.9, 0.8, 0.1]), 0.01) == [1, 3]
    assert boxes.suppress(np.zeros((0, 5)), np.zeros(0), 0.1) == []


def test_upright_overlaps_turn_boxes_to_the_nearest_axis(boxes: ModuleType) -> None:
    first = np.array([(0, 0, 4, 2, 0.3), (0, 0, 4, 2, 1.4)])
    second = np.array([(0, 0, 4, 2, -0.2), (10, 0, 4, 2, 0)])
    assert boxes.upright_overlaps(first, second) == pytest.approx(np.array([(1, 0), (4 / 12, 0)]))
