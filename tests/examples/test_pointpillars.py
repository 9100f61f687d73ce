"""The PointPillars example on synthetic frames: pillars, boxes there and back, loss, detection and a compile."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import slrc
from slrc.errors import WorkloadError
from slrc.load_workload import load_workload
from slrc.passes.analysis.label_indices import label_indices
from slrc.pipeline import baseline

FILE = Path(__file__).parents[2] / "examples" / "pointpillars.py"
CALIBRATION = """P2: 700 0 600 0 0 700 180 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.1 1 0 0 -0.3
"""
CARS = ((10.0, 2.0, 0.3), (14.0, -3.0, 1.5))
"""Where synthetic cars stand, in the lidar's coordinates, and how they are turned."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a data folder and a cache of its own."""
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("pointpillars")


@pytest.fixture
def frames(example: ModuleType, tmp_path: Path) -> Path:
    """A folder with one synthetic frame, of two cars on a plane."""
    folder = tmp_path / "data" / "kitti" / "training"
    for name in ("velodyne", "calib", "label_2"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    ground = np.column_stack([rng.uniform(0, 20, 2000), rng.uniform(-8, 8, 2000), np.full(2000, -1.7)])
    clouds, lines = [ground], []
    for x, y, yaw in CARS:
        inside = rng.uniform(-0.5, 0.5, (300, 3)) * [3.9, 1.6, 1.5]
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        clouds.append(np.column_stack([inside[:, :2] @ turn.T + [x, y], inside[:, 2] - 0.95]))
        camera = f"{-y} 1.6 {x - 0.3}"  # the lower side lies 1.7 m below the lidar, 0.1 m above the camera
        lines.append(f"Car 0 0 0 100 100 300 200 1.5 1.6 3.9 {camera} {-yaw - np.pi / 2}")
    points = np.concatenate(clouds)
    np.column_stack([points, np.full(len(points), 0.5)]).astype(np.float32).tofile(folder / "velodyne" / "000000.bin")
    (folder / "calib" / "000000.txt").write_text(CALIBRATION)
    (folder / "label_2" / "000000.txt").write_text(
        "\n".join([*lines, "DontCare -1 -1 -10 0 0 9 9 -1 -1 -1 -1 -1 -1 0"])
    )
    return folder


@pytest.fixture
def small(example: ModuleType) -> Any:
    """A network of a few channels on a grid of 64 by 96 pillars."""
    torch.manual_seed(0)
    grid = example.Grid(low=(0.0, -6.4, -3.0), high=(19.2, 6.4, 1.0), pillar=0.2, pillars=1500, points=8)
    return example.PointPillars(grid, widths=(8, 16, 16), depths=(1, 1, 1), up=16)


def test_pillars_hold_their_points(example: ModuleType) -> None:
    grid = example.Grid(low=(0, 0, -1), high=(2, 1, 1), pillar=1.0, pillars=3, points=2)
    points = np.array([[0.2, 0.4, 0, 7], [1.5, 0.5, 0.5, 8], [0.4, 0.8, 0.2, 9], [0.9, 0.9, 0, 1], [5, 5, 5, 5]])
    features, cells = example.make_pillars(points.astype(np.float32), grid)
    assert cells.tolist() == [0, 1]
    near = [[0.2, 0.4, 0, 7, -0.1, -0.2, -0.1, -0.3, -0.1, 0], [0.4, 0.8, 0.2, 9, 0.1, 0.2, 0.1, -0.1, 0.3, 0.2]]
    torch.testing.assert_close(features[0], torch.tensor(near), rtol=0, atol=1e-6)
    far = [[1.5, 0.5, 0.5, 8, 0, 0, 0, 0, 0, 0.5], [0.0] * 10]
    torch.testing.assert_close(features[1], torch.tensor(far), rtol=0, atol=1e-6)
    assert not features[2].any()
    few = example.Grid(low=(0, 0, -1), high=(2, 1, 1), pillar=1.0, pillars=1, points=2)
    assert example.make_pillars(points.astype(np.float32), few)[1].tolist() == [0, 1]


def test_pillars_stand_on_the_canvas_where_their_points_are(example: ModuleType, small: Any) -> None:
    features = torch.randn(2, 1500, 8, 10)
    cells = torch.full((2, 64 * 96), 1500)
    cells[0, 5], cells[1, 7] = 3, 4
    seen: list[Tensor] = []
    small.stages[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    small.eval()(features, cells)
    pillars = small.pillars(features[0]), small.pillars(features[1])
    torch.testing.assert_close(seen[0][0, :, 0, 5], pillars[0][3])
    torch.testing.assert_close(seen[0][1, :, 0, 7], pillars[1][4])
    assert int((seen[0] != 0).any(1).sum()) == 2


def test_boxes_there_and_back(example: ModuleType, frames: Path) -> None:
    frame = example.Frames(frames, ["000000"])[0]
    np.testing.assert_allclose(frame.boxes[:, [0, 1, 6]], CARS, atol=1e-9)
    np.testing.assert_allclose(frame.boxes[:, 2:6], [[-0.95, 3.9, 1.6, 1.5]] * 2)
    back = example.to_objects(frame.boxes, frame.classes, np.ones(2), frame.calibration)
    np.testing.assert_allclose(back.places, frame.objects.places[:2], atol=1e-9)
    np.testing.assert_allclose(back.sizes, frame.objects.sizes[:2])
    anchors = example.make_anchors(example.Grid())[:5].reshape(-1, 7)
    boxes = np.tile(frame.boxes[0], (len(anchors), 1))
    np.testing.assert_allclose(example.decode(example.encode(boxes, anchors), anchors), boxes)


def test_what_the_targets_say_is_what_is_found(example: ModuleType, frames: Path, small: Any) -> None:
    frame, anchors = example.Frames(frames, ["000000"])[0], example.make_anchors(small.grid)
    labels, boxes, directions = example.make_targets(frame, anchors)
    assert set(labels.tolist()) == {example.IGNORED, 0, 1}
    scores = torch.full((1, len(labels), 3), -9.0)
    scores[0, labels == 1, 0] = 9.0
    sides = torch.nn.functional.one_hot(directions, 2).float()[None]
    rows, columns = (n // 2 for n in small.grid.shape)

    def as_head(x: Tensor) -> Tensor:
        return x.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)

    found, classes, _ = example.decode_frame((as_head(scores), as_head(boxes[None]), as_head(sides)), anchors)
    assert classes.tolist() == [0, 0]
    order = found[:, 0].argsort()
    np.testing.assert_allclose(found[order], frame.boxes, atol=1e-4)


def test_the_loss_of_one_anchor_by_hand(example: ModuleType) -> None:
    scores, boxes, directions = (torch.zeros(1, n, 1, 1) for n in (18, 42, 12))
    labels = torch.full((1, 6), example.IGNORED)
    labels[0, 0] = 1
    wanted = torch.zeros(1, 6, 7)
    wanted[0, 0, 0], wanted[0, 0, 6] = 1.0, np.pi / 2
    model = lambda *_: (scores, boxes, directions)  # noqa: E731
    loss = example.detection_loss(model, (torch.zeros(1), torch.zeros(1), labels, wanted, torch.zeros(1, 6).long()))
    focal = (0.25 + 2 * 0.75) * 0.25 * np.log(2)
    regression = 2 * (2 * (1 - 0.5 / 9)) + 0.2 * np.log(2)  # x is off by 1, and the yaw's sine too
    assert loss.item() == pytest.approx(focal + regression, rel=1e-5)


def test_scenes_vary_with_their_boxes(example: ModuleType, frames: Path) -> None:
    frame = example.Frames(frames, ["000000"])[0]
    torch.manual_seed(1)
    for _ in range(4):
        changed = example.vary(frame)
        for before, after in zip(frame.boxes, changed.boxes, strict=True):
            assert points_in(changed.points, after) == points_in(frame.points, before) > 100


def points_in(points: np.ndarray, box: np.ndarray) -> int:
    away = points[:, :3] - box[:3]
    cos, sin = np.cos(box[6]), np.sin(box[6])
    local = np.column_stack([away[:, 0] * cos + away[:, 1] * sin, away[:, 1] * cos - away[:, 0] * sin, away[:, 2]])
    return int((np.abs(local) <= box[3:6] * 0.501).all(1).sum())


def test_batch_norm_folds_and_the_pillars_are_pruned(example: ModuleType, frames: Path, small: Any) -> None:
    features, cells = example.make_pillars(example.Frames(frames, ["000000"])[0].points, small.grid)
    program = slrc.capture(slrc.Workload(small, (features[None], cells[None])))
    assert program.batch_is_dynamic
    group = next(g for g in label_indices(program).groups if g.name == "pillars.linear")
    assert group.units == 8
    assert [s.tensor for s in group.followers] == ["stages.0.0.weight"]
    assert not [n for n in baseline(program).nodes if "batch_norm" in str(n.target)]


def test_it_learns_a_synthetic_scene_and_compiles(
    example: ModuleType, frames: Path, small: Any, tmp_path: Path, quick_timing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "30")
    batches = example.Batches(example.Frames(frames, ["000000"]), small.grid, batch_size=1, varied=False)
    before = example.detection_loss(small.train(), next(iter(batches))).item()
    workload = example.make_workload(small, "small")
    after = example.detection_loss(workload.model.train(), next(iter(batches))).item()
    assert after < before / 3
    assert not any(norm.training for norm in workload.model.norms())
    assert example.detection_loss(workload.model.eval(), next(iter(batches))).item() == pytest.approx(after, rel=1e-4)
    options = {"pattern": "channel", "sparsity": 0.5, "keep_ends": False, "round_to": 1, "method": "magnitude"}
    report = slrc.compile(workload, out=tmp_path / "out", epochs=1, threads=1, **options)
    assert all(check.passed for check in report.checks)
    assert any("unvaried; put `train.txt` and `val.txt`" in warning for warning in workload.warnings)


def test_the_frames_of_a_split_are_those_listed_for_both(example: ModuleType, frames: Path) -> None:
    assert example.frame_names(frames, "val") == (["000000"], False)
    (lists := frames.parent / "ImageSets").mkdir()
    (lists / "train.txt").write_text("000001\n000002\n")
    for split in ("train", "val"):
        with pytest.raises(WorkloadError, match=r"`.*ImageSets/val\.txt` is missing\n\nhint: .*OpenPCDet"):
            example.frame_names(frames, split)
    (lists / "val.txt").write_text("000000\n")
    assert example.frame_names(frames, "train") == (["000001", "000002"], True)
    assert example.frame_names(frames, "val") == (["000000"], True)


def test_without_data_the_error_says_what_to_download(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no KITTI in `SLRC_DATA=.*cvlibs.*`kitti/ImageSets/`"):
        load_workload(str(FILE))
    monkeypatch.delenv("SLRC_DATA")
    with pytest.raises(WorkloadError, match="`SLRC_DATA` is not set"):
        load_workload(str(FILE))


def test_the_distance_is_least_from_the_same_heads_and_by_what_is_found(example: ModuleType) -> None:
    torch.manual_seed(0)
    numbers = (len(example.CLASSES), 7, example.DIRECTIONS)
    taught = [torch.randn(2, 6 * n, 3, 2) for n in numbers]
    same = [head.clone().requires_grad_() for head in taught]
    least = example.distance(same, taught)
    least.backward()
    assert all(head.grad.abs().max() < 1e-6 for head in same)
    for k in range(3):
        moved = [head.clone() for head in taught]
        moved[k][:, 0] += 1
        assert example.distance(moved, taught) > least + 1e-3
    nothing = [taught[0] - 10, *taught[1:]]  # where nothing is found, boxes and directions do not count
    elsewhere = [nothing[0], nothing[1] + 1, -nothing[2]]
    torch.testing.assert_close(example.distance(elsewhere, nothing), example.distance(nothing, nothing))
