"""COCO's readers: the folder, the pack, and what is said without them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slrc.errors import WorkloadError

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from common.coco import find_data, read_split


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLRC_DATA", str(tmp_path))
    return tmp_path


def jpeg(level: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, level).save(file, "JPEG")
    return file.getvalue()


def write_folder(data: Path) -> None:
    """Write COCO's own format: three images, one without boxes, and ids of classes that are not in order."""
    (data / "coco" / "annotations").mkdir(parents=True)
    (data / "coco" / "val2017").mkdir()
    for i in range(3):
        (data / "coco" / "val2017" / f"{i}.jpg").write_bytes(jpeg(100 * i, (40, 30)))
    held = {
        "images": [{"id": 7 - i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3)],
        "categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 4, 4], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [5, 5, 5, 5], "iscrowd": 0},
        ],
    }
    (data / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(held))


def test_reads_the_folder(data: Path) -> None:
    write_folder(data)
    split = read_split(find_data(), "val")
    assert [labels.classes.tolist() for labels in split.labels] == [[1, 0], [], [0]]
    assert split.labels[0].boxes.tolist() == [[1, 2, 11, 22], [5, 5, 10, 10]]
    assert split.labels[1].boxes.shape == (0, 4)
    assert [labels.crowd.tolist() for labels in split.labels] == [[False, False], [], [True]]
    assert np.asarray(split.image(2)).shape == (30, 40, 3)
    assert np.asarray(split.image(2))[0, 0].tolist() == [200] * 3
    assert [labels.classes.tolist() for labels in split.spread(2).labels] == [[1, 0], []]
    assert len(split.spread(10)) == 3


def test_reads_the_pack(data: Path) -> None:
    files = [jpeg(50, (40, 20)), jpeg(150, (10, 10))]
    np.savez(
        data / "coco128.npz",
        val_img=np.frombuffer(b"".join(files), np.uint8),
        val_offset=np.cumsum([0, *map(len, files)]),
        val_box=np.array([[3, 0.5, 0.5, 0.5, 1.0], [79, 0.25, 0.5, 0.5, 0.2]], np.float32),
        val_box_image=np.array([1, 0]),
    )
    split = read_split(find_data(), "val")
    assert split.labels[0].boxes.tolist() == [pytest.approx([0, 8, 20, 12])]
    assert split.labels[1].boxes.tolist() == [pytest.approx([2.5, 0, 7.5, 10])]
    assert [labels.classes.tolist() for labels in split.labels] == [[79], [3]]
    assert not torch.cat([labels.crowd for labels in split.labels]).any()
    assert np.asarray(split.image(1))[5, 5].tolist() == [150] * 3


def test_without_data_the_error_says_what_to_download(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no COCO in `SLRC_DATA=.*annotations_trainval2017\.zip.*`coco`"):
        find_data()
    monkeypatch.delenv("SLRC_DATA")
    with pytest.raises(WorkloadError, match="`SLRC_DATA` is not set"):
        find_data()


def test_a_folder_that_is_not_whole_is_told_what_it_lacks(data: Path) -> None:
    write_folder(data)
    with pytest.raises(WorkloadError, match=r"(?s)`.*instances_train2017\.json` is missing.*cocodataset\.org"):
        read_split(find_data(), "train")
