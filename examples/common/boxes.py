"""Boxes: overlap and non-maximum suppression. A box is `(left, top, right, bottom)`, in any unit."""

import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """Turn boxes given as `(centre x, centre y, width, height)`, `(…, 4)`, into corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def area(boxes: Tensor) -> Tensor:
    """Return the areas `(…)` of boxes `(…, 4)`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the area that each of `a` `(…, n, 4)` shares with each of `b` `(…, m, 4)`: `(…, n, m)`."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return sides.clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of each of `a` `(…, n, 4)` with each of `b` `(…, m, 4)`: `(…, n, m)`."""
    shared = intersection(a, b)
    return shared / (area(a)[..., :, None] + area(b)[..., None, :] - shared)


def nms(boxes: Tensor, scores: Tensor, threshold: float, classes: Tensor | None = None) -> Tensor:
    """Return the boxes that no better one hides, as indices by falling score.

    Args:
        boxes: `(n, 4)`.
        scores: `(n,)`.
        threshold: a box hides worse ones whose intersection over union with it is larger.
        classes: `(n,)`; a box hides those of its own class only. All are of one class unless given.
    """
    order = scores.argsort(descending=True, stable=True)
    hides = iou(boxes[order], boxes[order]) > threshold
    if classes is not None:
        hides &= classes[order][:, None] == classes[order]
    rows, kept = hides.triu(1).cpu().numpy(), []
    hidden = torch.zeros(len(boxes), dtype=torch.bool).numpy()
    for i, row in enumerate(rows):
        if not hidden[i]:
            kept.append(i)
            hidden |= row
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]
