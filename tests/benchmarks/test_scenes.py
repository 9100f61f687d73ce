"""The synthetic scenes of the comparison: the same each time, and labelled as they are drawn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ROWS = np.arange(100.0, 288, 4)


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (ROOT / "examples", ROOT / "benchmarks", ROOT / "benchmarks" / "convergence"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("scenes")


def test_a_road_is_the_same_each_time_and_has_its_lanes(scenes: Any) -> None:
    lane = np.where(ROWS >= 120, 150 + ROWS, -2)
    roads = scenes.LaneScenes([([lane], ROWS), ([lane, 300 - lane], ROWS)], 8, seed=0)
    assert len({tuple(road.lanes[0]) for road in roads}) == 8
    again = scenes.LaneScenes([([lane], ROWS), ([lane, 300 - lane], ROWS)], 8, seed=0)[2]
    assert (np.array(roads[2].image()) == np.array(again.image())).all()
    brightest = []
    for road in roads:
        pixels = np.array(road.image().convert("L"), dtype=float)
        for own in road.lanes:
            there = own >= 0
            on = pixels[ROWS[there].astype(int), own[there].astype(int)]
            beside = pixels[ROWS[there].astype(int), np.minimum(own[there].astype(int) + 12, 511)]
            brightest.append(np.mean(on > beside + 20))
    assert np.mean(brightest) > 0.5  # lanes may be dashed, or behind a car


def test_what_a_lidar_sees_is_labelled(scenes: Any) -> None:
    frames = scenes.LidarScenes(scenes.Grid((0.0, -19.84, -3.0), (34.56, 19.84, 1.0)), 3, seed=5)
    for frame in frames:
        assert len(frame.boxes) == len(frame.classes) == len(frame.objects) > 0
        for box in frame.boxes:
            turn = np.array([[np.cos(box[6]), -np.sin(box[6])], [np.sin(box[6]), np.cos(box[6])]])
            inside = np.abs(np.column_stack([(frame.points[:, :2] - box[:2]) @ turn, frame.points[:, 2] - box[2]]))
            assert (inside <= box[3:6] / 2 + 5 * scenes.NOISE).all(1).sum() >= scenes.LEAST_POINTS
    assert (frames[0].points == frames[0].points).all()
    assert frames[0].points.shape != frames[1].points.shape


def test_rays_stop_at_the_first_box(scenes: Any) -> None:
    boxes = np.array([[10.0, 0, 0, 2, 4, 3, 0.3], [20, 0, 0, 2, 2, 3, 0]])
    points, hit = scenes.cast_rays(boxes, np.random.default_rng(0))
    assert (hit == 0).sum() > 100
    assert not (hit == 1).any()
    assert np.linalg.norm(points[hit == 0, :2], axis=1).max() < 12
    assert points[hit == -1, 2].max() < -scenes.LIDAR_HEIGHT + 0.2


def test_every_other_task_has_its_rows(scenes: Any) -> None:
    run, tasks = (importlib.import_module(name) for name in ("run", "tasks"))
    assert {network.split("-")[0] for network, _, _ in run.TASKS} == set(tasks.OTHERS)
    rows = list(run.plain_rows("tasks"))
    assert len(rows) == len(run.TASKS) * len(run.ON_TASKS)
    assert set(run.ON_TASKS) <= run.CONTENDERS.keys()
