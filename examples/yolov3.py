"""Object detection on COCO: YOLOv3-tiny and YOLOv3 (Redmon & Farhadi, arXiv 1804.02767), trained as Darknet does.

    export SLRC_DATA=~/data
    slrc compile examples/yolov3.py --pattern channel --sparsity 0.5 --epochs 20 --out build/yolov3_tiny
    slrc compile examples/yolov3.py:yolov3 --pattern block:8x1 --sparsity 0.75 --epochs 5 --out build/yolov3

`SLRC_DATA` names a folder with COCO 2017 in `coco/` (`annotations/`, `train2017/`, `val2017/`), or with `coco128.npz`,
a pack of 128 + 128 images. What is compiled is the network up to its raw heads; `find` decodes those and drops what
better boxes hide. The dense network is trained once and cached. It starts from Darknet's weights where
`$SLRC_DATA/weights` holds them, as `coco_NAME.safetensors` or as Darknet's `yolov3-tiny.weights` or `yolov3.weights`.
Also read from the environment:

- `SLRC_MODEL`: the network that `workload()` takes, `yolov3_tiny` or `yolov3`; `yolov3_tiny` unless given.
- `SLRC_SIZE`: the side of the input in pixels, a multiple of 32; 416 unless given.
- `SLRC_CACHE`: where dense networks are kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; from Darknet's weights 10 on the pack and 0 on all of COCO, from
  scratch 100 unless given.
- `SLRC_SUBSET`: take only so many training and validation images, evenly spread, with a dense network of their own.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common.average_precision import Found
from common.boxed_images import LetterboxedImages, measure, read_size, training_batches
from common.boxes import corners, iou, nms
from common.coco import CLASSES, Split, find_data, read_split
from common.darknet import FULL, TINY, Darknet, Row, load_weights
from common.dense_training import DEVICE, has_bfloat16, rise_and_fall, train_epochs
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torch.utils.data import DataLoader

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder

VALUES = 5 + CLASSES
"""Of an anchor in a cell: centre, extent, objectness and classes."""
IGNORED = 0.7
"""A box that overlaps a label by more is no error, though another one is responsible."""
LEAST_SCORE, HIDDEN, MOST_CANDIDATES = 0.001, 0.45, 2000
LR, LARGEST_GRADIENT = 1e-3, 500.0
PART, PRUNING_LR = 0.1, 3e-3
"""The part of the loss that pruning sees, whose gradients would be ten times too large for the recipe, and its rate."""
ADAPT_EPOCHS, SCRATCH_EPOCHS = 10, 100


class Network(NamedTuple):
    """The layers, and the anchors of each head: widths and heights in pixels `(heads, 3, 2)`, coarse ones first."""

    rows: list[Row]
    anchors: Tensor


NETWORKS = {
    "yolov3_tiny": Network(
        TINY, torch.tensor([[[81, 82], [135, 169], [344, 319]], [[10, 14], [23, 27], [37, 58]]], dtype=torch.float32)
    ),
    "yolov3": Network(
        FULL,
        torch.tensor(
            [
                [[116, 90], [156, 198], [373, 326]],
                [[30, 61], [62, 45], [59, 119]],
                [[10, 13], [16, 30], [33, 23]],
            ],
            dtype=torch.float32,
        ),
    ),
}


def unpack(head: Tensor) -> Tensor:
    """Return a raw head `(n, 255, h, w)` as `(n, 3, h, w, 85)`: what each cell says for each of its anchors."""
    n, _, h, w = head.shape
    return head.reshape(n, 3, VALUES, h, w).permute(0, 1, 3, 4, 2)


def decode(values: Tensor, anchors: Tensor, stride: float) -> Tensor:
    """Return the boxes of `(n, 3, h, w, 85)`, as corners in the input's pixels: `(n, 3, h, w, 4)`."""
    rows, columns = (torch.arange(side, device=values.device) for side in values.shape[2:4])
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    centre = (values[..., :2].sigmoid() + cells) * stride
    extent = values[..., 2:4].clamp(max=8).exp() * anchors[:, None, None]  # what an untrained head says may be huge
    return corners(torch.cat([centre, extent], -1))


