"""TuSimple's accuracy on images worked out by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROWS = np.arange(0, 400, 10.0)
UPRIGHT = np.full(40, 300.0)


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("common.tusimple_metric")


def shifted(lane: np.ndarray, by: float, points: int) -> np.ndarray:
    """Move the first points."""
    return np.where(np.arange(len(lane)) < points, lane + by, lane)


def test_points_within_twenty_pixels_are_right(metric: ModuleType) -> None:
    assert metric.score_image([UPRIGHT + 19], [UPRIGHT], ROWS) == (1, 0, 0)
    assert metric.score_image([UPRIGHT + 20], [UPRIGHT], ROWS) == (0, 1, 1)
    assert metric.score_image([shifted(UPRIGHT, 50, 6)], [UPRIGHT], ROWS) == (0.85, 0, 0)
    assert metric.score_image([shifted(UPRIGHT, 50, 7)], [UPRIGHT], ROWS) == (0.825, 1, 1)


def test_the_tolerance_grows_with_the_slant_and_the_width(metric: ModuleType) -> None:
    slanted = ROWS * np.sqrt(3)  # 60 degrees: the tolerance is twice as large
    assert metric.score_image([slanted + 39], [slanted], ROWS)[0] == 1
    assert metric.score_image([slanted + 41], [slanted], ROWS)[0] == 0
    assert metric.score_image([UPRIGHT + 9], [UPRIGHT], ROWS, width=640)[0] == 1
    assert metric.score_image([UPRIGHT + 11], [UPRIGHT], ROWS, width=640)[0] == 0


def test_what_is_not_there_must_not_be_found(metric: ModuleType) -> None:
    short = np.where(ROWS < 200, -2.0, 300.0)
    assert metric.score_image([short], [short], ROWS) == (1, 0, 0)
    assert metric.score_image([UPRIGHT], [short], ROWS)[0] == 0.5
    assert metric.score_image([], [short], ROWS) == (0, 0, 1)
    assert metric.score_image([UPRIGHT], [np.full(40, -2.0)], ROWS)[0] == 0


def test_more_than_two_lanes_too_many_count_as_none(metric: ModuleType) -> None:
    extra = [UPRIGHT + 100 * k for k in range(4)]
    accuracy, false, missed = metric.score_image(extra[:3], [UPRIGHT], ROWS)
    assert (accuracy, missed) == (1, 0)
    assert false == pytest.approx(2 / 3)
    assert metric.score_image(extra, [UPRIGHT], ROWS) == (0, 0, 1)


def test_of_five_lanes_the_worst_is_forgiven(metric: ModuleType) -> None:
    lanes = [UPRIGHT + 100 * k for k in range(5)]
    assert metric.score_image(lanes[:4], lanes, ROWS) == (1, 0, 0)
    assert metric.score_image(lanes[:3], lanes, ROWS) == (0.75, 0, 0.25)


def test_means_over_images(metric: ModuleType) -> None:
    images = [([UPRIGHT], [UPRIGHT], ROWS, 1280), ([], [UPRIGHT], ROWS, 1280)]
    assert metric.accuracy(images) == {"accuracy": 0.5, "false_positives": 0, "false_negatives": 0.5}
