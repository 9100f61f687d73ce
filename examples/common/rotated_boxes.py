"""Rotated boxes on a plane: corners, overlaps and non-maximum suppression.

A box is `(x, y, length, width, yaw)`: its centre, its sizes, and by how much its length is turned from the x axis, in
radians counter-clockwise.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TOLERANCE = 1e-9


def corners(boxes: Array) -> Array:
    """Return the corners of boxes `(n, 5)`, counter-clockwise: `(n, 4, 2)`."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = boxes[:, None, 2:4] * signs
    cos, sin = np.cos(boxes[:, 4, None]), np.sin(boxes[:, 4, None])
    turned = [local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos]
    return boxes[:, None, :2] + np.stack(turned, -1)


def intersection(first: Array, second: Array) -> Array:
    """Return the areas that boxes `(n, 5)` share with others `(n, 5)`, pair by pair: `(n,)`.

    The common part of two rectangles is the convex hull of the corners of each in the other, and of the points where
    their sides cross.
    """
    own, other = corners(first), corners(second)
    crossings, crosses = _crossings(own, other)
    points = np.concatenate([own, other, crossings], 1)
    valid = np.concatenate([_contains(second, own), _contains(first, other), crosses], 1)
    count = valid.sum(1)
    # What is no point of the hull takes the place of one that is, and so adds no area.
    points = np.where(valid[..., None], points, points[np.arange(len(points)), valid.argmax(1)][:, None])
    middle = (points * valid[..., None]).sum(1) / np.maximum(count, 1)[:, None]
    around = points - middle[:, None]
    order = np.arctan2(around[..., 1], around[..., 0]).argsort(1)
    around = np.take_along_axis(around, order[..., None], 1)
    area = np.abs(_cross(around, np.roll(around, -1, 1)).sum(1)) / 2
    return np.where(count >= 3, area, 0.0)


def overlaps(first: Array, second: Array) -> Array:
    """Return the areas that each box of `(n, 5)` shares with each of `(m, 5)`: `(n, m)`."""
    reach = [np.hypot(boxes[:, 2], boxes[:, 3]) / 2 for boxes in (first, second)]
    apart = np.hypot(*(first[:, None, k] - second[None, :, k] for k in (0, 1)))
    rows, columns = np.nonzero(apart < reach[0][:, None] + reach[1][None])
    result = np.zeros((len(first), len(second)))
    result[rows, columns] = intersection(first[rows], second[columns])
    return result


def upright_overlaps(first: Array, second: Array) -> Array:
    """Return the overlaps of boxes `(n, 5)` and `(m, 5)`, each turned to the nearest axis: `(n, m)`."""
    bounds = []
    for boxes in (first, second):
        lies_across = np.abs(np.sin(boxes[:, 4])) > np.abs(np.cos(boxes[:, 4]))
        half = np.where(lies_across[:, None], boxes[:, [3, 2]], boxes[:, [2, 3]]) / 2
        bounds.append((boxes[:, :2] - half, boxes[:, :2] + half))
    (low, high), (other_low, other_high) = bounds
    sides = np.minimum(high[:, None], other_high) - np.maximum(low[:, None], other_low)
    shared = np.maximum(sides, 0).prod(-1)
    areas = [boxes[:, 2] * boxes[:, 3] for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def suppress(boxes: Array, scores: Array, most_overlap: float) -> list[int]:
    """Return which boxes `(n, 5)` stay, best score `(n,)` first: none shares more than an IoU with a better one."""
    order = np.argsort(-scores, kind="stable")
    areas = boxes[order, 2] * boxes[order, 3]
    shared = overlaps(boxes[order], boxes[order])
    iou = shared / np.maximum(areas[:, None] + areas[None] - shared, TOLERANCE)
    gone = np.zeros(len(order), dtype=bool)
    kept = []
    for i in range(len(order)):
        if not gone[i]:
            kept.append(int(order[i]))
            gone |= iou[i] > most_overlap
    return kept


def _contains(boxes: Array, points: Array) -> NDArray[np.bool_]:
    """Tell which of the points `(n, 4, 2)` lie in the boxes `(n, 5)`: `(n, 4)`."""
    from_centre = points - boxes[:, None, :2]
    cos, sin = np.cos(boxes[:, 4, None]), np.sin(boxes[:, 4, None])
    along = from_centre[..., 0] * cos + from_centre[..., 1] * sin
    across = from_centre[..., 1] * cos - from_centre[..., 0] * sin
    half = boxes[:, None, 2:4] / 2 + TOLERANCE
    return (np.abs(along) <= half[..., 0]) & (np.abs(across) <= half[..., 1])


def _crossings(first: Array, second: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return where sides of polygons `(n, 4, 2)` cross, `(n, 16, 2)`, and whether they do, `(n, 16)`."""
    start, other = first[:, :, None], second[:, None]
    side, other_side = np.roll(first, -1, 1)[:, :, None] - start, np.roll(second, -1, 1)[:, None] - other
    determinant = _cross(side, other_side)
    parallel = np.abs(determinant) < TOLERANCE
    safe = np.where(parallel, 1.0, determinant)
    along = _cross(other - start, other_side) / safe
    along_other = _cross(other - start, side) / safe
    crosses = ~parallel & (along >= 0) & (along <= 1) & (along_other >= 0) & (along_other <= 1)
    return (start + along[..., None] * side).reshape(len(first), 16, 2), crosses.reshape(len(first), 16)


def _cross(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
