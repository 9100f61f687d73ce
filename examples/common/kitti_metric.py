"""KITTI's average precision of objects in the image, on the ground and in space, as its benchmark computes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import rotated_boxes

Array = NDArray[np.float64]
LEAST_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
ALIKE = {"Car": "Van", "Pedestrian": "Person_sitting"}
"""Classes that are neither asked for nor wrong where another one is."""
LEVELS = ("easy", "moderate", "hard")
LEAST_HEIGHT, MOST_OCCLUSION, MOST_TRUNCATION = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)
KINDS = ("image", "ground", "space")
SAMPLES = 41
COUNTED, NEITHER, OTHER = 0, 1, -1
"""Whether an object counts, is neither right nor wrong, or is of another class."""


@dataclass(frozen=True)
class Objects:
    """The objects of one frame, true or found, with the fields of KITTI's label files; arrays run over objects.

    `boxes` `(n, 4)` are left, top, right and bottom in the image; `sizes` `(n, 3)` height, width and length in metres;
    `places` `(n, 3)` the middle of the lower side in the camera's coordinates; `yaws` `(n,)` around its y axis.
    """

    names: NDArray[np.str_]
    truncation: Array
    occlusion: Array
    boxes: Array
    sizes: Array
    places: Array
    yaws: Array
    scores: Array

    @staticmethod
    def parse(text: str) -> "Objects":
        """Read a label file, or one of results, which has a score at the end of each line."""
        lines = [line.split() for line in text.splitlines() if line.strip()]
        values = np.array([[*map(float, line[1:15]), float(line[15]) if len(line) > 15 else 0.0] for line in lines])
        values = values.reshape(len(lines), 15)
        names = np.array([line[0] for line in lines], dtype=np.str_)
        parts = values[:, 0], values[:, 1], values[:, 3:7], values[:, 7:10], values[:, 10:13], values[:, 13]
        return Objects(names, *parts, scores=values[:, 14])

    def __len__(self) -> int:
        return len(self.names)

    def on_ground(self) -> Array:
        """Return the boxes seen from above, `(n, 5)`, for `rotated_boxes`."""
        return np.column_stack([self.places[:, [0, 2]], self.sizes[:, [2, 1]], -self.yaws])


def average_precision(
    true: Sequence[Objects], found: Sequence[Objects], name: str, level: int, kind: str, recalls: int | None = 40
) -> float:
    """Return a class's average precision over frames, of 1; without an object that counts, 0.

    Precision is taken at one score for each recall, and at no more scores than there are objects found: of no more
    than 40 objects, all of them found, it is less than 1, unless it is taken at the recall of each.

    Args:
        true: labels of each frame.
        found: detections of each frame.
        name: `Car`, `Pedestrian` or `Cyclist`.
        level: 0 for easy, 1 for moderate, 2 for hard.
        kind: whether boxes are compared in the `image`, on the `ground` or in `space`.
        recalls: 40 recalls from 1/40 to 1, or 11 from 0 to 1, as before 2019; none: that of each object.
    """
    frames = [_Frame(*pair, name, level, kind) for pair in zip(true, found, strict=True)]
    wanted = count_objects(true, name, level)
    if not wanted:
        return 0.0
    hits = np.concatenate([frame.scores_of_hits() for frame in frames])
    precision = np.zeros(SAMPLES if recalls else wanted)
    for i, threshold in enumerate(_thresholds(hits, wanted) if recalls else np.sort(hits)[::-1]):
        right, wrong = np.sum([frame.count(threshold) for frame in frames], axis=0)
        precision[i] = right / max(right + wrong, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    if recalls:
        precision = precision[1:] if recalls == 40 else precision[:: (SAMPLES - 1) // 10]
    return float(precision.mean())


def count_objects(true: Sequence[Objects], name: str, level: int) -> int:
    """Return how many objects of a class are to be found at a level."""
    return sum(int((_roles_of_labels(frame, name, level) == COUNTED).sum()) for frame in true)


def evaluate(true: Sequence[Objects], found: Sequence[Objects], kind: str = "space") -> dict[str, float]:
    """Return the mean over classes, and that of each class with an object to be found, at moderate difficulty.

    It is KITTI's, over 40 recalls; of a class with no more objects than that, which would never get to 1, over the
    recall of each object.
    """
    counts = {name: count_objects(true, name, 1) for name in LEAST_OVERLAP}
    each = {
        f"{name}_ap": average_precision(true, found, name, 1, kind, recalls=40 if count >= SAMPLES else None)
        for name, count in counts.items()
        if count
    }
    return {"mean_ap": float(np.mean(list(each.values()) or [0.0])), **each}


class _Frame:
    """A frame's objects of one class at one level, matched at any threshold of the score."""

    def __init__(self, true: Objects, found: Objects, name: str, level: int, kind: str) -> None:
        self.truth = _roles_of_labels(true, name, level)
        self.found = np.where(found.names == name, COUNTED, OTHER)
        self.found[_heights(found) < LEAST_HEIGHT[level]] = NEITHER
        self.scores, self.least = found.scores, LEAST_OVERLAP[name]
        self.overlaps = _OVERLAPS[kind](found, true)
        shared = _shared_in_image(found.boxes, true.boxes[true.names == "DontCare"])
        areas = np.maximum(_areas(found.boxes), 1e-9)[:, None]
        self.excused = (shared / areas > self.least).any(1) if kind == "image" else np.zeros(len(found), dtype=bool)

    def scores_of_hits(self) -> Array:
        """Return the scores of the detections that hit an object, each taking the best score that fits it."""
        taken = np.zeros(len(self.found), dtype=bool)
        hits = []
        for i in np.flatnonzero(self.truth != OTHER):
            fits = np.flatnonzero((self.found != OTHER) & ~taken & (self.overlaps[:, i] > self.least))
            if len(fits):
                best = fits[self.scores[fits].argmax()]
                taken[best] = True
                if self.truth[i] == COUNTED and self.found[best] == COUNTED:
                    hits.append(self.scores[best])
        return np.array(hits)

    def count(self, threshold: float) -> tuple[int, int]:
        """Return how many detections of at least a score are right, and how many are wrong.

        Each object takes the detection that overlaps it most, or, if there is none that counts, the first that is too
        small to count.
        """
        present = self.scores >= threshold
        taken = np.zeros(len(self.found), dtype=bool)
        right = 0
        for i in np.flatnonzero(self.truth != OTHER):
            fits = (self.found != OTHER) & present & ~taken & (self.overlaps[:, i] > self.least)
            counted = np.flatnonzero(fits & (self.found == COUNTED))
            if len(counted):
                best = counted[self.overlaps[counted, i].argmax()]
                right += int(self.truth[i] == COUNTED)
                taken[best] = True
            elif fits.any():
                taken[fits.argmax()] = True
        return right, int(((self.found == COUNTED) & present & ~taken & ~self.excused).sum())


