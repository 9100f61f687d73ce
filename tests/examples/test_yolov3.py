"""The YOLOv3 example: decoding, loss, metric, and a compile of a narrow network on images made on the spot."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.errors import WorkloadError
from slrc.load_workload import load_workload

FILE = Path(__file__).parents[2] / "examples" / "yolov3.py"
ANCHORS = torch.tensor([[[20.0, 20.0], [40.0, 30.0], [60.0, 60.0]], [[5.0, 5.0], [8.0, 12.0], [14.0, 8.0]]])
SIZE = 64


@pytest.fixture
def yolov3(import_example: Callable[[str], ModuleType]) -> ModuleType:
    return import_example("yolov3")


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def ideal_heads(size: int) -> list[Tensor]:
    """Heads that are sure of one box of class 7: centre (25, 39), 40×30 pixels."""
    heads = [torch.zeros(1, 3, 85, size // stride, size // stride) for stride in (32, 16)]
    for head in heads:
        head[:, :, 4] = -20
    cell = heads[0][0, 1, :, 39 // 32, 25 // 32]
    cell[:] = torch.tensor([logit(25 / 32), logit(39 / 32 - 1), 0, 0, 20, *[-20] * 80])
    cell[5 + 7] = 20
    return [head.flatten(1, 2) for head in heads]


class Says(nn.Module):
    """Returns the same heads for every image."""

    def __init__(self, heads: list[Tensor]) -> None:
        super().__init__()
        self.heads = nn.ParameterList(heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(head.expand(len(x), -1, -1, -1) for head in self.heads)


def test_what_ideal_heads_say_is_found(yolov3: ModuleType) -> None:
    [found] = yolov3.find(ideal_heads(SIZE), ANCHORS, SIZE)
    assert found.classes.tolist() == [7]
    assert found.scores.item() == pytest.approx(1)
    assert found.boxes[0].tolist() == pytest.approx([5, 24, 45, 54], abs=1e-4)


def test_the_loss_of_ideal_heads_is_nothing(yolov3: ModuleType) -> None:
    label = torch.tensor([[[7, 25 / SIZE, 39 / SIZE, 40 / SIZE, 30 / SIZE], [-1.0] * 5]])
    batch = torch.zeros(1, 3, SIZE, SIZE), label
    model = Says(ideal_heads(SIZE))
    # The cross-entropy of a centre with itself is the entropy of where it lies in its cell.
    weight = 2 - 40 / SIZE * 30 / SIZE
    entropy = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in (25 / 32, 39 / 32 - 1)) * weight
    least = yolov3.loss(model, batch, ANCHORS)
    assert least.item() == pytest.approx(entropy, abs=1e-4)
    for shift in ([0, 9 / SIZE, 0, 0, 0], [0, 0, 0, 8 / SIZE, -5 / SIZE], [1, 0, 0, 0, 0]):  # areas stay
        moved = label.clone()
        moved[0, 0] += torch.tensor(shift)
        assert yolov3.loss(model, (batch[0], moved), ANCHORS) > least + 1e-3
    least.backward()
    assert all(head.grad.abs().max() < 1e-4 for head in model.heads)


def test_the_loss_is_the_mean_over_images_with_any_number_of_labels(yolov3: ModuleType) -> None:
    torch.manual_seed(0)
    model = Says([torch.randn(1, 255, SIZE // stride, SIZE // stride) for stride in (32, 16)])
    labels = torch.tensor([[[3, 0.5, 0.5, 0.3, 0.2], [4, 0.2, 1.0, 0.1, 0.1]], [[-1.0] * 5] * 2])
    x = torch.zeros(2, 3, SIZE, SIZE)
    both = yolov3.loss(model, (x, labels), ANCHORS)
    alone = [yolov3.loss(model, (x[:1], own), ANCHORS) for own in (labels[:1], labels[1:, :0])]
    torch.testing.assert_close(both, sum(alone) / 2)


def test_the_distance_is_least_from_the_same_heads(yolov3: ModuleType) -> None:
    torch.manual_seed(0)
    taught = [torch.randn(2, 255, SIZE // stride, SIZE // stride) for stride in (32, 16)]
    same = [head.clone().requires_grad_() for head in taught]
    least = yolov3.distance(same, taught)
    least.backward()
    assert all(head.grad.abs().max() < 1e-6 for head in same)
    for value in (0, 2, 4, 50):  # centre, extent, objectness, a class
        moved = [head.clone() for head in taught]
        moved[1][:, value] += 1
        assert yolov3.distance(moved, taught) > least + 1e-3
    alone = [yolov3.distance([h[k : k + 1] + 1 for h in taught], [h[k : k + 1] for h in taught]) for k in (0, 1)]
    torch.testing.assert_close(yolov3.distance([h + 1 for h in taught], taught), sum(alone) / 2)


def test_a_box_that_fits_anyway_is_no_error(yolov3: ModuleType) -> None:
    label = torch.tensor([[[7, 25 / SIZE, 39 / SIZE, 40 / SIZE, 30 / SIZE]]])
    heads = ideal_heads(SIZE)
    other = heads[0].view(1, 3, 85, 2, 2)[0, 2, :, 1, 0]  # another anchor of the cell, with the same box
    other[:] = torch.tensor([logit(25 / 32), logit(39 / 32 - 1), math.log(40 / 60), math.log(30 / 60), 5, *[-20] * 80])
    least = yolov3.loss(Says(ideal_heads(SIZE)), (torch.zeros(1, 3, SIZE, SIZE), label), ANCHORS)
    found = yolov3.loss(Says(heads), (torch.zeros(1, 3, SIZE, SIZE), label), ANCHORS)
    assert found.item() == pytest.approx(least.item(), abs=1e-4)
    other[2] = 1  # too wide
    assert yolov3.loss(Says(heads), (torch.zeros(1, 3, SIZE, SIZE), label), ANCHORS) > least + 1


def test_the_metric_takes_anything_that_returns_heads(
    yolov3: ModuleType, write_coco_pack: Callable[[int], None]
) -> None:
    write_coco_pack(1)
    split = yolov3.read_split(yolov3.find_data(), "val")
    box = torch.tensor([[5.0, 24.0, 45.0, 54.0]])
    split.labels[0] = split.labels[0]._replace(boxes=box, classes=torch.tensor([7]))
    perfect = pytest.approx({"mAP50": 1, "mAP": 1})
    assert yolov3.evaluate(lambda x: ideal_heads(SIZE), split, ANCHORS, SIZE) == perfect
    assert yolov3.evaluate(Says(ideal_heads(SIZE)), split, ANCHORS, SIZE) == perfect
    split.labels[0] = split.labels[0]._replace(classes=torch.tensor([8]))
    assert yolov3.evaluate(Says(ideal_heads(SIZE)), split, ANCHORS, SIZE) == {"mAP50": 0, "mAP": 0}


def narrow(yolov3: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a network of a few layers in the place of YOLOv3-tiny."""
    rows = [
        *[row for width in (8, 16, 16, 32) for row in (("conv", width, 3, 1), ("pool", 2))],
        *[("conv", 32, 3, 1), ("pool", 2), ("conv", 32, 3, 1), ("head",), ("yolo",)],
        *[("route", -3), ("conv", 16, 1, 1), ("upsample",), ("route", -1, 8), ("conv", 32, 3, 1), ("head",), ("yolo",)],
    ]
    monkeypatch.setitem(yolov3.NETWORKS, "yolov3_tiny", yolov3.Network(rows, ANCHORS))


