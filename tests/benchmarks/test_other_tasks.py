"""The comparison's tasks that are not classification, on tiny data: they are built, trained on and measured."""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with an empty data folder, a cache of its own, and dense networks that are not trained."""
    for folder in (ROOT / "examples", ROOT / "benchmarks", ROOT / "benchmarks" / "convergence"):
        monkeypatch.syspath_prepend(str(folder))
    for name in ("SLRC_SUBSET", "SLRC_DATASET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    module = importlib.import_module("other_tasks")
    monkeypatch.setattr(importlib.import_module("tasks"), "CACHE", tmp_path / "cache")
    monkeypatch.setattr(module.segmentation, "EPOCHS", 0)
    monkeypatch.setattr(module.yolov3, "SCRATCH_EPOCHS", 0)
    monkeypatch.setattr(module, "LANES_DENSE_EPOCHS", 0)
    monkeypatch.setattr(module, "PILLARS_DENSE_EPOCHS", 0)
    return module


def check(task: Any) -> None:
    """Hold that a network takes the example, has a finite loss with gradients, and a metric on both splits."""
    model = task.make()
    with torch.no_grad():
        model.eval()(*task.example)
    loss = task.others["loss"](model.train(), next(iter(task.batches)))
    loss.backward()
    assert math.isfinite(loss.item())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(0 <= task.measure(model, split) <= 100 for split in (task.validation, task.test))


def test_camvid(other_tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def png(values: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    pack: dict[str, np.ndarray] = {}
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        labels = np.arange(48)[None].repeat(32, 0) // 4  # twelve stripes, the last without a label
        files = {"img": png(np.stack([20 * labels] * 3, -1)), "ann": png(labels)}
        for kind, file in files.items():
            pack[f"{split}_{kind}"] = np.frombuffer(file * count, np.uint8)
            pack[f"{split}_{kind}_off"] = len(file) * np.arange(count + 1)
    np.savez(tmp_path / "data" / "camvid.npz", **pack)
    monkeypatch.setattr(importlib.import_module("common.segmentation_folders"), "PACK_SIZE", (32, 48))
    check(other_tasks.make_task("camvid", "unet"))


def test_coco(other_tasks: Any, write_coco_pack: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco_pack(2)
    monkeypatch.setenv("SLRC_SIZE", "64")
    task = other_tasks.make_task("coco", "yolov3_tiny")
    assert (len(task.validation), len(task.test)) == (1, 1)
    check(task)


def test_lanes(other_tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of one image, whose lanes are drawn anew."""
    (folder := tmp_path / "data" / "tusimple" / "clips").mkdir(parents=True)
    rows = np.arange(100, 288, 4)
    lanes = [(256 + side * (rows - 80)).tolist() for side in (-0.9, -0.3, 0.3, 0.9)]
    fields = {"lanes": lanes, "h_samples": rows.tolist(), "raw_file": "clips/0.png"}
    (folder.parent / "label_data_0.json").write_text(json.dumps(fields))
    monkeypatch.setattr(other_tasks, "LANES_SIZE", (64, 128))
    check(other_tasks.lanes_task(count=2, held_out=1))


def test_pillars(other_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = other_tasks.pointpillars.Grid((0.0, -6.4, -3.0), (19.2, 6.4, 1.0), 0.2, pillars=1500, points=8)
    monkeypatch.setattr(other_tasks, "QUARTER", grid)
    check(other_tasks.pillars_task(count=2, held_out=1))
