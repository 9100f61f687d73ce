"""TuSimple's lanes: Ultra-Fast-Lane-Detection (Qin et al., arXiv 2004.11757) on a ResNet-18.

    export SLRC_DATA=~/data
    slrc compile examples/lanes.py --pattern block:8x1 --sparsity 0.75 --epochs 20 --out build/lanes

`SLRC_DATA` names a folder with `tusimple/` as https://github.com/TuSimple/tusimple-benchmark packs it: `clips/`, label
files `label_data*.json` and, to test on, `test_label.json`, which comes with the test set; without that one training
does not vary the images, and the metric says nothing of others. Images may be of any size, with the labels in their
pixels. The last linear layer holds 46 of the network's 61 million parameters, so slrc prunes it like the others, which
it does not with a small classifier. Also read from the environment:

- `SLRC_CACHE`: where the dense network is kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; 100 unless given.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import tusimple_metric
from common.dense_training import DEVICE, device_of, has_bfloat16, train_epochs
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, log_softmax, nll_loss, smooth_l1_loss
from torchvision import models

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder

HEIGHT, WIDTH = 288, 800
ANCHORS = np.arange(64, 288, 4) / 288
"""The rows at which lanes are sought, as shares of the image's height."""
CELLS, LANES = 100, 4
"""Parts of each row, of which a lane crosses one or none, and lanes, two on each side."""
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
FOCAL_GAMMA, AUX_WEIGHT, SIMILARITY_WEIGHT = 2.0, 1.0, 1.0
NO_LANE = -2
TURN, SHIFT = 6.0, (200 / 1280, 100 / 720)
"""Degrees by which training images are turned at most, and the shares of their width and height that they shift by."""
EPOCHS, LR, WEIGHT_DECAY = 100, 4e-4, 1e-4
SPLIT_HINT = "put `test_label.json`, the labels of TuSimple's test set, in `tusimple/`"
Output = Tensor | tuple[Tensor, Tensor]
"""Scores of the cells; in training with those of the segmentation."""