def test_it_learns_to_find_what_is_made_on_the_spot(
    yolov3: ModuleType, write_coco_pack: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco_pack(8)
    narrow(yolov3, monkeypatch)
    boxed_images = importlib.import_module("common.boxed_images")
    split = yolov3.read_split(yolov3.find_data(), "train")
    torch.manual_seed(0)
    model = yolov3.Darknet(yolov3.NETWORKS["yolov3_tiny"].rows)
    shown = [yolov3.LetterboxedImages(split, SIZE)[i][0] for i in range(8)]
    rows = [
        torch.cat([own.classes[:, None], (b[:, :2] + b[:, 2:]) / 2 / SIZE, (b[:, 2:] - b[:, :2]) / SIZE], -1)
        for own in split.labels
        for b in [own.boxes]
    ]
    batch = boxed_images.stack_labelled(list(zip(shown, rows, strict=True)))
    monkeypatch.setattr(yolov3, "LR", 0.01)
    yolov3.train_dense(model, [batch] * 20, ANCHORS, 8, "narrow")
    assert yolov3.evaluate(model.eval(), split, ANCHORS, SIZE)["mAP50"] > 0.8


@pytest.mark.usefixtures("quick_timing")
def test_the_short_form_compiles(
    yolov3: ModuleType,
    write_coco_pack: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_coco_pack(4)
    narrow(yolov3, monkeypatch)
    for name, value in (("SLRC_SIZE", str(SIZE)), ("SLRC_DENSE_EPOCHS", "1"), ("SLRC_SUBSET", "3")):
        monkeypatch.setenv(name, value)
    workload = yolov3.workload()
    assert workload.name == "coco-yolov3_tiny"
    assert workload.example_inputs[0].shape == (1, 3, SIZE, SIZE)
    assert "dense yolov3_tiny: epoch 1/1, loss" in capsys.readouterr().err
    report = slrc.compile(
        workload, tmp_path / "out", pattern="channel", sparsity=0.5, epochs=1, retrain_epochs=0, threads=1
    )
    assert report.checks
    assert all(check.passed for check in report.checks)
    assert "mAP50: masked module = ort" in {check.step for check in report.checks}


def test_batches_vary_and_follow_the_seed(yolov3: ModuleType, write_coco_pack: Callable[[int], None]) -> None:
    write_coco_pack(5)
    batches = yolov3.training_batches(yolov3.read_split(yolov3.find_data(), "train"), SIZE)
    torch.manual_seed(0)
    (x, y), (other, _) = next(iter(batches)), next(iter(batches))
    torch.manual_seed(0)
    again, labels = next(iter(batches))
    assert x.shape == (5, 3, SIZE, SIZE)
    assert y.shape[::2] == (5, 5)
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    assert not torch.equal(x, other)


def test_darknets_weights_are_found(yolov3: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "data" / "coco"
    assert yolov3.weights_file(data, "yolov3_tiny") is None
    (tmp_path / "data" / "weights").mkdir()
    (tmp_path / "data" / "weights" / "yolov3-tiny.weights").touch()
    assert yolov3.weights_file(data, "yolov3_tiny").name == "yolov3-tiny.weights"
    (tmp_path / "data" / "weights" / "coco_yolov3_tiny.safetensors").touch()
    assert yolov3.weights_file(data, "yolov3_tiny").name == "coco_yolov3_tiny.safetensors"
    assert yolov3.weights_file(data, "yolov3") is None


def test_mistakes_are_named(
    yolov3: ModuleType, write_coco_pack: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no COCO in `SLRC_DATA=.*cocodataset\.org"):
        load_workload(f"{FILE}:yolov3")
    monkeypatch.setenv("SLRC_MODEL", "yolov4")
    with pytest.raises(WorkloadError, match=r"`SLRC_MODEL=yolov4` is unknown\n\nhint: .*yolov3_tiny"):
        load_workload(str(FILE))
    write_coco_pack(1)
    monkeypatch.delenv("SLRC_MODEL")
    for size in ("400", "0", "big"):
        monkeypatch.setenv("SLRC_SIZE", size)
        with pytest.raises(WorkloadError, match=f"`SLRC_SIZE={size}` must be a multiple of 32"):
            load_workload(str(FILE))
