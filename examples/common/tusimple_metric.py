"""TuSimple's accuracy of lanes, as its benchmark computes it.

A lane is a column for each of the image's sampled rows, negative where the lane is not: `(rows,)`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Lane = NDArray[np.float64]
WIDTH = 1280
"""The width of TuSimple's images, for which the tolerance is given."""
MOST_PIXELS = 20
LEAST_MATCH = 0.85
MOST_LANES = 4
MOST_EXTRA = 2


def score_image(
    found: Sequence[Lane], true: Sequence[Lane], rows: Lane, width: int = WIDTH
) -> tuple[float, float, float]:
    """Return an image's accuracy, and its shares of false lanes and of missed ones, each from 0 to 1.

    A point is right that lies within 20 pixels of the true one, more where the lane is slanted; so is a point that is
    neither found nor there. Every true lane takes the found one that fits it best, and is missed where that has less
    than 85 % of the points right. More than two lanes too many count as nothing found.

    Args:
        found: the predicted lanes, `(rows,)` each.
        true: the labelled lanes, likewise.
        rows: the rows, `(rows,)`, in pixels.
        width: the image's width; the tolerance is scaled to it.
    """
    if len(found) > len(true) + MOST_EXTRA:
        return 0.0, 0.0, 1.0
    best = []
    for lane in true:
        tolerance = MOST_PIXELS * width / WIDTH / np.cos(_angle(lane, rows))
        best.append(max((_share_right(guess, lane, tolerance) for guess in found), default=0.0))
    missed = sum(share < LEAST_MATCH for share in best)
    false = len(found) - (len(true) - missed)
    total = sum(best)
    if len(true) > MOST_LANES:  # the worst lane of five or more is forgiven
        total -= min(best)
        missed = max(0, missed - 1)
    counted = max(min(MOST_LANES, len(true)), 1)
    return total / counted, false / len(found) if len(found) else 0.0, missed / counted


def accuracy(images: Sequence[tuple[Sequence[Lane], Sequence[Lane], Lane, int]]) -> dict[str, float]:
    """Return the means over images of `score_image`, given its arguments for each."""
    scores = np.mean([score_image(*image) for image in images], axis=0)
    return dict(zip(("accuracy", "false_positives", "false_negatives"), map(float, scores), strict=True))


def _angle(lane: Lane, rows: Lane) -> float:
    """Return by how much a lane leans from the vertical, in radians, by least squares."""
    there = lane >= 0
    if there.sum() < 2:
        return 0.0
    return float(np.arctan(np.polyfit(rows[there], lane[there], 1)[0]))


def _share_right(found: Lane, true: Lane, tolerance: float) -> float:
    found, true = (np.where(lane >= 0, lane, -100.0) for lane in (found, true))
    return float((np.abs(found - true) < tolerance).mean())
