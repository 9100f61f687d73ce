"""Synthetic scenes, seeded: roads with lanes, and what a lidar sees of boxes. No accuracy on them is one on real data.

Lanes have the geometry of TuSimple's labels, of which there may be few: mirrored, stretched and shifted, they make any
number of scenes. A scene is drawn when it is asked for, the same each time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from common.kitti_frames import CLASSES, Calibration, Frame, to_objects
from pointpillars import SIZES, Grid

Array = NDArray[np.float64]
LANE_IMAGE = 512, 288
NO_LANE = -2
LIDAR_HEIGHT, LEAST_POINTS = 1.73, 5
"""Metres above the ground, and of how few points an object is no label."""
RAYS = np.deg2rad(np.linspace(-42, 42, 420)), np.deg2rad(np.linspace(-24.8, 2.0, 64))
"""Azimuths and elevations of a lidar's rays."""
FAR, NOISE = 60.0, 0.02
CAMERA = Calibration(
    to_camera=np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]]),
    to_image=np.array([[707.0, 0, 604, 0], [0, 707, 180.5, 0], [0, 0, 1, 0]]),
    size=(1242, 375),
)
"""As KITTI's cars have it."""


@dataclass(frozen=True)
class LaneScene:
    """A road with lanes, as `lanes.Picture`: columns at rows, in pixels, `NO_LANE` where a lane is not."""

    labels: list[Array]
    rows: Array
    seed: int

    @cached_property
    def lanes(self) -> list[Array]:
        """The labels' lanes, mirrored, stretched and shifted."""
        rng, (width, _) = np.random.default_rng(self.seed), LANE_IMAGE
        mirrored, stretch, shift = rng.random() < 0.5, rng.uniform(0.8, 1.2), rng.uniform(-40, 40)
        found = []
        for lane in self.labels:
            columns = (lane - width / 2) * stretch * (-1 if mirrored else 1) + width / 2 + shift
            found.append(np.where((lane >= 0) & (columns >= 0) & (columns < width), columns, NO_LANE))
        return [lane for lane in found if (lane >= 0).sum() > 1]

    def image(self) -> Image.Image:
        """Draw sky, road, lanes, cars and noise."""
        rng, (width, height) = np.random.default_rng((self.seed, 1)), LANE_IMAGE
        horizon = self.rows[np.any([lane >= 0 for lane in self.lanes], axis=0)].min() if self.lanes else height / 2
        road = int(rng.integers(60, 130))
        image = Image.new("RGB", LANE_IMAGE, tuple(int(x) for x in rng.integers(120, 230, 3)))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, horizon, width, height), (road, road, road))
        for lane in self.lanes:
            self._draw_lane(draw, lane, horizon, rng)
        for _ in range(rng.integers(0, 4)):
            bottom = rng.uniform(horizon, height)
            size = 10 + 0.5 * (bottom - horizon)
            left = rng.uniform(0, width)
            colour = tuple(int(x) for x in rng.integers(0, 255, 3))
            draw.rectangle((left, bottom - 0.8 * size, left + size, bottom), colour)
        noise = rng.normal(0, rng.uniform(2, 12), (height, width, 3))
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))

    def _draw_lane(self, draw: ImageDraw.ImageDraw, lane: Array, horizon: float, rng: np.random.Generator) -> None:
        there = lane >= 0
        points = list(zip(lane[there], self.rows[there], strict=True))
        bright, dashed = int(rng.integers(170, 255)), rng.random() < 0.5
        for number, ((x, y), (after, below)) in enumerate(pairwise(points)):
            if not dashed or number % 4 < 2:
                thick = max(1, round((below - horizon) / 35))
                draw.line((x, y, after, below), (bright, bright, int(bright * 0.8)), thick)


class LaneScenes:
    """So many scenes of roads, from a seed on, with the lanes of TuSimple's labels: `(lanes, rows)` each."""

    def __init__(self, labels: list[tuple[list[Array], Array]], count: int, seed: int) -> None:
        self.labels, self.count, self.seed = labels, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> LaneScene:
        if not 0 <= number < self.count:
            raise IndexError(number)
        lanes, rows = self.labels[number % len(self.labels)]
        return LaneScene(lanes, rows, self.seed + number)


class LidarScenes:
    """So many scenes of cars, pedestrians and cyclists on a plane, and of poles and walls, from a seed on."""

    def __init__(self, grid: Grid, count: int, seed: int) -> None:
        self.grid, self.count, self.seed = grid, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Frame:
        if not 0 <= number < self.count:
            raise IndexError(number)
        rng = np.random.default_rng((2, self.seed + number))
        boxes, classes = self._place(rng)
        points, hit = cast_rays(boxes, rng)
        seen = (classes >= 0) & (np.bincount(hit[hit >= 0], minlength=len(boxes)) >= LEAST_POINTS)
        boxes, classes = boxes[seen], classes[seen]
        objects = to_objects(boxes, classes, np.zeros(len(boxes)), CAMERA)
        return Frame(points, boxes, classes, objects, CAMERA)

    def _place(self, rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
        """Return boxes `(n, 7)` that stand apart, and their classes; -1 for poles and walls."""
        boxes: list[Array] = []
        classes: list[int] = []
        for _ in range(int(rng.integers(8, 16))):
            kind = int(rng.integers(-1, len(CLASSES)))
            size = rng.uniform([0.2, 0.2, 1.5], [3.0, 0.6, 3.0]) if kind < 0 else SIZES[kind] * rng.normal(1, 0.05, 3)
            x = rng.uniform(5, self.grid.high[0] - 2)
            y = rng.uniform(-0.75, 0.75) * min(x, self.grid.high[1])
            box = np.array([x, y, size[2] / 2 - LIDAR_HEIGHT, *size, rng.uniform(-np.pi, np.pi)])
            apart = [np.hypot(*(box[:2] - b[:2])) > (np.hypot(*box[3:5]) + np.hypot(*b[3:5])) / 2 for b in boxes]
            if all(apart):
                boxes.append(box)
                classes.append(kind)
        return np.stack(boxes), np.array(classes, dtype=np.int64)


def cast_rays(boxes: Array, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return what rays hit first, of the ground and boxes `(n, 7)`: points `(m, 4)` and their boxes, -1 for none."""
    azimuth, elevation = (angle.flatten() for angle in np.meshgrid(*RAYS, indexing="ij"))
    rays = np.column_stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    with np.errstate(divide="ignore"):
        ground = np.where(rays[:, 2] < 0, -LIDAR_HEIGHT / rays[:, 2], np.inf)
    distance, hit = ground, np.full(len(rays), -1)
    for number, box in enumerate(boxes):
        cos, sin = np.cos(box[6]), np.sin(box[6])
        back = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        start, along = -back @ box[:3], rays @ back.T
        with np.errstate(divide="ignore"):
            sides = np.stack([(sign * box[3:6] / 2 - start) / along for sign in (-1, 1)])
        near, far = sides.min(0).max(1), sides.max(0).min(1)
        nearer = (near <= far) & (near > 0) & (near < distance)
        distance, hit = np.where(nearer, near, distance), np.where(nearer, number, hit)
    reached = distance < FAR
    places = rays[reached] * (distance[reached] + rng.normal(0, NOISE, int(reached.sum())))[:, None]
    hit = hit[reached]
    brightness = np.append(rng.uniform(0.1, 0.9, len(boxes)), 0.3)[hit] + rng.normal(0, 0.05, len(hit))
    return np.column_stack([places, np.clip(brightness, 0, 1)]).astype(np.float32), hit
