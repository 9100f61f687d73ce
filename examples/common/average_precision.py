"""Average precision as COCO counts it (Lin et al., "Microsoft COCO", arXiv 1405.0312; cocodataset.org/#detection-eval).

The detections of a class are taken over all images by falling score. Each is right if it matches a labelled box of its
image that no better one has taken; one that matches a crowd alone does not count. Precision is made to fall
with recall, and averaged over 101 recalls, then over the classes that are labelled at all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.boxes import area, intersection, iou

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Of intersection over union."""
RECALLS = np.linspace(0, 1, 101)
MOST_FOUND = 100
"""Of a class in an image: others do not count."""


class Found(NamedTuple):
    """The detections of an image: boxes `(n, 4)`, scores `(n,)` and classes `(n,)`."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class Labels(NamedTuple):
    """The labels of an image: boxes `(m, 4)`, classes `(m,)`, and which of the boxes are crowds, `(m,)`."""

    boxes: Tensor
    classes: Tensor
    crowd: Tensor


class Matched(NamedTuple):
    """The detections of a class: scores `(n,)`, and for each threshold which are right and which do not count."""

    scores: np.ndarray
    right: np.ndarray
    ignored: np.ndarray


def average_precision(found: Sequence[Found], labels: Sequence[Labels]) -> dict[str, float]:
    """Return `mAP50`, at an intersection over union of 0.5, and `mAP`, the mean from 0.5 to 0.95; 0 without labels.

    Args:
        found: what was found in each image.
        labels: what is to be found there.
    """
    matched: dict[int, list[Matched]] = {}
    positives: dict[int, int] = {}
    for ours, theirs in zip(found, labels, strict=True):
        for number in torch.cat([ours.classes, theirs.classes]).unique().int().tolist():
            own, true = ours.classes == number, theirs.classes == number
            order = ours.scores[own].argsort(descending=True, stable=True)[:MOST_FOUND]
            boxes, scores = ours.boxes[own][order].double(), ours.scores[own][order].double()
            pairs = match(boxes, scores, theirs.boxes[true].double(), theirs.crowd[true])
            matched.setdefault(number, []).append(pairs)
            positives[number] = positives.get(number, 0) + int((~theirs.crowd[true]).sum())
    per_class = [precisions(matched[number], count).mean(1) for number, count in positives.items() if count]
    means = np.mean(per_class, axis=0) if per_class else np.zeros(len(THRESHOLDS))
    return {"mAP50": float(means[0]), "mAP": float(means.mean())}


def match(boxes: Tensor, scores: Tensor, labelled: Tensor, crowd: Tensor) -> Matched:
    """Match the detections of one class in one image, by falling score, each with the free box that it overlaps most.

    Crowds may be matched again and again, and are overlapped by the share of the detection that lies in them.
    """
    inside = intersection(boxes, labelled) / area(boxes)[:, None]
    overlap = torch.where(crowd, inside, iou(boxes, labelled)).numpy()
    is_crowd = crowd.numpy()
    right = np.zeros((len(THRESHOLDS), len(boxes)), bool)
    ignored, taken = right.copy(), np.zeros((len(THRESHOLDS), len(labelled)), bool)
    for i in np.flatnonzero((overlap >= THRESHOLDS[0]).any(1)):
        fits = overlap[i] >= THRESHOLDS[:, None]
        free = fits & ~taken & ~is_crowd
        best = len(labelled) - 1 - np.where(free, overlap[i], -1)[:, ::-1].argmax(1)  # of equals COCO takes the last
        right[:, i] = free.any(1)
        ignored[:, i] = ~right[:, i] & (fits & is_crowd).any(1)
        taken[right[:, i], best[right[:, i]]] = True
    return Matched(scores.numpy(), right, ignored)


def precisions(matched: Sequence[Matched], positives: int) -> np.ndarray:
    """Return the precision of one class at each threshold and recall: `(thresholds, recalls)`.

    Args:
        matched: its detections, image by image.
        positives: how many boxes there are to find.
    """
    scores = np.concatenate([m.scores for m in matched])
    order = np.argsort(-scores, kind="stable")
    right = np.concatenate([m.right for m in matched], axis=1)[:, order]
    wrong = ~right & ~np.concatenate([m.ignored for m in matched], axis=1)[:, order]
    true, false = right.cumsum(1).astype(float), wrong.cumsum(1).astype(float)
    precision = true / (true + false + np.spacing(1))
    falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([falling, np.zeros((len(falling), 1))], axis=1)  # recalls that are never reached
    return np.stack(
        [row[np.searchsorted(recall, RECALLS)] for row, recall in zip(padded, true / positives, strict=True)]
    )
