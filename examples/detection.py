"""Object detection on COCO by torchvision's detectors: SSDLite (arXiv 1905.02244) and RetinaNet (arXiv 1708.02002).

    export SLRC_DATA=~/data
    slrc compile examples/detection.py --pattern channel --sparsity 0.5 --epochs 20 --out build/ssdlite
    slrc compile examples/detection.py:retinanet --pattern block:8x1 --sparsity 0.75 --epochs 5 --out build/retinanet

`SLRC_DATA` names a folder with COCO 2017 in `coco/` (`annotations/`, `train2017/`, `val2017/`), or with `coco128.npz`,
a pack of 128 + 128 images. What is compiled is the network up to its raw heads; anchors, loss and what makes boxes of
the heads are the detector's own. The dense network is trained once and cached. It starts from torchvision's weights
where `$SLRC_DATA/weights` holds them, as `coco_NAME.safetensors` or under the name that torchvision downloads them by.
Also read from the environment:

- `SLRC_MODEL`: the detector that `workload()` takes, `ssdlite` or `retinanet`; `ssdlite` unless given.
- `SLRC_SIZE`: the side of the input in pixels, a multiple of 32; 320 and 800 unless given.
- `SLRC_CACHE`: where dense networks are kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; from torchvision's weights 10 on the pack and 0 on all of COCO, from
  scratch 100 unless given.
- `SLRC_SUBSET`: take only so many training and validation images, evenly spread, with a dense network of their own.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common.average_precision import Found
from common.boxed_images import LetterboxedImages, measure, read_size, training_batches
from common.boxes import corners
from common.coco import CLASSES, Split, find_data, read_split
from common.dense_training import DEVICE, rise_and_fall, train_epochs
from common.torchvision_detectors import RawHeads, thaw
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax, smooth_l1_loss
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder

NAMES = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
"""Torchvision's labels: COCO's categories by their own numbers, of which some are not in use, and 0 for nothing."""
LABEL_OF = torch.tensor([label for label, name in enumerate(NAMES) if name not in ("__background__", "N/A")])
"""The label of each of the classes, `(80,)`; below the class of each label, -1 for none."""
CLASS_OF = torch.full((len(NAMES),), -1).index_copy(0, LABEL_OF, torch.arange(CLASSES))
FOCAL_GAMMA = 2.0
ADAPT_EPOCHS, SCRATCH_EPOCHS = 10, 100
LARGEST_GRADIENT = 10.0
PRUNING = 0.3
"""The rate of pruning, as a share of that of dense training."""

Heads = Mapping[str, Tensor]
"""Raw heads: `cls_logits` `(n, anchors, labels)` and `bbox_regression` `(n, anchors, 4)`."""


make_ssdlite = partial(ssdlite320_mobilenet_v3_large, weights=None, weights_backbone=None)


def make_retinanet() -> nn.Module:
    """Return RetinaNet on a ResNet-50 with random weights, its batch norm frozen as in torchvision's trained one."""
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    norm = partial(FrozenBatchNorm2d, eps=0.0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=5, **levels
    )
    return RetinaNet(backbone, len(NAMES))


class Network(NamedTuple):
    """How a detector is made, its weights, the side of its input, the images in a batch and the rate for them."""

    make: Callable[[], nn.Module]
    weights: WeightsEnum
    size: int
    batch: int
    lr: float


NETWORKS = {
    "ssdlite": Network(make_ssdlite, SSDLite320_MobileNet_V3_Large_Weights.COCO_V1, 320, 16, 0.01),
    "retinanet": Network(make_retinanet, RetinaNet_ResNet50_FPN_Weights.COCO_V1, 800, 8, 0.005),
}


class NormalizedHeads(RawHeads):
    """Raw heads of images whose pixels are from 0 to 1, which the detector's own transform would normalise."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(detector.transform, f"image_{name}"))
            self.register_buffer(name, values[:, None, None])

    def forward(self, images: Tensor) -> dict[str, object]:
        """Images `(n, 3, h, w)` to raw heads."""
        return super().forward((images - self.mean) / self.std)


def make_anchors(detector: nn.Module, size: int) -> list[Tensor]:
    """Return a detector's anchors in an image of a size, in pixels, of each level: `(anchors, 4)`."""
    image = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        levels = list(detector.eval().backbone(image).values())
    anchors = detector.anchor_generator(ImageList(image, [(size, size)]), levels)[0]
    in_cell = detector.anchor_generator.num_anchors_per_location()
    return list(anchors.split([n * level.shape[2:].numel() for n, level in zip(in_cell, levels, strict=True)]))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], detector: nn.Module, anchors: Sequence[Tensor]) -> Tensor:
    """Return a detector's own loss.

    Args:
        model: returns raw heads.
        batch: images `(n, 3, size, size)`, and labels `(n, m, 5)`: class and box in centre form in shares of the image;
            rows with a class below 0 fill up.
        detector: whose heads these are.
        anchors: `(anchors, 4)` of each level.
    """
    x, labels = batch
    heads = {name: head.float() for name, head in model(x).items()}
    boxes, targets, matched = torch.cat(list(anchors)).to(x.device), [], []
    for own in labels:
        own = own[own[:, 0] >= 0]
        label = LABEL_OF.to(x.device)[own[:, 0].long()]
        targets.append({"boxes": corners(own[:, 1:]) * x.shape[-1], "labels": label})
        overlaps = box_iou(targets[-1]["boxes"], boxes)
        matched.append(detector.proposal_matcher(overlaps) if len(own) else torch.full_like(boxes[:, 0], -1).long())
    compute = detector.head.compute_loss if isinstance(detector, RetinaNet) else detector.compute_loss
    return torch.stack(list(compute(targets, heads, [boxes] * len(x), matched).values())).sum()


