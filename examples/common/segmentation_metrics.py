"""Semantic segmentation: the mean intersection over union, by a confusion matrix over a whole split."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return how many pixels of each class were taken for each, int64 `(classes, classes)`: rows are the labels.

    Args:
        predicted: class of each pixel, int64, of any shape.
        labels: the same of what is right; pixels of `classes` or more are not counted.
        classes: number of classes.
    """
    counted = labels < classes
    pairs = classes * labels[counted].long() + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(matrix: Tensor) -> Tensor:
    """Return each class's, float64 `(classes,)`; NaN for one that is neither labelled nor predicted."""
    both = matrix.diagonal().double()
    return both / (matrix.sum(0) + matrix.sum(1) - both)


def mean_iou(matrix: Tensor) -> float:
    """Return the mean over the classes that are labelled or predicted; NaN if there is none."""
    return float(intersection_over_union(matrix).nanmean())


def pixel_accuracy(matrix: Tensor) -> float:
    """Return the share of labelled pixels that are right; NaN if there is none."""
    return float(matrix.diagonal().sum() / matrix.sum())
