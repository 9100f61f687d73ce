"""Torchvision's detectors as an example: loss and boxes are the detector's own, and a small one compiles."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

import slrc
from slrc.errors import WorkloadError
from slrc.load_workload import load_workload

FILE = Path(__file__).parents[2] / "examples" / "detection.py"
SIZE = 64


@pytest.fixture
def detection(import_example: Callable[[str], ModuleType]) -> ModuleType:
    return import_example("detection")


class Backbone(nn.Module):
    """Features at an eighth and a sixteenth of an image's size."""

    out_channels = 16

    def __init__(self, norm: Any) -> None:
        super().__init__()
        widths = (3, 8, 16, 16)
        layers = [nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairwise(widths)]
        self.fine = nn.Sequential(*(part for conv in layers for part in (conv, norm(conv.out_channels), nn.ReLU())))
        self.coarse = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"fine": fine, "coarse": self.coarse(fine)}


def ssd(norm: Any = nn.BatchNorm2d) -> nn.Module:
    backbone = Backbone(norm)
    backbone.out_channels = [16, 16]
    return SSD(backbone, DefaultBoxGenerator([[2], [2]]), (SIZE, SIZE), 91)


def retinanet(norm: Any = FrozenBatchNorm2d) -> nn.Module:
    anchors = AnchorGenerator(((8, 16), (24, 40)), ((0.5, 1.0, 2.0),) * 2)
    return RetinaNet(Backbone(norm), 91, min_size=SIZE, max_size=SIZE, anchor_generator=anchors)


SMALL = {"ssdlite": ssd, "retinanet": retinanet}


