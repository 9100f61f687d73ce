"""KITTI's 3D object detection: PointPillars (Lang et al., arXiv 1812.05784), a network on pillars of lidar points.

    export SLRC_DATA=~/data
    slrc compile examples/pointpillars.py --pattern channel --sparsity 0.5 --prune-ends --epochs 20 --out build/pillars

`SLRC_DATA` names a folder with `kitti/training/`, which holds `velodyne`, `calib`, `label_2` and perhaps `image_2` as
https://www.cvlibs.net/datasets/kitti packs them. `kitti/ImageSets/train.txt` and `val.txt` list the frames of each
split; KITTI does not pack them, OpenPCDet's `data/kitti/ImageSets` has the usual ones. Without them all frames are in
both, training does not vary them, and the metric says nothing of other frames. The network goes from pillars to raw
heads: points become pillars before it, and its outputs boxes after it. `--prune-ends` is for the linear layer on
points, which is the network's first. Also read from the environment:

- `SLRC_CACHE`: where the dense network is kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; 80 unless given; three eighths as many follow
  with settled batch norm.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from common import kitti_metric, rotated_boxes
from common.dense_training import DEVICE, device_of, has_bfloat16, train_epochs
from common.kitti_frames import CLASSES, SPLIT_HINT, Frame, Frames, find_kitti, frame_names, to_objects, wrapped
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import BatchNorm1d, BatchNorm2d
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, smooth_l1_loss

import slrc
from slrc.machine.cache import cache_folder
from slrc.training.batch_norm import recalibrate_batch_norm

FEATURES = 10
SIZES = np.array([[3.9, 1.6, 1.56], [0.8, 0.6, 1.73], [1.76, 0.6, 1.73]])
"""The length, width and height of each class's anchors, and below where their lower sides are."""
BOTTOMS = np.array([-1.78, -0.6, -0.6])
YAWS = (0.0, np.pi / 2)
FROM_ABOVE = [0, 1, 3, 4, 6]
"""The numbers of a box that `rotated_boxes` takes."""
MATCHED, UNMATCHED = (0.6, 0.5, 0.5), (0.45, 0.35, 0.35)
DIRECTIONS, TURNED = 2, np.pi / 4
IGNORED = -1
FOCAL_ALPHA, FOCAL_GAMMA, BOX_WEIGHT, DIRECTION_WEIGHT, SMOOTH_BELOW = 0.25, 2.0, 2.0, 0.2, 1 / 9
LEAST_SCORE, MOST_OVERLAP, MOST_BOXES = 0.1, 0.01, 500
EPOCHS, LR, WEIGHT_DECAY, CLIP = 80, 3e-3, 0.01, 10.0
SETTLED, SETTLED_LR = 3 / 8, 1e-3
"""How many epochs more go by with batch norm's statistics settled, and their highest rate."""


@dataclass(frozen=True)
class Grid:
    """Where pillars stand, in metres, and how many pillars and points in each are taken."""

    low: tuple[float, float, float] = (0.0, -39.68, -3.0)
    high: tuple[float, float, float] = (69.12, 39.68, 1.0)
    pillar: float = 0.16
    pillars: int = 12_000
    points: int = 32

    @property
    def shape(self) -> tuple[int, int]:
        """Rows along y and columns along x."""
        rows, columns = (round((self.high[k] - self.low[k]) / self.pillar) for k in (1, 0))
        return rows, columns