class Aux(nn.Module):
    """The branch that segments lanes while the network trains: three stages at the size of the first."""

    def __init__(self, widths: tuple[int, int, int], width: int = 128) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for inputs, count in zip(widths, (4, 3, 2), strict=True):
            self.stages.append(nn.Sequential(*(self._conv(width if k else inputs, width) for k in range(count))))
        self.merge = nn.Sequential(
            self._conv(3 * width, 2 * width, dilation=2),
            self._conv(2 * width, width, dilation=2),
            self._conv(width, width, dilation=2),
            self._conv(width, width, dilation=4),
            nn.Conv2d(width, LANES + 1, 1),
        )

    @staticmethod
    def _conv(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Maps of the last three stages to scores `(n, lanes + 1, h/8, w/8)`, the first for no lane."""
        found = [stage(x) for stage, x in zip(self.stages, stages, strict=True)]
        size = found[0].shape[2:]
        return self.merge(torch.cat([interpolate(x, size=size, mode="bilinear") for x in found], 1))


class LaneNet(nn.Module):
    """A ResNet, 1×1 to 8 channels, and two linear layers that choose a cell of each row for each lane.

    Args:
        size: height and width of the image.
        blocks: the backbone's residual blocks in each stage.
        hidden: features between the linear layers.
    """

    def __init__(
        self, size: tuple[int, int] = (HEIGHT, WIDTH), blocks: tuple[int, ...] = (2, 2, 2, 2), hidden: int = 2048
    ) -> None:
        super().__init__()
        self.size = size
        self.backbone = models.ResNet(models.resnet.BasicBlock, list(blocks))
        del self.backbone.fc, self.backbone.avgpool
        self.aux = Aux((128, 256, 512))
        self.pool = nn.Conv2d(512, 8, 1)
        positions = -(-size[0] // 32) * -(-size[1] // 32)
        self.cls = nn.Sequential(
            nn.Linear(8 * positions, hidden), nn.ReLU(), nn.Linear(hidden, (CELLS + 1) * len(ANCHORS) * LANES)
        )

    def forward(self, x: Tensor) -> Output:
        """`(n, 3, h, w)` to scores `(n, cells + 1, anchors, lanes)`, the last cell for no lane.

        In training the segmentation's scores `(n, lanes + 1, h/8, w/8)` are returned too.
        """
        net = self.backbone
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        stages = [x := net.layer2(x), x := net.layer3(x), x := net.layer4(x)]
        scores = self.cls(self.pool(x).flatten(1)).view(-1, CELLS + 1, len(ANCHORS), LANES)
        return (scores, self.aux(stages)) if self.training else scores


def scores_of(output: Output) -> Tensor:
    """Return the cells' scores among what a network returns."""
    return output[0] if isinstance(output, tuple) else output


def lane_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the focal loss of the cells, how much neighbouring rows differ, and, in training, the segmentation's loss.

    Args:
        model: the network.
        batch: images `(n, 3, h, w)`, cells `(n, anchors, lanes)` and lanes of pixels `(n, h/8, w/8)`.
    """
    images, cells, mask = batch
    output = model(images)
    scores, aux = output if isinstance(output, tuple) else (output, None)
    log = log_softmax(scores, 1)
    focal = nll_loss((1 - log.exp()) ** FOCAL_GAMMA * log, cells)
    similar = smooth_l1_loss(scores[:, :, :-1], scores[:, :, 1:])
    loss = focal + SIMILARITY_WEIGHT * similar
    return loss if aux is None else loss + AUX_WEIGHT * cross_entropy(aux, mask)


def decode(scores: Tensor) -> NDArray[np.float64]:
    """Return where lanes cross the anchors, as shares of the width `(n, anchors, lanes)`; `NO_LANE` where they do not.

    It is the mean of the cells, weighed by their probability, where none is less likely than all of them.
    """
    there = scores[:, :-1].softmax(1)
    middles = (torch.arange(CELLS, dtype=scores.dtype, device=scores.device) + 0.5) / CELLS
    place = (there * middles[:, None, None]).sum(1)
    place[scores.argmax(1) == CELLS] = NO_LANE
    return place.double().cpu().numpy()


@dataclass(frozen=True)
class Picture:
    """An image and its labels: `lanes` are columns at `rows`, in pixels, negative where a lane is not."""

    file: Path
    lanes: list[NDArray[np.float64]]
    rows: NDArray[np.float64]

    def image(self) -> Image.Image:
        """Read the image."""
        return Image.open(self.file).convert("RGB")


def find_tusimple() -> Path:
    """Return TuSimple's folder.

    Raises:
        WorkloadError: there is none.
    """
    folder = os.environ.get("SLRC_DATA")
    found = Path(folder or "").expanduser() / "tusimple"
    if folder and (found / "clips").is_dir() and list(found.glob("label_data*.json")):
        return found
    raise WorkloadError(
        f"no TuSimple in `SLRC_DATA={folder}`: expected `tusimple/` with `clips/` and `label_data*.json` there"
        if folder
        else "no TuSimple: `SLRC_DATA` is not set",
        hint="download train_set.zip and test_set.zip of https://github.com/TuSimple/tusimple-benchmark and unpack "
        f"them in `tusimple/`; {SPLIT_HINT}; then set SLRC_DATA to the folder that holds `tusimple`",
    )


def read_labels(folder: Path, split: str) -> tuple[list[Picture], bool]:
    """Return the images of `train` or `test`, and whether the test's are others than those trained on."""
    tests = folder / "test_label.json"
    files = [tests] if split == "test" and tests.exists() else sorted(folder.glob("label_data*.json"))
    pictures = []
    for line in (line for file in files for line in file.read_text().splitlines() if line.strip()):
        fields = json.loads(line)
        lanes = [np.array(lane, dtype=np.float64) for lane in fields["lanes"]]
        pictures.append(Picture(folder / fields["raw_file"], lanes, np.array(fields["h_samples"], dtype=np.float64)))
    return pictures, tests.exists()


def in_order(lanes: list[NDArray[np.float64]], rows: NDArray[np.float64]) -> list[NDArray[np.float64] | None]:
    """Return the two lanes left of the car and the two right of it, from left to right, `None` where there is none.

    Lanes left of the car lean to the right as they go up, those right of it to the left.
    """
    slopes = {}
    for i, lane in enumerate(lanes):
        if (there := lane >= 0).sum() > 1:
            slopes[i] = float(np.polyfit(rows[there], lane[there], 1)[0])
    left = sorted((i for i, slope in slopes.items() if slope < 0), key=lambda i: slopes[i])
    right = sorted((i for i, slope in slopes.items() if slope >= 0), key=lambda i: slopes[i])
    left, right = left[-2:] if len(left) > 2 else left, right[:2]
    # The nearest lanes are the steepest: their columns change least with the row.
    chosen = [*[None] * (2 - len(left)), *left, *right, *[None] * (2 - len(right))]
    return [None if i is None else lanes[i] for i in chosen]


def at_anchors(
    lane: NDArray[np.float64] | None, rows: NDArray[np.float64], height: int, lowest: bool = True
) -> NDArray:
    """Return a lane's columns at the anchors, in pixels, `NO_LANE` where it is not; it is extended to the bottom."""
    wanted = ANCHORS * height
    result = np.full(len(wanted), float(NO_LANE))
    if lane is None or (there := lane >= 0).sum() < 2:
        return result
    ys, xs = rows[there], lane[there]
    inside = (wanted >= ys[0]) & (wanted <= ys[-1])
    result[inside] = np.interp(wanted[inside], ys, xs)
    if lowest:
        half = len(ys) // 2 if len(ys) > 3 else 0
        below = wanted > ys[-1]
        result[below] = np.polyval(np.polyfit(ys[half:], xs[half:], 1), wanted[below])
    return result


def vary(
    image: Image.Image, lanes: list[NDArray[np.float64] | None], rows: NDArray[np.float64]
) -> tuple[Image.Image, list[NDArray[np.float64] | None]]:
    """Return an image turned and shifted at random, and its lanes there, drawn from torch's global generator."""
    turn, *shares = (2 * torch.rand(3) - 1).tolist()
    angle, size = np.deg2rad(TURN * turn), np.array(image.size)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = (np.eye(2) - matrix) @ size / 2 + np.array(shares) * SHIFT * size
    back = np.column_stack([matrix.T, -matrix.T @ shift])
    moved = image.transform(image.size, Image.Transform.AFFINE, tuple(back.flatten()), Image.Resampling.BILINEAR)
    found: list[NDArray[np.float64] | None] = []
    for lane in lanes:
        if lane is None or (there := lane >= 0).sum() < 2:
            found.append(None)
            continue
        xs, ys = matrix @ np.stack([lane[there], rows[there]]) + shift[:, None]
        order = ys.argsort()
        columns = np.interp(rows, ys[order], xs[order], left=NO_LANE, right=NO_LANE)
        found.append(np.where((columns >= 0) & (columns < size[0]), columns, NO_LANE))
    return moved, found


def load(picture: Picture, size: tuple[int, int], varied: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image `(3, h, w)`, the cells of its lanes `(anchors, lanes)` and their pixels `(h/8, w/8)`."""
    image, lanes = picture.image(), in_order(picture.lanes, picture.rows)
    if varied:
        image, lanes = vary(image, lanes, picture.rows)
    columns = [at_anchors(lane, picture.rows, image.height) for lane in lanes]
    shares = np.stack(columns, 1) / image.width
    cells = np.where((shares >= 0) & (shares < 1), np.floor(shares * CELLS), CELLS).astype(np.int64)
    mask = np.zeros((-(-size[0] // 8), -(-size[1] // 8)), dtype=np.int64)
    finer = np.linspace(ANCHORS[0], ANCHORS[-1], 8 * len(mask))
    for number, column in enumerate(shares.T, start=1):
        for (y, x), (below, after) in pairwise(zip(ANCHORS, column, strict=True)):
            if min(x, after) >= 0 and max(x, after) < 1:
                between = finer[(finer >= y) & (finer <= below)]
                across = np.interp(between, [y, below], [x, after])
                mask[(between * len(mask)).astype(int), (across * mask.shape[1]).astype(int)] = number
    return normalize(image, size), torch.from_numpy(cells), torch.from_numpy(mask)


def normalize(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return an image's pixels, scaled to a height and width: float32 `(3, h, w)`."""
    pixels = torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1)
    planes = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return planes.sub_(255 * MEAN[:, None, None]).div_(255 * STD[:, None, None])


class Batches:
    """Shuffled batches `(images, cells, masks)`; the last images, too few for a batch, are left out.

    Args:
        pictures: images and labels.
        size: height and width of the network's input.
        batch_size: images in a batch.
        varied: whether they are turned by up to 6 degrees and shifted, at random.
    """

    def __init__(
        self, pictures: Sequence[Picture], size: tuple[int, int], batch_size: int, varied: bool = True
    ) -> None:
        self.pictures, self.size, self.varied = pictures, size, varied
        self.batch_size = min(batch_size, len(pictures))

    def __len__(self) -> int:
        return len(self.pictures) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.pictures)).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            parts = [load(self.pictures[i], self.size, self.varied) for i in order[start : start + self.batch_size]]
            images, cells, masks = (torch.stack(part) for part in zip(*parts, strict=True))
            yield images, cells, masks


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Output], pictures: Sequence[Picture], size: tuple[int, int]) -> dict[str, float]:
    """Return TuSimple's accuracy, and its shares of false lanes and of missed ones, of anything that returns scores.

    A module computes on the device of its parameters, if it has any.
    """
    device = device_of(model)
    scored = []
    for picture in pictures:
        image = picture.image()
        shares = decode(scores_of(model(normalize(image, size)[None].to(device))))[0]
        found = [columns_at(column, picture.rows, image.size) for column in shares.T]
        found = [column for column in found if (column >= 0).any()]
        scored.append((found, picture.lanes, picture.rows, image.width))
    return tusimple_metric.accuracy(scored)


