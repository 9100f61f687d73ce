"""The lanes example on synthetic images: labels, losses, decoding, the last layer and a compile."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import slrc
from slrc.errors import WorkloadError
from slrc.load_workload import load_workload

FILE = Path(__file__).parents[2] / "examples" / "lanes.py"
ROWS = np.arange(100, 288, 4)
"""The rows of labels, in images of 512 by 288 pixels."""
AT_TOP, AT_BOTTOM = (216.0, 246.0, 266.0, 306.0), (-84.0, 136.0, 376.0, 606.0)
"""Columns of four synthetic lanes in the first row and in the last."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a data folder and a cache of its own."""
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("lanes")


def synthetic_lanes() -> list[np.ndarray]:
    share = (ROWS - ROWS[0]) / (ROWS[-1] - ROWS[0])
    lanes = [top + (bottom - top) * share for top, bottom in zip(AT_TOP, AT_BOTTOM, strict=True)]
    return [np.where((lane >= 0) & (lane < 512), lane.round(), -2) for lane in lanes]


@pytest.fixture
def pictures(example: ModuleType, tmp_path: Path) -> Any:
    """Two synthetic images: grey road with four white lanes, and with the two in the middle."""
    folder = tmp_path / "data" / "tusimple"
    (folder / "clips").mkdir(parents=True)
    lines = []
    for number, chosen in enumerate((slice(0, 4), slice(1, 3))):
        image = Image.new("RGB", (512, 288), (90, 90, 90))
        lanes = synthetic_lanes()[chosen]
        for lane in lanes:
            points = [(float(x), float(y)) for x, y in zip(lane, ROWS, strict=True) if x >= 0]
            ImageDraw.Draw(image).line(points, (255, 255, 255), 5)
        image.save(folder / "clips" / f"{number}.png")
        fields = {"lanes": [lane.tolist() for lane in lanes], "h_samples": ROWS.tolist()}
        lines.append(json.dumps({**fields, "raw_file": f"clips/{number}.png"}))
    (folder / "label_data_0.json").write_text("\n".join(lines) + "\n")
    found, is_split = example.read_labels(example.find_tusimple(), "train")
    assert not is_split
    return found


@pytest.fixture
def small(example: ModuleType) -> Any:
    torch.manual_seed(0)
    return example.LaneNet((64, 128), blocks=(1, 1, 1, 1), hidden=64)


def test_lanes_stand_in_order(example: ModuleType) -> None:
    lanes = synthetic_lanes()
    given = [lanes[k] for k in (2, 0, 3, 1)]
    for found, lane in zip(example.in_order(given, ROWS), lanes, strict=True):
        np.testing.assert_array_equal(found, lane)
    found = example.in_order([lanes[3], lanes[2]], ROWS)
    assert found[:2] == [None, None]
    np.testing.assert_array_equal(found[2], lanes[2])
    farther = np.where(ROWS < 150, 200.0 - 6 * (ROWS - 100), -2)  # a third lane on the left is left out
    np.testing.assert_array_equal(example.in_order([farther, *lanes], ROWS)[0], lanes[0])


def test_labels_are_resampled_and_extended_to_the_bottom(example: ModuleType) -> None:
    rows = np.arange(100.0, 200, 10)
    lane = np.where(rows >= 120, 2 * rows, -2)
    found = example.at_anchors(lane, rows, 288)
    wanted = example.ANCHORS * 288
    np.testing.assert_allclose(found, np.where(wanted >= 120, 2 * wanted, example.NO_LANE))
    assert (example.at_anchors(None, rows, 288) == example.NO_LANE).all()