class FrameList(Protocol):
    """Frames by number, as KITTI's `Frames`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Frame: ...


def make_pillars(points: NDArray[np.float32], grid: Grid) -> tuple[Tensor, Tensor]:
    """Return features of the points in each pillar, and the pillar in each cell of the grid.

    The features `(pillars, points, 10)` are x, y, z and intensity, the offsets to the mean of the pillar's points, and
    those to its middle; zeros where there is no point. Cells `(rows·columns,)` without a pillar hold `grid.pillars`.
    """
    low, high = (np.array(bound, dtype=np.float32) for bound in (grid.low, grid.high))
    points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]
    rows, columns = grid.shape
    at = np.minimum(((points[:, :2] - low[:2]) / grid.pillar).astype(np.int64), [columns - 1, rows - 1])
    used, first, pillar, count = np.unique(
        at[:, 1] * columns + at[:, 0], return_index=True, return_inverse=True, return_counts=True
    )
    if len(used) > grid.pillars:  # those that the lidar met first
        number = np.full(len(used), grid.pillars)
        number[np.argsort(first)[: grid.pillars]] = np.arange(grid.pillars)
    else:
        number = np.arange(len(used))
    order = np.argsort(pillar, kind="stable")
    place = np.empty(len(points), dtype=np.int64)
    place[order] = np.arange(len(points)) - np.repeat(np.cumsum(count) - count, count)
    kept = (place < grid.points) & (number[pillar] < grid.pillars)
    where = number[pillar[kept]], place[kept]

    features = np.zeros((grid.pillars, grid.points, FEATURES), dtype=np.float32)
    features[(*where, slice(0, 4))] = points[kept]
    held = np.bincount(where[0], minlength=grid.pillars)
    means = features[:, :, :3].sum(1) / np.maximum(held, 1)[:, None]
    middles = np.column_stack([low[:2] + (at + 0.5) * grid.pillar, np.full(len(at), (low[2] + high[2]) / 2)])
    features[(*where, slice(4, 7))] = points[kept, :3] - means[where[0]]
    features[(*where, slice(7, 10))] = points[kept, :3] - middles[kept]
    cells = np.full(rows * columns, grid.pillars, dtype=np.int64)
    cells[used] = number
    return torch.from_numpy(features), torch.from_numpy(cells)


class PillarNet(nn.Module):
    """A linear layer on each point, batch norm, the greatest over a pillar's points, and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, width, bias=False)
        self.norm = nn.BatchNorm1d(width, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, points, 10)` to `(n, width)`."""
        y = self.norm(self.linear(x.flatten(0, 1)))  # batch norm of `(points, width)` is the fast one
        return torch.relu(y.view(*x.shape[:2], -1).max(dim=1)[0])  # the greatest of what ReLU leaves, with fewer ReLUs


def stage(inputs: int, width: int, depth: int) -> nn.Sequential:
    """Return 3×3 convolutions with batch norm and ReLU, the first of which halves the image."""
    layers: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(inputs if i == 0 else width, width, 3, 2 if i == 0 else 1, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(width, eps=1e-3, momentum=0.01), nn.ReLU()]
    return nn.Sequential(*layers)


class PointPillars(nn.Module):
    """Pillars on a canvas seen from above, three stages, their results at the first one's size, and 1×1 heads.

    Args:
        grid: where pillars stand.
        widths: channels of each stage; the pillars have as many as the first.
        depths: convolutions of each stage.
        up: channels of each stage's result.
    """

    def __init__(
        self,
        grid: Grid,
        widths: tuple[int, ...] = (64, 128, 256),
        depths: tuple[int, ...] = (4, 6, 6),
        up: int = 128,
    ) -> None:
        super().__init__()
        self.grid, self.width = grid, widths[0]
        self.pillars = PillarNet(widths[0])
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            self.stages.append(stage(widths[max(0, i - 1)], width, depth))
            enlarge = nn.ConvTranspose2d(width, up, 2**i, 2**i, bias=False)
            self.ups.append(nn.Sequential(enlarge, nn.BatchNorm2d(up, eps=1e-3, momentum=0.01), nn.ReLU()))
        anchors = len(CLASSES) * len(YAWS)
        self.parts = tuple(anchors * numbers for numbers in (len(CLASSES), 7, DIRECTIONS))
        self.heads = nn.Conv2d(up * len(widths), sum(self.parts), 1)  # one reads its input once, and takes blocks of 8
        assert self.heads.bias is not None
        nn.init.constant_(self.heads.bias[: self.parts[0]], -float(np.log(99)))  # a probability of 1 %
        self.settled = False

    def train(self, mode: bool = True) -> "PointPillars":
        """Train or evaluate; batch norm that has `settled` keeps its statistics: those of two frames are not all's."""
        super().train(mode)
        for norm in self.norms():
            norm.train(mode and not self.settled)
        return self

    def norms(self) -> "list[BatchNorm1d | BatchNorm2d]":
        """Return the batch norms."""
        return [module for module in self.modules() if isinstance(module, BatchNorm1d | BatchNorm2d)]

    def settle(self, batches: "Batches") -> None:
        """Take batch norm's statistics from one round of batches, and keep them from then on."""
        recalibrate_batch_norm(self, lambda m, b: m(b[0].to(DEVICE), b[1].to(DEVICE)), batches, len(batches))
        self.settled = True
        self.train()

    def canvas(self, features: Tensor, cells: Tensor) -> Tensor:
        """Return what the pillars say where they stand, `(n, width, rows, columns)`; zeros in empty cells."""
        batch = features.shape[0]
        pillars = self.pillars(features.flatten(0, 1)).view(batch, self.grid.pillars, self.width)
        pillars = torch.cat([pillars, pillars.new_zeros(batch, 1, self.width)], 1)
        starts = torch.arange(batch, device=cells.device) * (self.grid.pillars + 1)
        canvas = pillars.flatten(0, 1).index_select(0, (cells + starts[:, None]).flatten())
        return canvas.view(batch, *self.grid.shape, self.width).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return raw scores, boxes and directions, `(n, 18 | 42 | 12, rows/2, columns/2)`.

        Args:
            features: `(n, pillars, points, 10)`.
            cells: `(n, rows·columns)`, the pillar in each cell.
        """
        x = self.canvas(features, cells)
        found = []
        for each, up in zip(self.stages, self.ups, strict=True):
            x = each(x)
            found.append(up(x))
        x = torch.cat(found, 1)
        scores, boxes, directions = self.heads(x).split(self.parts, dim=1)
        return scores, boxes, directions


def make_anchors(grid: Grid) -> NDArray[np.float64]:
    """Return the anchors `(rows/2·columns/2, classes, yaws, 7)`: boxes in the lidar's coordinates."""
    rows, columns = (n // 2 for n in grid.shape)
    y, x = (grid.low[k] + (np.arange(n) + 0.5) * 2 * grid.pillar for k, n in ((1, rows), (0, columns)))
    anchors = np.zeros((rows, columns, len(CLASSES), len(YAWS), 7))
    anchors[..., 0], anchors[..., 1] = x[None, :, None, None], y[:, None, None, None]
    anchors[..., 2] = (BOTTOMS + SIZES[:, 2] / 2)[:, None]
    anchors[..., 3:6] = SIZES[:, None]
    anchors[..., 6] = YAWS
    return anchors.reshape(rows * columns, len(CLASSES), len(YAWS), 7)


def encode(boxes: NDArray[np.float64], anchors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return boxes `(n, 7)` relative to anchors `(n, 7)`."""
    diagonal = np.hypot(anchors[:, 3], anchors[:, 4])
    scale = np.column_stack([diagonal, diagonal, anchors[:, 5]])
    offsets, sizes = (boxes[:, :3] - anchors[:, :3]) / scale, np.log(boxes[:, 3:6] / anchors[:, 3:6])
    return np.column_stack([offsets, sizes, boxes[:, 6] - anchors[:, 6]])


def decode(relative: NDArray[np.float64], anchors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return boxes `(n, 7)` from what `encode` makes of them."""
    diagonal = np.hypot(anchors[:, 3], anchors[:, 4])
    scale = np.column_stack([diagonal, diagonal, anchors[:, 5]])
    places, sizes = relative[:, :3] * scale + anchors[:, :3], np.exp(relative[:, 3:6]) * anchors[:, 3:6]
    return np.column_stack([places, sizes, relative[:, 6] + anchors[:, 6]])


def direction_of(yaws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return in which half of the circle yaws lie, from 45 degrees on."""
    return ((yaws - TURNED) % (2 * np.pi) // np.pi).astype(np.int64) % DIRECTIONS


def make_targets(frame: Frame, anchors: NDArray[np.float64]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each anchor should find: a class `(a,)`, a relative box `(a, 7)` and a direction `(a,)`.

    The class is that of `CLASSES` plus one, 0 for nothing and -1 for what is not counted. An anchor is matched to the
    object of its class that it overlaps enough; each object also has the anchors that overlap it most.
    """
    labels = np.zeros(anchors.shape[:3], dtype=np.int64)
    boxes, directions = np.zeros(anchors.shape), np.zeros(anchors.shape[:3], dtype=np.int64)
    for k in range(len(CLASSES)):
        wanted, own = frame.boxes[frame.classes == k], anchors[:, k].reshape(-1, 7)
        if not len(wanted):
            continue
        overlap = rotated_boxes.upright_overlaps(own[:, FROM_ABOVE], wanted[:, FROM_ABOVE])
        best = overlap.max(1)
        object_of = overlap.argmax(1)
        most = overlap.max(0)
        forced, its_object = np.nonzero((overlap == most) & (most > 0))
        object_of[forced] = its_object
        matched = best >= MATCHED[k]
        matched[forced] = True
        label = np.where(matched, k + 1, np.where(best >= UNMATCHED[k], IGNORED, 0))
        labels[:, k] = label.reshape(-1, len(YAWS))
        at = np.flatnonzero(matched)
        relative, direction = np.zeros(own.shape), np.zeros(len(own), dtype=np.int64)
        relative[at] = encode(wanted[object_of[at]], own[at])
        direction[at] = direction_of(wanted[object_of[at], 6])
        boxes[:, k], directions[:, k] = relative.reshape(-1, len(YAWS), 7), direction.reshape(-1, len(YAWS))
    parts = labels.reshape(-1), boxes.reshape(-1, 7).astype(np.float32), directions.reshape(-1)
    return torch.from_numpy(parts[0]), torch.from_numpy(parts[1]), torch.from_numpy(parts[2])


def by_anchor(head: Tensor, numbers: int) -> Tensor:
    """Turn a head's output `(n, anchors·numbers, h, w)` into `(n, h·w·anchors, numbers)`, in float32 by all means."""
    return head.float().permute(0, 2, 3, 1).reshape(head.shape[0], -1, numbers)


def detection_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the focal loss of the scores, the smooth L1 of the boxes and the cross-entropy of the directions."""
    features, cells, labels, boxes, directions = batch
    raw_scores, raw_boxes, raw_directions = model(features, cells)
    scores, found = by_anchor(raw_scores, len(CLASSES)), by_anchor(raw_boxes, 7)
    positive = labels > 0
    share = 1 / positive.sum(1).clamp_min(1)  # of each frame's objects
    truth = one_hot(labels.clamp_min(0), len(CLASSES) + 1)[..., 1:].float()
    chance = torch.sigmoid(scores)
    wrong = torch.where(truth > 0, 1 - chance, chance)
    weight = torch.where(truth > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong**FOCAL_GAMMA
    each = (weight * binary_cross_entropy_with_logits(scores, truth, reduction="none")).sum(2)
    focal = ((each * (labels != IGNORED)).sum(1) * share).mean()
    # The sine of the difference: a box turned by half of a circle is the same one.
    yaw, wanted = found[..., 6:], boxes[..., 6:]
    turned = torch.cat([found[..., :6], yaw.sin() * wanted.cos()], 2)
    target = torch.cat([boxes[..., :6], yaw.cos() * wanted.sin()], 2)
    off = smooth_l1_loss(turned, target, reduction="none", beta=SMOOTH_BELOW).sum(2)
    apart = cross_entropy(by_anchor(raw_directions, DIRECTIONS).transpose(1, 2), directions, reduction="none")
    regression = (BOX_WEIGHT * off + DIRECTION_WEIGHT * apart) * positive
    return focal + (regression.sum(1) * share).mean()


def distance(heads: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
    """Return how far heads are from the dense network's: a loss like the network's own, with its answers for labels.

    Scores count by how far they are off (Li et al., arXiv 2006.04388), boxes and directions where the dense network
    finds something, by how sure it is: what it says of other boxes nothing has taught it. Yaws are compared as they
    are.

    Args:
        heads: scores, boxes and directions, `(n, anchors·numbers, h, w)` each.
        taught: the dense network's, of the same shapes.
    """
    numbers = (len(CLASSES), 7, DIRECTIONS)
    scores, boxes, directions = (by_anchor(h, n) for h, n in zip(heads, numbers, strict=True))
    right, wanted, turned = (by_anchor(h, n) for h, n in zip(taught, numbers, strict=True))
    truth = right.sigmoid()
    best = truth.amax(2)
    sure = best * (best >= LEAST_SCORE)
    off = (scores.sigmoid() - truth).abs() ** FOCAL_GAMMA
    focal = (off * binary_cross_entropy_with_logits(scores, truth, reduction="none")).sum((1, 2))
    apart = cross_entropy(directions.transpose(1, 2), turned.softmax(2).transpose(1, 2), reduction="none")
    missed = smooth_l1_loss(boxes, wanted, reduction="none", beta=SMOOTH_BELOW).sum(2)
    regression = ((BOX_WEIGHT * missed + DIRECTION_WEIGHT * apart) * sure).sum(1)
    return ((focal + regression) / sure.sum(1).clamp_min(1)).mean()


def decode_frame(
    heads: tuple[Tensor, Tensor, Tensor], anchors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return boxes `(n, 7)`, classes `(n,)` and scores `(n,)` of one frame's heads, best first, without doubles."""
    numbers = (len(CLASSES), 7, DIRECTIONS)
    scores, boxes, directions = (by_anchor(h, n)[0].double().cpu() for h, n in zip(heads, numbers, strict=True))
    best, classes = torch.sigmoid(scores).max(1)
    taken = torch.nonzero(best >= LEAST_SCORE).flatten()
    taken = taken[best[taken].argsort(descending=True)][:MOST_BOXES]
    found = decode(boxes[taken].numpy(), anchors.reshape(-1, 7)[taken.numpy()])
    half = directions[taken].argmax(1).numpy()
    found[:, 6] = wrapped((found[:, 6] - TURNED) % np.pi + TURNED + np.pi * half)
    kept = rotated_boxes.suppress(found[:, FROM_ABOVE], best[taken].numpy(), MOST_OVERLAP)
    return found[kept], classes[taken].numpy()[kept], best[taken].numpy()[kept]


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], frames: FrameList, grid: Grid
) -> dict[str, float]:
    """Return KITTI's average precisions in space at moderate difficulty, their mean first, of anything with its heads.

    It runs on the device of the model's parameters, if it has any.
    """
    anchors, true, found = make_anchors(grid), [], []
    device = device_of(model)
    for number in range(len(frames)):
        frame = frames[number]
        features, cells = (x[None].to(device) for x in make_pillars(frame.points, grid))
        boxes, classes, scores = decode_frame(model(features, cells), anchors)
        true.append(frame.objects)
        found.append(to_objects(boxes, classes, scores, frame.calibration))
    return kitti_metric.evaluate(true, found)


class Batches:
    """Shuffled batches `(features, cells, labels, boxes, directions)`, read anew each epoch.

    Args:
        frames: KITTI's, or others.
        grid: where pillars stand.
        batch_size: frames in a batch.
        varied: whether scenes are mirrored, turned by up to 45 degrees and scaled by up to 5 %, at random.
    """

    def __init__(self, frames: FrameList, grid: Grid, batch_size: int = 2, varied: bool = True) -> None:
        self.frames, self.grid, self.batch_size, self.varied = frames, grid, batch_size, varied
        self.anchors = make_anchors(grid)

    def __len__(self) -> int:
        return max(1, len(self.frames) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.frames)).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            frames = [self.frames[i] for i in order[start : start + self.batch_size]]
            frames = [vary(frame) for frame in frames] if self.varied else frames
            parts = [(*make_pillars(f.points, self.grid), *make_targets(f, self.anchors)) for f in frames]
            yield tuple(torch.stack(part) for part in zip(*parts, strict=True))


def vary(frame: Frame) -> Frame:
    """Return a frame mirrored, turned and scaled at random, drawn from torch's global generator."""
    mirror, turn, scale = torch.rand(3).tolist()
    side, turn, scale = (-1 if mirror < 0.5 else 1), (turn - 0.5) * np.pi / 2, 0.95 + scale / 10
    matrix = scale * np.array([[np.cos(turn), -side * np.sin(turn)], [np.sin(turn), side * np.cos(turn)]])
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, :2], points[:, 2] = points[:, :2] @ matrix.T, points[:, 2] * scale
    boxes[:, :2], boxes[:, 2:6] = boxes[:, :2] @ matrix.T, boxes[:, 2:6] * scale
    boxes[:, 6] = wrapped(side * boxes[:, 6] + turn)
    return Frame(points, boxes, frame.classes, frame.objects, frame.calibration)


def train_dense(model: PointPillars, batches: Batches, epochs: int) -> None:
    """Train in place with AdamW and one cycle of the learning rate, and another one once batch norm has settled.

    Frames then are on their own, one in a batch. All is computed in bfloat16 where the processor has it.
    """
    alone = Batches(batches.frames, batches.grid, 1, batches.varied)
    for own, rate, count in ((batches, LR, epochs), (alone, SETTLED_LR, round(SETTLED * epochs))):
        model.to(DEVICE).train()
        if own is alone:
            model.settle(batches)
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(1, count * len(own)))
        bf16 = has_bfloat16()
        train_epochs(
            model, own, detection_loss, optimizer, schedule, count, "pointpillars", clip=CLIP, in_bfloat16=bf16
        )


def make_workload(model: PointPillars, name: str) -> slrc.Workload:
    """Return a network's workload, its dense weights trained or taken from the cache."""
    folder, grid = find_kitti(), model.grid
    (train, is_split), (val, _) = (frame_names(folder, split) for split in ("train", "val"))
    frames, held_out = Frames(folder, train), Frames(folder, val)
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", EPOCHS))
    dense = cache_folder() / f"kitti{len(train)}-{name}-{epochs}epochs-settled.safetensors"
    model = slrc.cached_weights(model, dense, lambda m: train_dense(m, Batches(frames, grid, varied=is_split), epochs))
    model.settled = True
    features, cells = make_pillars(held_out[0].points, grid)
    return slrc.Workload(
        model=model,
        example_inputs=(features[None], cells[None]),
        train_batches=Batches(frames, grid, 1, varied=is_split),
        loss=detection_loss,
        distill=distance,
        evaluate=lambda model: evaluate(model, held_out, grid),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, LR / 10, weight_decay=WEIGHT_DECAY),
        name=name,
        warnings=[]
        if is_split
        else [f"no kitti/ImageSets: the metric is that of the frames that it trains on, unvaried; {SPLIT_HINT}"],
    )


def workload() -> slrc.Workload:
    """Return the workload of the network as published."""
    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        return make_workload(PointPillars(Grid()), "pointpillars")
