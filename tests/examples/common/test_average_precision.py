"""Average precision: against COCO's own program and a faster one, and by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from common.average_precision import Found, Labels, average_precision
from common.boxes import corners


def reference(found: list[Found], labels: list[Labels], *, official: bool) -> dict[str, float]:
    """What pycocotools, or `faster-coco-eval`, makes of the same."""

    def row(image: int, box: torch.Tensor, number: torch.Tensor) -> dict[str, object]:
        left, top, right, bottom = box.double().tolist()
        return {
            "image_id": image,
            "category_id": int(number) + 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
        }

    annotations = [
        {**row(i, box, number), "iscrowd": int(crowd)}
        for i, own in enumerate(labels)
        for box, number, crowd in zip(*own, strict=True)
    ]
    truth = (coco.COCO if official else COCO)()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(labels))],
        "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(5)],
    }
    truth.createIndex()
    results = [
        {**row(i, box, number), "score": float(score)}
        for i, own in enumerate(found)
        for box, score, number in zip(*own, strict=True)
    ]
    evaluation = (COCOeval if official else COCOeval_faster)(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {"mAP50": evaluation.stats[1], "mAP": evaluation.stats[0]}


def random_image(labelled: int, per_label: int, stray: int) -> tuple[Found, Labels]:
    """Labels of four classes, some of them crowds; detections near them and elsewhere, with equal scores among them."""
    boxes = torch.cat([torch.rand(labelled, 2) * 100, torch.rand(labelled, 2) * 40 + 5], -1)
    labels = Labels(corners(boxes), torch.randint(4, (labelled,)), torch.rand(labelled) < 0.2)
    near = boxes.repeat_interleave(per_label, 0) * (1 + torch.randn(labelled * per_label, 4) / 10)
    others = torch.cat([torch.rand(stray, 2) * 100, torch.rand(stray, 2) * 40 + 5], -1)
    classes = torch.cat([labels.classes.repeat_interleave(per_label), torch.randint(5, (stray,))])
    found = corners(torch.cat([near, others]))
    return Found(found, torch.randint(1, 30, (len(found),)) / 30, classes), labels


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_coco_counts(seed: int, official: bool) -> None:
    torch.manual_seed(seed)
    images = [random_image(*sizes) for sizes in [(6, 3, 5), (0, 1, 4), (3, 1, 0), (4, 60, 2), (1, 1, 1), (9, 2, 30)]]
    found, labels = (list(part) for part in zip(*images, strict=True))
    assert average_precision(found, labels) == pytest.approx(reference(found, labels, official=official), abs=1e-12)


BOX = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
ONE, SECOND = torch.tensor([0]), torch.tensor([1])
NO_CROWD = torch.tensor([False])


def test_a_box_that_is_found_exactly_counts_fully() -> None:
    perfect = [Found(BOX, torch.tensor([0.9]), ONE)]
    assert average_precision(perfect, [Labels(BOX, ONE, NO_CROWD)]) == pytest.approx({"mAP50": 1, "mAP": 1})
    assert average_precision(perfect, [Labels(BOX, SECOND, NO_CROWD)]) == {"mAP50": 0, "mAP": 0}


def test_half_a_box_counts_at_the_lowest_thresholds_alone() -> None:
    half = [Found(torch.tensor([[10.0, 10.0, 30.0, 21.0]]), torch.tensor([0.9]), ONE)]  # 0.55 of it
    found = average_precision(half, [Labels(BOX, ONE, NO_CROWD)])
    assert found["mAP50"] == pytest.approx(1)
    assert found["mAP"] in (pytest.approx(0.1), pytest.approx(0.2))


def test_a_crowd_is_neither_right_nor_wrong() -> None:
    both = Labels(torch.cat([BOX, BOX + 100]), torch.tensor([0, 0]), torch.tensor([False, True]))
    found = Found(torch.cat([BOX + 100, BOX + 105, BOX]), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 0]))
    assert average_precision([found], [both])["mAP50"] == pytest.approx(1)


def test_nothing_found_and_nothing_labelled() -> None:
    nothing = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    empty = Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    assert average_precision([nothing], [Labels(BOX, ONE, NO_CROWD)]) == {"mAP50": 0, "mAP": 0}
    assert average_precision([nothing], [empty]) == {"mAP50": 0, "mAP": 0}