def _roles_of_labels(true: Objects, name: str, level: int) -> NDArray[np.int64]:
    unclear = (
        (true.occlusion > MOST_OCCLUSION[level])
        | (true.truncation > MOST_TRUNCATION[level])
        | (_heights(true) <= LEAST_HEIGHT[level])
    )
    roles = np.where(unclear, NEITHER, COUNTED)
    roles[true.names != name] = OTHER
    roles[true.names == ALIKE.get(name, "")] = NEITHER
    return roles


def _thresholds(scores: Array, wanted: int) -> list[float]:
    """Return the scores at which the recall comes nearest to 0, 1/40, … 1."""
    ordered = np.sort(scores)[::-1]
    chosen: list[float] = []
    recall = 0.0
    for i, score in enumerate(ordered):
        here, last = (i + 1) / wanted, i + 1 == len(ordered)
        after = here if last else (i + 2) / wanted
        if after - recall < recall - here and not last:
            continue
        chosen.append(float(score))
        recall += 1 / (SAMPLES - 1)
    return chosen


def _heights(objects: Objects) -> Array:
    return objects.boxes[:, 3] - objects.boxes[:, 1]


def _areas(boxes: Array) -> Array:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _shared_in_image(first: Array, second: Array) -> Array:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), -1)


def _iou(shared: Array, first: Array, second: Array) -> Array:
    return shared / np.maximum(first[:, None] + second[None] - shared, 1e-9)


def _in_image(first: Objects, second: Objects) -> Array:
    return _iou(_shared_in_image(first.boxes, second.boxes), _areas(first.boxes), _areas(second.boxes))


def _on_ground(first: Objects, second: Objects) -> Array:
    shared = rotated_boxes.overlaps(first.on_ground(), second.on_ground())
    return _iou(shared, *(np.abs(o.sizes[:, 1] * o.sizes[:, 2]) for o in (first, second)))


def _in_space(first: Objects, second: Objects) -> Array:
    """Heights go up from the place, while the camera's y axis points down."""
    ground = rotated_boxes.overlaps(first.on_ground(), second.on_ground())
    low = np.maximum(*np.ix_(first.places[:, 1] - first.sizes[:, 0], second.places[:, 1] - second.sizes[:, 0]))
    high = np.minimum(*np.ix_(first.places[:, 1], second.places[:, 1]))
    return _iou(ground * np.maximum(high - low, 0), *(np.abs(o.sizes.prod(1)) for o in (first, second)))


_OVERLAPS = {"image": _in_image, "ground": _on_ground, "space": _in_space}
