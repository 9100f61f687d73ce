"""torchvision's detectors cut at their raw heads: they say what the detector says, prune, and are proven equal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

import slrc
from slrc.probes import make_probes
from slrc.verify import Checker, outputs_of

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from common.torchvision_detectors import RawHeads, region_heads, thaw


def backbone(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A ResNet of four blocks, and a pyramid of two levels and a pooled one."""
    body = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    levels = {"layer1": "0", "layer2": "1"}
    return BackboneWithFPN(body, levels, [64, 128], out_channels=32)


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)


def frozen_retinanet(eps: float = 1e-5) -> nn.Module:
    return RetinaNet(
        backbone(partial(FrozenBatchNorm2d, eps=eps)), 3, anchor_generator=anchors(), min_size=64, max_size=64
    )


def retinanet() -> nn.Module:
    detector = frozen_retinanet()
    thaw(detector)
    return detector


def faster_rcnn() -> nn.Module:
    return FasterRCNN(backbone(), 3, rpn_anchor_generator=anchors(), min_size=64, max_size=64)


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
@pytest.mark.parametrize(("pattern", "sparsity"), [("channel", 0.5), ("block:8x1", 0.75)])
def test_they_prune_and_are_proven_equal(
    make: Callable[[], nn.Module], pattern: str, sparsity: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    workload = slrc.Workload(RawHeads(make()).eval(), (torch.randn(1, 3, 64, 64),))
    program = slrc.capture(workload)
    plan = slrc.plan(program, pattern, sparsity)
    masks = slrc.Masks.project(plan, program.tensors)
    masks.apply_(workload.model.state_dict())
    check = Checker(workload.model, make_probes(program))
    slim = slrc.structure(program, plan, masks, check.program)
    slrc.lower(slim, "ort", tmp_path)
    assert plan.sparsity == pytest.approx(sparsity, abs=0.05)
    assert check.checks
    assert all(c.passed for c in check.checks)
    if pattern == "channel":
        assert slim.num_parameters < 0.5 * program.num_parameters


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_they_say_what_the_detector_sees(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    detector = make().eval()
    seen: list[Tensor] = []
    head = detector.rpn.head if hasattr(detector, "rpn") else detector.head
    hook = head.register_forward_hook(lambda _, x, y: seen.extend(outputs_of(lambda: y, ())))
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        detector(x)
    hook.remove()
    images, _ = detector.transform(x)
    outputs = outputs_of(RawHeads(detector), (images.tensors,))
    assert seen
    assert all(any(torch.equal(a, b) for b in outputs) for a in seen)
    assert RawHeads(detector).state_dict().keys() <= detector.state_dict().keys()


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_thawed_batch_norm_computes_the_same(eps: float) -> None:
    torch.manual_seed(0)
    detector = frozen_retinanet(eps).double().eval()
    for name, buffer in detector.backbone.named_buffers():
        buffer.uniform_(0.5, 1.5).mul_(1e-4 if "running_var" in name else 1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = outputs_of(RawHeads(detector), (x,))
    thaw(detector)
    assert not any(isinstance(layer, FrozenBatchNorm2d) for layer in detector.modules())
    for a, b in zip(before, outputs_of(RawHeads(detector), (x,)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_masked_channel_trains_though_the_frozen_epsilon_was_nothing() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4, eps=0.0))
    thaw(layers)
    with torch.no_grad():
        layers[0].weight[1] = 0
    layers.train()(torch.rand(2, 3, 8, 8)).square().sum().backward()
    assert layers[0].weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "names"),
    [(FasterRCNN, ["box"]), (MaskRCNN, ["box", "mask"]), (KeypointRCNN, ["box", "keypoint"])],
)
def test_region_heads_see_pooled_regions(make: Callable[..., nn.Module], names: list[str]) -> None:
    detector = make(backbone(), num_classes=3).eval()
    heads = region_heads(detector)
    assert list(heads) == names
    for head, shape in heads.values():
        assert all(len(y) == 2 for y in outputs_of(head, (torch.rand(2, *shape),)))
