"""torchvision's detectors up to their raw heads, which is what a runtime computes of them and slrc compiles.

A detector as a whole also resizes its images, and keeps as many boxes as it finds: that stays outside.

    detector = torchvision.models.detection.retinanet_resnet50_fpn(weights="DEFAULT")
    thaw(detector)
    workload = slrc.Workload(RawHeads(detector), (torch.rand(1, 3, 800, 800),), ...)

The modules are the detector's own, by their own names: what is trained or loaded here is so there. R-CNNs have a second
stage, which sees regions that were pooled from the features of the first: `region_heads`.
"""

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


def thaw(detector: nn.Module) -> None:
    """Put batch norm that computes the same in the place of frozen one, which trained detectors have.

    What frozen one adds to a channel is a constant of the network: no mask makes it vanish, so the channel has to stay.
    Torch does not train with an epsilon of 0, which torchvision's trained RetinaNet has: each gets the usual one, and
    weights that make up for it.
    """
    for layer in list(detector.modules()):
        for name, frozen in list(layer.named_children()):
            if isinstance(frozen, FrozenBatchNorm2d):
                norm = nn.BatchNorm2d(len(frozen.weight)).to(frozen.weight)
                state = {**frozen.state_dict(), "num_batches_tracked": norm.num_batches_tracked}
                variance = frozen.running_var
                state["weight"] = frozen.weight * ((variance + norm.eps) / (variance + frozen.eps)).sqrt()
                norm.load_state_dict(state)
                layer.add_module(name, norm.train(frozen.training))


class RawHeads(nn.Module):
    """Backbone and heads of a detector with one stage; of an R-CNN, backbone and proposals.

    Args:
        detector: any of `torchvision.models.detection`.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.has_regions = hasattr(detector, "rpn")
        if self.has_regions:
            self.rpn = nn.ModuleDict({"head": detector.rpn.head})
        else:
            self.head = detector.head

    def forward(self, images: Tensor) -> dict[str, object]:
        """Images `(n, 3, h, w)`, scaled and normalised, to what the heads say of each anchor, as the detector has it.

        Of an R-CNN the result holds `objectness` and `deltas`, `(n, anchors, …)` and `(n, 4·anchors, …)` for each
        level, and the `features`, from which regions are pooled.
        """
        features = self.backbone(images)
        features = {"0": features} if isinstance(features, Tensor) else dict(features)
        levels = list(features.values())
        if not self.has_regions:
            return self.head(levels)
        objectness, deltas = self.rpn["head"](levels)
        return {"features": features, "objectness": objectness, "deltas": deltas}


class RegionHead(nn.Module):
    """A head of an R-CNN's second stage.

    Args:
        head: what sees the regions.
        predictor: what follows it.
    """

    def __init__(self, head: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.head, self.predictor = head, predictor

    def forward(self, regions: Tensor) -> object:
        """Pooled regions `(n, channels, side, side)` to what the predictor says of each."""
        return self.predictor(self.head(regions))


def region_heads(detector: nn.Module) -> dict[str, tuple[RegionHead, tuple[int, ...]]]:
    """Return the heads of an R-CNN's second stage: `box`, `mask` or `keypoint`, each with the shape of a region."""
    found, stage = {}, detector.roi_heads
    for name in ("box", "mask", "keypoint"):
        if (head := getattr(stage, f"{name}_head")) is not None:
            sides = getattr(stage, f"{name}_roi_pool").output_size
            made = RegionHead(head, getattr(stage, f"{name}_predictor"))
            found[name] = made, (detector.backbone.out_channels, *sides)
    return found