def find(heads: Sequence[Tensor], anchors: Tensor, size: int) -> list[Found]:
    """Return what is found in each image, by falling score, in the pixels of the network's input.

    Args:
        heads: raw, `(n, 255, h, w)` each.
        anchors: `(heads, 3, 2)`.
        size: the side of the input in pixels.
    """
    values = [unpack(head.float().cpu()) for head in heads]
    boxes = torch.cat(
        [decode(v, own, size / v.shape[3]).flatten(1, 3) for v, own in zip(values, anchors, strict=True)], 1
    )
    logits = torch.cat([v[..., 4:].flatten(1, 3) for v in values], 1)
    scores = logits[..., :1].sigmoid() * logits[..., 1:].sigmoid()
    return [best_boxes(*pair) for pair in zip(boxes, scores, strict=True)]


def best_boxes(boxes: Tensor, scores: Tensor) -> Found:
    """Return those of boxes `(k, 4)` with scores `(k, 80)` that no better one of the class hides."""
    best, places = scores.flatten().topk(min(MOST_CANDIDATES, scores.numel()))
    places = places[best > LEAST_SCORE]
    owners, classes = places // CLASSES, places % CLASSES
    kept = nms(boxes[owners], best[: len(places)], HIDDEN, classes)
    return Found(boxes[owners[kept]].cpu(), best[kept].cpu(), classes[kept].cpu())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], anchors: Tensor) -> Tensor:
    """Return Darknet's loss, the sum over an image.

    Of all anchors the one whose shape is most alike is responsible for a label, in the cell where its centre lies. It
    answers for centre and classes with cross-entropies, for the logarithm of its extent with a squared error, both of
    the geometry by up to 2 for small boxes. Objectness is 1 there, 0 elsewhere, and free where a box fits anyway.

    Args:
        model: returns raw heads.
        batch: images `(n, 3, size, size)`, and labels `(n, m, 5)`: class and box in centre form in shares of the image;
            rows with a class below 0 fill up.
        anchors: `(heads, 3, 2)`.
    """
    x, labels = batch
    size, anchors = x.shape[-1], anchors.to(x.device)
    shapes = [corners(torch.cat([torch.zeros_like(s), s], -1)) for s in (labels[..., 3:] * size, anchors.flatten(0, 1))]
    best = iou(*shapes).argmax(-1)
    best[labels[..., 0] < 0] = -1
    losses = [
        head_loss(unpack(head.float()), labels, best - 3 * level, own, size)
        for level, (head, own) in enumerate(zip(model(x), anchors, strict=True))
    ]
    return torch.stack(losses).sum() / len(x)


def head_loss(values: Tensor, labels: Tensor, best: Tensor, anchors: Tensor, size: int) -> Tensor:
    """Return the loss of one head, over all images.

    Args:
        values: `(n, 3, h, w, 85)`.
        labels: `(n, m, 5)`.
        best: the anchor that is responsible, `(n, m)`; this head's are 0, 1 and 2.
        anchors: of this head, `(3, 2)`.
        size: the side of the input in pixels.
    """
    side = values.shape[3]
    with torch.no_grad():
        found = decode(values, anchors, size / side).flatten(1, 3)
        fits = (iou(found, corners(labels[..., 1:]) * size) > IGNORED).any(-1).reshape(values.shape[:-1])
    images, _ = places = torch.nonzero((best >= 0) & (best <= 2), as_tuple=True)
    own, anchor = labels[places], best[places]
    centre, extent = own[:, 1:3] * side, own[:, 3:]
    cell = centre.long().clamp(max=side - 1)
    at = (images, anchor, cell[:, 1], cell[:, 0])
    present = torch.zeros_like(values[..., 4])
    present[at] = 1
    said, weight = values[at], 2 - extent.prod(-1, keepdim=True)
    classes = one_hot(own[:, 0].long(), CLASSES).to(said.dtype)
    cross_entropy = partial(binary_cross_entropy_with_logits, reduction="sum")
    counted = ~fits | (present > 0)
    return (
        cross_entropy(values[..., 4], present, weight=counted.to(said.dtype))
        + cross_entropy(said[:, :2], centre - cell, weight=weight.expand(-1, 2))
        + (weight * (said[:, 2:4] - (extent * size / anchors[anchor]).log()).square()).sum() / 2
        + cross_entropy(said[:, 5:], classes)
    )


