"""KITTI's average precision on frames worked out by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("common.kitti_metric")


def line(name: str = "Car", at: float = 0.0, top: float = 100, height: float = 60, **fields: Any) -> str:
    """A car of 4 by 2 by 1.5 m at `x = at`, with a box in the image of its own, 100 pixels wide."""
    left = 200 + 30 * at
    given = {"truncation": 0, "occlusion": 0, "yaw": 0.0, "y": 1.6, "score": ""} | fields
    box = f"{left} {top} {left + 100} {top + height}"
    start = f"{name} {given['truncation']} {given['occlusion']} 0 {box}"
    return f"{start} 1.5 2 4 {at} {given['y']} 20 {given['yaw']} {given['score']}"


def ap(
    metric: ModuleType, true: list[str], found: list[str], level: int = 1, kind: str = "space", **more: Any
) -> float:
    labels, results = (metric.Objects.parse("\n".join(lines)) for lines in (true, found))
    return metric.average_precision([labels], [results], "Car", level, kind, **more)


def test_reads_a_line_of_labels(metric: ModuleType) -> None:
    text = "Pedestrian 0.25 1 -0.20 712.40 143.00 810.73 307.92 1.89 0.48 1.20 1.84 1.47 8.41 0.01\n\n"
    one = metric.Objects.parse(text)
    assert (one.names.tolist(), one.truncation[0], one.occlusion[0]) == (["Pedestrian"], 0.25, 1)
    assert one.boxes.tolist() == [[712.40, 143.00, 810.73, 307.92]]
    assert one.sizes.tolist() == [[1.89, 0.48, 1.20]]
    assert one.places.tolist() == [[1.84, 1.47, 8.41]]
    assert (one.yaws.tolist(), one.scores.tolist()) == ([0.01], [0])
    assert len(metric.Objects.parse("")) == 0


@pytest.mark.parametrize("kind", ["image", "ground", "space"])
def test_all_found_and_nothing_found(metric: ModuleType, kind: str) -> None:
    many = [line(at=10.0 * k, score=0.5 + k / 100) for k in range(41)]
    assert ap(metric, many, many, kind=kind) == 1
    assert ap(metric, many, many, kind=kind, recalls=11) == 1
    assert ap(metric, many, [], kind=kind) == 0


def test_half_found_reaches_half_of_the_recall(metric: ModuleType) -> None:
    many = [line(at=10.0 * k, score=0.5 + k / 100) for k in range(40)]
    assert ap(metric, many, many[:20]) == pytest.approx(19 / 40)
    assert ap(metric, many, many[:20], recalls=11) == pytest.approx(5 / 11)


def test_false_detections_cost_precision_below_their_score(metric: ModuleType) -> None:
    many = [line(at=10.0 * k, score=0.9 - k / 100) for k in range(40)]
    wrong = [line(at=1000 + 10.0 * k, score=0.1) for k in range(40)]
    assert ap(metric, many, many + wrong) == ap(metric, many, many)
    best = [line(at=1000.0, score=0.99)]
    # The precision at the i-th of 40 thresholds is i / (i + 1), and after taking the best of what follows 40 / 41.
    assert ap(metric, many, many + best) == pytest.approx(ap(metric, many, many) * 40 / 41)


def test_overlaps_by_hand(metric: ModuleType) -> None:
    def overlap(kind: str, **moved: Any) -> float:
        first, second = metric.Objects.parse(line()), metric.Objects.parse(line(**moved))
        return float(metric._OVERLAPS[kind](first, second)[0, 0])

    assert overlap("space") == overlap("ground") == overlap("image") == pytest.approx(1)
    assert overlap("ground", at=1.0) == pytest.approx(3 / 5)  # 3 of 4 metres along its length
    assert overlap("space", at=1.0) == pytest.approx(3 / 5)
    assert overlap("space", y=1.1) == pytest.approx(1 / 2)  # 1 of 1.5 metres of its height
    assert overlap("ground", y=1.1) == pytest.approx(1)
    assert overlap("ground", yaw=np.pi / 2) == pytest.approx(4 / 12)
    assert overlap("image", at=1.0) == pytest.approx(70 / 130)


def test_a_turn_goes_the_way_of_the_cameras_axis(metric: ModuleType) -> None:
    """A yaw around y, which points down, turns x towards −z."""
    turned = metric.Objects.parse(line(yaw=0.5)).on_ground()
    corner = importlib.import_module("common.rotated_boxes").corners(turned)[0, 0]
    expected = [2 * np.cos(0.5) + np.sin(0.5), 20 - 2 * np.sin(0.5) + np.cos(0.5)]
    np.testing.assert_allclose(corner, expected)


@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({}, (True, True, True)),
        ({"height": 40}, (False, True, True)),
        ({"height": 25}, (False, False, False)),
        ({"occlusion": 1}, (False, True, True)),
        ({"occlusion": 2}, (False, False, True)),
        ({"occlusion": 3}, (False, False, False)),
        ({"truncation": 0.16}, (False, True, True)),
        ({"truncation": 0.4}, (False, False, True)),
    ],
)
def test_levels(metric: ModuleType, fields: dict[str, Any], levels: tuple[bool, ...]) -> None:
    """What is too hard for a level need not be found, and finding it is no mistake."""
    plain = [line(at=10.0 * k, score=0.9) for k in range(41)]
    hard = [line(at=-50.0, **fields)]
    for level, counts in enumerate(levels):
        assert (ap(metric, plain + hard, plain, level) < 1) == counts
        assert ap(metric, plain + hard, [*plain, line(at=-50.0, score=0.99, **fields)], level) == 1


def test_vans_and_what_is_not_labelled_are_no_mistakes(metric: ModuleType) -> None:
    plain = [line(at=10.0 * k, score=0.9) for k in range(41)]
    extra = [line(at=-50.0, score=0.99)]
    wrong = ap(metric, plain, plain + extra, kind="image")
    assert wrong < 1
    assert ap(metric, [*plain, line("Van", at=-50.0)], plain + extra, kind="image") == 1
    assert ap(metric, [*plain, line("DontCare", at=-50.0)], plain + extra, kind="image") == 1
    assert ap(metric, [*plain, line("Truck", at=-50.0)], plain + extra, kind="image") == wrong
    assert ap(metric, plain, [*plain, line(at=-50.0, height=24, score=0.99)], kind="image") == 1


def test_two_detections_of_one_car(metric: ModuleType) -> None:
    many = [line(at=10.0 * k, score=0.9 - k / 100) for k in range(40)]
    again = [line(at=0.1, score=0.95)]
    assert ap(metric, many, many + again) < ap(metric, many, many)


def test_means_over_the_classes_that_there_are(metric: ModuleType) -> None:
    cars = [line(at=10.0 * k, score=0.9) for k in range(41)]
    walkers = [line("Pedestrian", at=-20.0, score=0.9), line("Pedestrian", at=-40.0, score=0.8)]
    hidden = [line("Cyclist", at=-60.0, occlusion=3)]
    true, found = (metric.Objects.parse("\n".join(lines)) for lines in (cars + walkers + hidden, cars + walkers[:1]))
    assert metric.evaluate([true], [found]) == {"mean_ap": 0.75, "Car_ap": 1, "Pedestrian_ap": 0.5}
    assert metric.evaluate([found], [metric.Objects.parse("")]) == {"mean_ap": 0, "Car_ap": 0, "Pedestrian_ap": 0}
    assert metric.evaluate([metric.Objects.parse("")], [found]) == {"mean_ap": 0}


def test_few_objects_that_are_all_found_have_a_precision_of_1(metric: ModuleType) -> None:
    few = [line(at=10.0 * k, score=0.9 - k / 10) for k in range(3)]
    assert ap(metric, few, few) == pytest.approx(2 / 40)
    assert ap(metric, few, few, recalls=None) == 1
    for count in (40, 41):
        cars = metric.Objects.parse("\n".join(line(at=10.0 * k, score=0.9 - k / 100) for k in range(count)))
        assert metric.evaluate([cars], [cars])["Car_ap"] == 1
    assert ap(metric, few, few[:2], recalls=None) == pytest.approx(2 / 3)
    # A wrong one behind the first: precisions 1, 2/3 and 3/4, of which the second becomes the best that follows.
    assert ap(metric, few, [*few, line(at=1000.0, score=0.85)], recalls=None) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