def test_lanes_turn_and_shift_with_their_image(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane in white on black is found in the varied image where the varied labels say."""
    lanes = synthetic_lanes()
    image = Image.new("RGB", (512, 288))
    points = [(float(x), float(y)) for x, y in zip(lanes[2], ROWS, strict=True)]
    ImageDraw.Draw(image).line(points, (255, 255, 255), 3)
    for seed in range(5):
        torch.manual_seed(seed)
        moved, found = example.vary(image, [None, lanes[2]], ROWS)
        assert found[0] is None
        there = found[1] >= 0
        assert 30 < there.sum() < len(ROWS)
        pixels = np.array(moved.convert("L"), dtype=float)[ROWS[there]]
        assert (pixels.max(1) > 100).all()
        np.testing.assert_allclose(pixels.argmax(1), found[1][there], atol=3)
        assert np.abs(found[1][there] - lanes[2][there]).max() > 3
    monkeypatch.setattr(example, "TURN", 0.0)
    monkeypatch.setattr(example, "SHIFT", (0.0, 0.0))
    still, (same,) = example.vary(image, [lanes[2]], ROWS)
    assert (np.array(still) == np.array(image)).all()
    np.testing.assert_allclose(same, lanes[2])


def test_perfect_scores_of_the_labels_are_all_right(example: ModuleType, pictures: Any) -> None:
    """Labels become cells, cells scores, scores lanes: within half of a cell, 2.6 of 8 pixels."""

    class Perfect(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            cells = next(c for x, c, _ in loaded if torch.equal(x, image[0]))
            return 50.0 * torch.nn.functional.one_hot(cells, 101).permute(2, 0, 1)[None].float()

    loaded = [example.load(picture, (64, 128)) for picture in pictures]
    scores = example.evaluate(Perfect(), pictures, (64, 128))
    assert scores["accuracy"] > 0.97
    assert (scores["false_positives"], scores["false_negatives"]) == (0, 0)


def test_the_metric_takes_anything_that_returns_scores(example: ModuleType, pictures: Any, small: Any) -> None:
    """A network that trains returns two outputs, with gradients; a function has no parameters."""
    one = pictures[:1]
    assert example.evaluate(small.train(), one, small.size).keys() == {"accuracy", "false_positives", "false_negatives"}
    nothing = torch.eye(101)[100][None, :, None, None].expand(1, 101, 56, 4)
    found = example.evaluate(lambda image: nothing, one, small.size)
    assert (found["false_positives"], found["false_negatives"]) == (0, 1)


def test_the_mask_marks_the_lanes(example: ModuleType, pictures: Any) -> None:
    _, cells, mask = example.load(pictures[1], (288, 800))
    assert cells.shape == (56, 4)
    assert (cells[:, [0, 3]] == example.CELLS).all()
    assert set(mask.unique().tolist()) == {0, 2, 3}
    row = 30  # of 36
    share = (row + 0.5) / 36 * 288
    lane = np.interp(share, ROWS, synthetic_lanes()[1]) / 512 * 100
    assert abs(float((mask[row] == 2).nonzero().double().mean()) + 0.5 - lane) < 1


def test_the_loss_by_hand(example: ModuleType) -> None:
    scores = torch.zeros(1, 101, 56, 4)
    cells = torch.zeros(1, 56, 4, dtype=torch.long)
    batch = (torch.zeros(1), cells, torch.zeros(1, 4, 4, dtype=torch.long))
    focal = (100 / 101) ** 2 * np.log(101)
    assert example.lane_loss(lambda _: scores, batch).item() == pytest.approx(focal, rel=1e-5)
    aux = torch.zeros(1, 5, 4, 4)
    both = example.lane_loss(lambda _: (scores, aux), batch).item()
    assert both == pytest.approx(focal + np.log(5), rel=1e-5)
    scores = torch.zeros(1, 101, 56, 4)
    scores[:, 0, ::2] = 2.0  # one of 101 cells differs by 2 between all neighbours: 1.5 by smooth L1
    log = torch.log_softmax(scores, 1)[:, 0]
    focal = float(-((1 - log.exp()) ** 2 * log).mean())
    assert example.lane_loss(lambda _: scores, batch).item() == pytest.approx(focal + 1.5 / 101, rel=1e-4)


def test_lanes_are_the_mean_of_their_cells(example: ModuleType) -> None:
    scores = torch.full((1, 101, 56, 4), -30.0)
    scores[0, 10, :, 0] = scores[0, 13, :, 0] = 5.0
    scores[0, 100, :, 1] = 5.0
    found = example.decode(scores)
    np.testing.assert_allclose(found[0, :, 0], 0.12, atol=1e-6)
    assert (found[0, :, 1] == example.NO_LANE).all()


def test_the_published_network_is_pruned_in_its_last_layer(example: ModuleType) -> None:
    model = example.LaneNet()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(64.6e6, rel=0.002)
    program = slrc.capture(slrc.Workload(model, (torch.zeros(1, 3, 288, 800),)))
    assert program.num_parameters == pytest.approx(61.23e6, rel=0.001)  # the auxiliary branch is gone
    plan = slrc.plan(program, "block:8x1", 0.75)
    assert {"cls.0", "cls.2"} <= {c.name for c in plan}


def test_it_learns_synthetic_images_and_compiles(
    example: ModuleType, pictures: Any, small: Any, tmp_path: Path, quick_timing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "30")
    monkeypatch.setattr(example, "LR", 4e-3)
    monkeypatch.setattr(example, "TURN", 0.0)  # what moves takes longer to learn
    monkeypatch.setattr(example, "SHIFT", (0.0, 0.0))
    batch = next(iter(example.Batches(pictures, small.size, 2)))
    before = example.lane_loss(small.train(), batch).item()
    workload = example.make_workload(small, "small", batch_size=2)
    after = example.lane_loss(workload.model.train(), batch).item()
    assert after < before / 3
    options = {"pattern": "channel", "sparsity": 0.5, "method": "magnitude"}
    report = slrc.compile(workload, out=tmp_path / "out", epochs=1, threads=1, **options)
    assert all(check.passed for check in report.checks)
    assert any("unvaried; put `test_label.json`" in warning for warning in workload.warnings)


def test_without_data_the_error_says_what_to_download(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no TuSimple in `SLRC_DATA=.*tusimple-benchmark.*`test_label\.json`"):
        load_workload(str(FILE))
    monkeypatch.delenv("SLRC_DATA")
    with pytest.raises(WorkloadError, match="`SLRC_DATA` is not set"):
        load_workload(str(FILE))