def distance(heads: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
    """Return how far heads are from the dense network's, the sum over an image: the loss with its answers for labels.

    Every anchor in every cell has an answer. Classes and geometry count by how sure the dense network is that an object
    is there (Mehta & Ozturk, arXiv 1805.06361).

    Args:
        heads: raw, `(n, 255, h, w)` each.
        taught: the dense network's, of the same shapes.
    """
    cross_entropy, distances = partial(binary_cross_entropy_with_logits, reduction="none"), []
    for own, theirs in zip(heads, taught, strict=True):
        said, right = unpack(own.float()), unpack(theirs.float())
        shares, there = right.sigmoid(), right[..., 4].sigmoid()
        answered = (
            cross_entropy(said[..., :2], shares[..., :2]).sum(-1)
            + (said[..., 2:4] - right[..., 2:4]).square().sum(-1) / 2
            + cross_entropy(said[..., 5:], shares[..., 5:]).sum(-1)
        )
        distances.append((cross_entropy(said[..., 4], there) + there * answered).sum() / len(own))
    return torch.stack(distances).sum()


def pruned_by(anchors: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Return a workload's `loss` and `distill`: parts of the loss and of the distance, see `PART`."""
    return {
        "loss": lambda model, batch: PART * loss(model, batch, anchors),
        "distill": lambda heads, taught: PART * distance(heads, taught),
    }


def evaluate(model: Callable[[Tensor], Sequence[Tensor]], split: Split, anchors: Tensor, size: int) -> dict[str, float]:
    """Return `mAP50` and `mAP` of anything that returns raw heads, on the device of its parameters, if it has any."""
    return measure(model, partial(find, anchors=anchors, size=size), split, size)


def weights_file(data: Path, name: str) -> Path | None:
    """Return the file of Darknet's weights, if there is one."""
    files = (
        data.parent / "weights" / file for file in (f"coco_{name}.safetensors", f"{name}.weights".replace("_", "-"))
    )
    return next((file for file in files if file.exists()), None)


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return Darknet's optimiser."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)


def train_dense(model: nn.Module, batches: DataLoader, anchors: Tensor, epochs: int, name: str) -> None:
    """Train in place, the learning rate rising and falling once, in bfloat16 where the processor computes in it."""
    model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model.parameters(), LR)

    def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, labels = batch
        return loss(model, (x.to(memory_format=torch.channels_last), labels), anchors)

    schedule, clip = rise_and_fall(optimizer, epochs * len(batches)), LARGEST_GRADIENT
    train_epochs(model, batches, loss_of, optimizer, schedule, epochs, name, clip=clip, in_bfloat16=has_bfloat16())


def make_workload(name: str) -> slrc.Workload:
    """Return the workload of a network in `NETWORKS`, its dense weights trained or taken from the cache."""
    data, size = find_data(), read_size()
    splits, subset = [read_split(data, split) for split in ("train", "val")], ""
    if "SLRC_SUBSET" in os.environ:
        splits = [split.spread(int(os.environ["SLRC_SUBSET"])) for split in splits]
        subset = f"-{os.environ['SLRC_SUBSET']}"
    (training, validation), (rows, anchors) = splits, NETWORKS[name]
    batches, weights = training_batches(training, size), weights_file(data, name)
    usual = SCRATCH_EPOCHS if weights is None else 0 if data.is_dir() else ADAPT_EPOCHS
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", usual))
    start = "" if weights is None else f"-from-{weights.stem}"
    dense = cache_folder() / f"{data.stem}{subset}-{size}-{name}{start}-{epochs}epochs.safetensors"

    def train(model: nn.Module) -> None:
        assert isinstance(model, Darknet)
        if weights is not None:
            load_weights(model, weights)
        train_dense(model, batches, anchors, epochs, name)

    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        model = slrc.cached_weights(Darknet(rows), dense, train)
    return slrc.Workload(
        model=model,
        example_inputs=(LetterboxedImages(validation, size)[0][0][None].contiguous(),),
        train_batches=batches,
        **pruned_by(anchors),
        evaluate=partial(evaluate, split=validation, anchors=anchors, size=size),
        optimizer=lambda parameters: make_optimizer(parameters, PRUNING_LR),
        name=f"coco-{name}",
    )


yolov3_tiny = partial(make_workload, "yolov3_tiny")
yolov3 = partial(make_workload, "yolov3")


def workload() -> slrc.Workload:
    """Return the workload of the network that `SLRC_MODEL` names."""
    name = os.environ.get("SLRC_MODEL", "yolov3_tiny")
    if name not in NETWORKS:
        raise WorkloadError(f"`SLRC_MODEL={name}` is unknown", hint=f"choose one of {', '.join(NETWORKS)}")
    return make_workload(name)