def columns_at(shares: NDArray[np.float64], rows: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Return a lane's columns at rows, in pixels of an image of a width and height; `NO_LANE` where it is not."""
    there = shares >= 0
    result = np.full(len(rows), float(NO_LANE))
    if there.sum() > 1:
        ys = ANCHORS[there] * size[1]
        inside = (rows >= ys[0] - 1) & (rows <= ys[-1] + 1)
        result[inside] = np.interp(rows[inside], ys, shares[there] * size[0])
    return result


def train_dense(model: nn.Module, batches: Batches, epochs: int) -> None:
    """Train in place with Adam and a cosine schedule, in bfloat16 where the processor computes in it."""
    model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    train_epochs(model, batches, lane_loss, optimizer, schedule, epochs, "lanes", in_bfloat16=has_bfloat16())


def make_workload(model: LaneNet, name: str, batch_size: int = 32) -> slrc.Workload:
    """Return a network's workload, its dense weights trained or taken from the cache."""
    folder = find_tusimple()
    (train, is_split), (test, _) = read_labels(folder, "train"), read_labels(folder, "test")
    batches = Batches(train, model.size, batch_size, varied=is_split)
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", EPOCHS))
    dense = cache_folder() / f"tusimple{len(train)}-{name}-{epochs}epochs.safetensors"
    model = slrc.cached_weights(model, dense, lambda m: train_dense(m, batches, epochs))
    return slrc.Workload(
        model=model,
        example_inputs=(load(test[0], model.size)[0][None],),
        train_batches=batches,
        loss=lane_loss,
        evaluate=lambda net: evaluate(net, test, model.size),
        distill=lambda output, teacher: nn.functional.mse_loss(scores_of(output), teacher),
        optimizer=lambda parameters: torch.optim.Adam(parameters, LR, weight_decay=WEIGHT_DECAY),
        name=name,
        warnings=[]
        if is_split
        else [f"no tusimple/test_label.json: the metric is that of the images it trains on, unvaried; {SPLIT_HINT}"],
    )


def workload() -> slrc.Workload:
    """Return the workload of the network as published."""
    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        return make_workload(LaneNet(), "ufld")
