"""The tasks that are not classification: CamVid's images, COCO's boxes, and synthetic scenes of roads and of a lidar.

Losses, data and metrics are those of the examples; the optimiser is the package's recipe, for every method alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lanes
import pointpillars
import segmentation
import torch
import yolov3
from common.boxed_images import LetterboxedImages
from common.coco import Split, find_data, read_split
from common.dense_training import has_bfloat16
from common.segmentation_folders import Scenes
from scenes import LaneScenes, LidarScenes
from tasks import Task, start_of
from torch import nn

import slrc

SCENES, HELD_OUT = 512, 64
"""Synthetic scenes to train on; for validation, and to test on, each."""
FRAMES = 128
"""Scenes of a lidar to train on."""
LANES_SIZE, LANES_DENSE_EPOCHS = (144, 400), 15
QUARTER = pointpillars.Grid((0.0, -19.84, -3.0), (34.56, 19.84, 1.0), pillars=6_000)
PILLARS_DENSE_EPOCHS = 20
SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
"""Of the first scene of each split."""


def make_task(data: str, name: str) -> Task:
    """Return the task of a network: `camvid-unet`, `camvid-lraspp`, `coco-yolov3_tiny`, `scenes-lanes` …"""
    makers: dict[str, Callable[[str], Task]] = {"camvid": camvid_task, "coco": coco_task, "scenes": scenes_task}
    return makers[data](name)


def camvid_task(name: str) -> Task:
    """CamVid's three splits; the metric is the mean IoU."""
    splits = {split: segmentation.load_scenes(split) for split in ("train", "val", "test")}
    train, epochs = splits["train"], segmentation.EPOCHS
    batches = segmentation.Batches(train)

    def make() -> nn.Module:
        network = partial(segmentation.NETWORKS[name], len(train.classes))
        cached = f"camvid-{name}-{len(train)}-{epochs}epochs"
        return start_of(network, cached, lambda m: segmentation.train_dense(m, batches, epochs, name))

    def mean_iou(model: nn.Module, scenes: Scenes) -> float:
        return 100 * segmentation.evaluate(model, scenes)["mIoU"]

    return Task(
        make=make,
        example=(segmentation.stacked([splits["val"][0][0]]).contiguous(),),
        batches=batches,
        validation=splits["val"],
        test=splits["test"],
        bfloat16=has_bfloat16(),
        metric="mIoU",
        evaluate=mean_iou,
        others={
            "loss": segmentation.pixel_loss,
            "distill": slrc.soft_divergence,
            "calibration": segmentation.WholeImages(train),
        },
    )


def coco_task(name: str) -> Task:
    """COCO, or the pack of 128 images, whose every second validation image is to test on; the metric is mAP50.

    On the pack Darknet's weights are adapted to the training images first, so that what training does for the dense
    network is in all rows.
    """
    data, size = find_data(), yolov3.read_size()
    train, held_out = read_split(data, "train"), read_split(data, "val")
    validation, test = (Split(held_out.files[start::2], held_out.labels[start::2]) for start in (0, 1))
    rows, anchors = yolov3.NETWORKS[name]
    batches, weights = yolov3.training_batches(train, size), yolov3.weights_file(data, name)
    epochs = yolov3.SCRATCH_EPOCHS if weights is None else yolov3.ADAPT_EPOCHS

    def adapt(model: nn.Module) -> None:
        assert isinstance(model, yolov3.Darknet)
        if weights is not None:
            yolov3.load_weights(model, weights)
        yolov3.train_dense(model, batches, anchors, epochs, name)

    def average_precision(model: nn.Module, split: Split) -> float:
        return 100 * yolov3.evaluate(model, split, anchors, size)["mAP50"]

    start = "scratch" if weights is None else weights.stem
    return Task(
        make=lambda: start_of(lambda: yolov3.Darknet(rows), f"{data.stem}-{size}-{name}-{start}-{epochs}epochs", adapt),
        example=(LetterboxedImages(validation, size)[0][0][None].contiguous(),),
        batches=batches,
        validation=validation,
        test=test,
        bfloat16=has_bfloat16(),
        peak_lr=yolov3.PRUNING_LR,
        metric="mAP50",
        evaluate=average_precision,
        others=yolov3.pruned_by(anchors),
    )


def scenes_task(name: str) -> Task:
    """Synthetic scenes: `lanes`, of roads, or `pillars`, of what a lidar sees."""
    return {"lanes": lanes_task, "pillars": pillars_task}[name]()


def lanes_task(count: int = SCENES, held_out: int = HELD_OUT) -> Task:
    """Ultra-Fast-Lane-Detection at half its usual size on roads with the lanes of TuSimple's labels: its accuracy."""
    pictures, _ = lanes.read_labels(lanes.find_tusimple(), "train")
    labels = [(picture.lanes, picture.rows) for picture in pictures]
    counts = {"train": count, "validation": held_out, "test": held_out}
    splits = {split: LaneScenes(labels, counts[split], seed) for split, seed in SEEDS.items()}
    batches, epochs = lanes.Batches(splits["train"], LANES_SIZE, 16), LANES_DENSE_EPOCHS

    def accuracy(model: nn.Module, scenes: LaneScenes) -> float:
        return 100 * lanes.evaluate(model, scenes, LANES_SIZE)["accuracy"]

    def distill(output: Any, teacher: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output[0] if isinstance(output, tuple) else output, teacher)

    return Task(
        make=lambda: start_of(
            lambda: lanes.LaneNet(LANES_SIZE),
            f"scenes-lanes-{count}-{epochs}epochs",
            lambda m: lanes.train_dense(m, batches, epochs),
        ),
        example=(lanes.load(splits["test"][0], LANES_SIZE)[0][None],),
        batches=batches,
        validation=splits["validation"],
        test=splits["test"],
        bfloat16=has_bfloat16(),
        metric="accuracy",
        evaluate=accuracy,
        others={"loss": lanes.lane_loss, "distill": distill},
    )


def pillars_task(count: int = FRAMES, held_out: int = HELD_OUT) -> Task:
    """PointPillars on a quarter of its usual ground: the mean of KITTI's average precisions in space."""
    counts = {"train": count, "validation": held_out, "test": held_out}
    splits = {split: LidarScenes(QUARTER, counts[split], seed) for split, seed in SEEDS.items()}
    batches, epochs = pointpillars.Batches(splits["train"], QUARTER), PILLARS_DENSE_EPOCHS
    features, cells = pointpillars.make_pillars(splits["test"][0].points, QUARTER)

    def mean_precision(model: nn.Module, scenes: LidarScenes) -> float:
        return 100 * pointpillars.evaluate(model, scenes, QUARTER)["mean_ap"]

    def make() -> nn.Module:
        model = start_of(
            lambda: pointpillars.PointPillars(QUARTER),
            f"scenes-pillars-{count}-{epochs}epochs-settled",
            lambda m: pointpillars.train_dense(m, batches, epochs),
        )
        model.settled = True
        return model

    return Task(
        make=make,
        example=(features[None], cells[None]),
        batches=pointpillars.Batches(splits["train"], QUARTER, 1),
        validation=splits["validation"],
        test=splits["test"],
        bfloat16=has_bfloat16(),
        metric="mean_ap",
        evaluate=mean_precision,
        others={"loss": pointpillars.detection_loss, "distill": pointpillars.distance},
    )