def distance(heads: Heads, taught: Heads, detector: nn.Module) -> Tensor:
    """Return how far raw heads are from the dense network's: the loss with its answers for labels.

    Boxes count by how sure the dense network is that an object is there; the sum is divided by how many it finds so.
    SSD's labels exclude each other. RetinaNet's do not: theirs is the focal loss for shares (Li et al., arXiv
    2006.04388).
    """
    said, right = heads["cls_logits"].float(), taught["cls_logits"].float()
    if isinstance(detector, RetinaNet):
        shares = right.sigmoid()
        there = shares.amax(-1)
        weight = (said.sigmoid() - shares).abs() ** FOCAL_GAMMA
        apart = (weight * binary_cross_entropy_with_logits(said, shares, reduction="none")).sum(-1)
    else:
        there = 1 - right.softmax(-1)[..., 0]
        apart = kl_div(log_softmax(said, -1), log_softmax(right, -1), log_target=True, reduction="none").sum(-1)
    off = smooth_l1_loss(heads["bbox_regression"].float(), taught["bbox_regression"].float(), reduction="none").sum(-1)
    return (apart + there * off).sum() / there.sum().clamp(min=1)


def find(heads: Heads, detector: nn.Module, anchors: Sequence[Tensor], size: int) -> list[Found]:
    """Return what the detector makes of its raw heads, in the pixels of the network's input."""
    heads = {name: head.float().cpu() for name, head in heads.items()}
    images = len(heads["cls_logits"])
    if isinstance(detector, RetinaNet):
        counts = [len(level) for level in anchors]
        given = {name: list(head.split(counts, 1)) for name, head in heads.items()}, [list(anchors)] * images
    else:
        given = heads, [torch.cat(list(anchors))] * images
    found = []
    for own in detector.postprocess_detections(*given, [(size, size)] * images):
        classes = CLASS_OF[own["labels"]]
        known = classes >= 0
        found.append(Found(own["boxes"][known], own["scores"][known], classes[known]))
    return found


def evaluate(
    model: Callable[[Tensor], Heads], split: Split, detector: nn.Module, anchors: Sequence[Tensor], size: int
) -> dict[str, float]:
    """Return `mAP50` and `mAP` of anything that returns raw heads, on the device of its parameters, if it has any."""
    return measure(model, partial(find, detector=detector, anchors=anchors, size=size), split, size)


def weights_file(data: Path, name: str) -> Path | None:
    """Return the file of torchvision's weights, if there is one."""
    names = f"coco_{name}.safetensors", Path(NETWORKS[name].weights.url).name
    return next((file for file in (data.parent / "weights" / own for own in names) if file.exists()), None)


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return the optimiser."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-5)


def make_workload(name: str) -> slrc.Workload:
    """Return the workload of a network in `NETWORKS`, its dense weights trained or taken from the cache."""
    data, network = find_data(), NETWORKS[name]
    size, splits, subset = read_size(network.size), [read_split(data, split) for split in ("train", "val")], ""
    if "SLRC_SUBSET" in os.environ:
        splits = [split.spread(int(os.environ["SLRC_SUBSET"])) for split in splits]
        subset = f"-{os.environ['SLRC_SUBSET']}"
    training, validation = splits
    batches, weights = training_batches(training, size, network.batch), weights_file(data, name)
    usual = SCRATCH_EPOCHS if weights is None else 0 if data.is_dir() else ADAPT_EPOCHS
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", usual))
    start = "" if weights is None else f"-from-{weights.stem}"
    dense = cache_folder() / f"{data.stem}{subset}-{size}-{name}{start}-{epochs}epochs.safetensors"
    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        detector = network.make()
        if weights is not None:
            is_pickled = weights.suffix == ".pth"
            detector.load_state_dict(torch.load(weights, weights_only=True) if is_pickled else load_file(weights))
        thaw(detector)
        own = {"detector": detector, "anchors": make_anchors(detector, size)}

        def train(model: nn.Module) -> None:
            model.to(DEVICE, memory_format=torch.channels_last).train()
            optimizer = make_optimizer(model.parameters(), network.lr)
            schedule = rise_and_fall(optimizer, epochs * len(batches))
            train_epochs(model, batches, partial(loss, **own), optimizer, schedule, epochs, name, clip=LARGEST_GRADIENT)

        model = slrc.cached_weights(NormalizedHeads(detector), dense, train)
    return slrc.Workload(
        model=model,
        example_inputs=(LetterboxedImages(validation, size)[0][0][None].contiguous(),),
        train_batches=batches,
        loss=partial(loss, **own),
        distill=partial(distance, detector=detector),
        evaluate=partial(evaluate, split=validation, size=size, **own),
        optimizer=lambda parameters: make_optimizer(parameters, PRUNING * network.lr),
        name=f"coco-{name}",
    )


ssdlite = partial(make_workload, "ssdlite")
retinanet = partial(make_workload, "retinanet")


def workload() -> slrc.Workload:
    """Return the workload of the network that `SLRC_MODEL` names."""
    name = os.environ.get("SLRC_MODEL", "ssdlite")
    if name not in NETWORKS:
        raise WorkloadError(f"`SLRC_MODEL={name}` is unknown", hint=f"choose one of {', '.join(NETWORKS)}")
    return make_workload(name)