@pytest.fixture
def small(detection: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small detectors of both kinds in the place of torchvision's."""
    for name, make in SMALL.items():
        monkeypatch.setitem(detection.NETWORKS, name, detection.NETWORKS[name]._replace(make=make, size=SIZE))


def test_classes_are_torchvisions_labels_in_order(detection: ModuleType) -> None:
    names = [detection.NAMES[label] for label in detection.LABEL_OF]
    assert len(names) == detection.CLASSES
    assert (names[0], names[11], names[79]) == ("person", "stop sign", "toothbrush")
    assert detection.CLASS_OF[detection.LABEL_OF].equal(torch.arange(80))
    assert (detection.CLASS_OF[[0, 12, 26]] == -1).all()


@pytest.mark.parametrize("make", [*SMALL.values(), "ssdlite"])
def test_the_loss_is_the_detectors_own(detection: ModuleType, make: Any) -> None:
    torch.manual_seed(0)
    detector, size = (detection.make_ssdlite(), 320) if make == "ssdlite" else (make(nn.BatchNorm2d), SIZE)
    anchors = detection.make_anchors(detector, size)
    images = torch.rand(3, 3, size, size)
    labels = torch.full((3, 2, 5), -1.0)
    labels[0] = torch.tensor([[0, 26, 32, 20, 16], [79, 38, 20, 8, 12]]) / torch.tensor([1, 64, 64, 64, 64])
    labels[2, 0] = torch.tensor([11, 0.5, 0.5, 0.875, 0.75])
    boxes = torch.tensor([[16.0, 24, 36, 40], [34, 14, 42, 26], [4, 8, 60, 56]]) * size / 64
    numbers = torch.tensor([1, 90, 13])
    targets = [{"boxes": boxes[own], "labels": numbers[own]} for own in (slice(0, 2), slice(0, 0), slice(2, 3))]
    detector.train()
    expected = sum(detector(list(images), targets).values())
    found = detection.loss(detection.NormalizedHeads(detector).train(), (images, labels), detector, anchors)
    torch.testing.assert_close(found, expected)
    assert found > 0


@pytest.mark.parametrize("make", SMALL.values())
def test_what_is_found_is_what_the_detector_finds(detection: ModuleType, make: Any) -> None:
    torch.manual_seed(0)
    detector = make(nn.BatchNorm2d)
    detector.score_thresh = 0.001
    anchors = detection.make_anchors(detector, SIZE)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        whole = detector.eval()(list(images))
        found = detection.find(detection.NormalizedHeads(detector).eval()(images), detector, anchors, SIZE)
    for own, expected in zip(found, whole, strict=True):
        classes = detection.CLASS_OF[expected["labels"]]
        assert 0 < len(own.boxes) < len(classes)  # an untrained network finds labels that are not in use
        torch.testing.assert_close(own.boxes, expected["boxes"][classes >= 0])
        torch.testing.assert_close(own.scores, expected["scores"][classes >= 0])
        assert own.classes.equal(classes[classes >= 0])


@pytest.mark.parametrize("make", SMALL.values())
def test_the_distance_is_least_from_the_same_heads(detection: ModuleType, make: Any) -> None:
    torch.manual_seed(0)
    taught = {"cls_logits": torch.randn(2, 30, 91), "bbox_regression": torch.randn(2, 30, 4)}
    same = {name: head.clone().requires_grad_() for name, head in taught.items()}
    least = detection.distance(same, taught, make())
    least.backward()
    assert least.item() == pytest.approx(0, abs=1e-5)
    assert all(head.grad.abs().max() < 1e-5 for head in same.values())
    for name in taught:
        moved = {**taught, name: taught[name] + torch.randn(taught[name].shape)}
        assert detection.distance(moved, taught, make()) > 0.1


@pytest.mark.usefixtures("quick_timing", "small")
@pytest.mark.parametrize("name", SMALL)
def test_the_short_form_compiles(
    detection: ModuleType,
    name: str,
    write_coco_pack: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_coco_pack(4)
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "1")
    monkeypatch.setenv("SLRC_SUBSET", "3")
    workload = getattr(detection, name)()
    assert workload.name == f"coco-{name}"
    assert workload.example_inputs[0].shape == (1, 3, SIZE, SIZE)
    assert f"dense {name}: epoch 1/1, loss" in capsys.readouterr().err
    report = slrc.compile(
        workload, tmp_path / "out", pattern="channel", sparsity=0.5, epochs=1, retrain_epochs=0, threads=1
    )
    assert all(check.passed for check in report.checks)
    assert "mAP50: masked module = ort" in {check.step for check in report.checks}


@pytest.mark.usefixtures("small")
def test_torchvisions_weights_are_found_and_loaded(
    detection: ModuleType,
    write_coco_pack: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_coco_pack(1)
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "0")
    (folder := tmp_path / "data" / "weights").mkdir()
    assert detection.weights_file(detection.find_data(), "retinanet") is None
    detector = retinanet()
    nn.init.constant_(detector.backbone.fine[1].bias, 0.5)
    torch.save(detector.state_dict(), folder / "retinanet_resnet50_fpn_coco-eeacb38b.pth")
    assert detection.retinanet().model.backbone.fine[1].bias.eq(0.5).all()
    nn.init.constant_(detector.backbone.fine[1].bias, 0.25)
    save_file(detector.state_dict(), folder / "coco_retinanet.safetensors")
    assert detection.retinanet().model.backbone.fine[1].bias.eq(0.25).all()


def test_the_published_networks_are_made(detection: ModuleType) -> None:
    sizes = {name: sum(p.numel() for p in network.make().parameters()) for name, network in detection.NETWORKS.items()}
    assert sizes["ssdlite"] == 3_440_060
    frozen = detection.make_retinanet()
    detection.thaw(frozen)
    assert sum(p.numel() for p in frozen.parameters()) == 34_014_999 + 53_120
    state = frozen.state_dict()
    assert "head.classification_head.cls_logits.weight" in state
    assert "backbone.fpn.extra_blocks.p7.weight" in state


def test_mistakes_are_named(detection: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no COCO in `SLRC_DATA=.*cocodataset\.org"):
        load_workload(f"{FILE}:retinanet")
    monkeypatch.setenv("SLRC_MODEL", "fcos")
    with pytest.raises(WorkloadError, match=r"`SLRC_MODEL=fcos` is unknown\n\nhint: .*ssdlite"):
        load_workload(str(FILE))
