"""COCO's images and boxes, from the folders that are distributed or from a small pack.

`$SLRC_DATA/coco` holds `annotations/instances_train2017.json`, `annotations/instances_val2017.json` and the folders
`train2017` and `val2017`. Else `$SLRC_DATA/coco128.npz` holds, for each split, the JPEG files one after another
(`train_img`) with the offsets where they begin (`train_offset`), boxes `(m, 5)` as class and centre form in shares of
the image (`train_box`), and the image that each belongs to (`train_box_image`).
"""

import io
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.average_precision import Labels
from common.boxes import corners
from slrc.errors import WorkloadError

FOLDER, PACK = "coco", "coco128.npz"
CLASSES = 80
HINT = (
    "download train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download and "
    f"unpack them into a folder `{FOLDER}`; then set SLRC_DATA to the folder that holds `{FOLDER}`"
)


@dataclass(frozen=True)
class Split:
    """The training or the validation images.

    Args:
        files: JPEG files, or what they hold.
        labels: of each image, boxes in pixels and classes from 0 to 79.
    """

    files: Sequence[Path | bytes]
    labels: Sequence[Labels]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, number: int) -> Image.Image:
        """Return an image, in colour."""
        return open_image(self.files[number]).convert("RGB")

    def spread(self, count: int) -> "Split":
        """Return so many of the images, evenly spread."""
        chosen = [i * len(self) // count for i in range(min(count, len(self)))]
        return Split([self.files[i] for i in chosen], [self.labels[i] for i in chosen])


def open_image(file: Path | bytes) -> Image.Image:
    """Open an image without decoding it."""
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def find_data() -> Path:
    """Return the folder or the pack.

    Raises:
        WorkloadError: there is neither.
    """
    folder = os.environ.get("SLRC_DATA")
    for name in (FOLDER, PACK):
        if folder and (found := Path(folder).expanduser() / name).exists():
            return found
    raise WorkloadError(
        f"no COCO in `SLRC_DATA={folder}`: expected `{FOLDER}` there" if folder else "no COCO: `SLRC_DATA` is not set",
        hint=HINT,
    )


def read_split(data: Path, split: str) -> Split:
    """Return the images and boxes of `train` or `val` in what `find_data` found.

    Raises:
        WorkloadError: the folder lacks them.
    """
    return _read_folder(data, split) if data.is_dir() else _read_pack(data, split)


def _read_folder(folder: Path, split: str) -> Split:
    annotations, images = folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"
    for path in (annotations, images):
        if not path.exists():
            raise WorkloadError(f"COCO is not whole: `{path}` is missing", hint=HINT)
    with annotations.open() as file:
        held = json.load(file)
    numbers = {identity: i for i, identity in enumerate(sorted(c["id"] for c in held["categories"]))}
    boxes: dict[int, list[tuple[float, ...]]] = {image["id"]: [] for image in held["images"]}
    for a in held["annotations"]:
        left, top, width, height = a["bbox"]
        boxes[a["image_id"]].append(
            (left, top, left + width, top + height, numbers[a["category_id"]], a.get("iscrowd", 0))
        )
    return Split(
        [images / image["file_name"] for image in held["images"]],
        [_labels(boxes[image["id"]]) for image in held["images"]],
    )


def _labels(rows: Sequence[tuple[float, ...]]) -> Labels:
    """Return labels from rows of four corners, class and whether it is a crowd."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Labels(table[:, :4], table[:, 4].long(), table[:, 5].bool())


def _read_pack(file: Path, split: str) -> Split:
    with np.load(file) as pack:
        data, offsets = pack[f"{split}_img"], pack[f"{split}_offset"]
        rows, owners = torch.from_numpy(pack[f"{split}_box"]), torch.from_numpy(pack[f"{split}_box_image"])
    files = [data[start:end].tobytes() for start, end in itertools.pairwise(offsets)]
    labels = []
    for i, content in enumerate(files):
        own = rows[owners == i]
        boxes = corners(own[:, 1:]) * torch.tensor([*open_image(content).size] * 2)
        labels.append(Labels(boxes, own[:, 0].long(), torch.zeros(len(own), dtype=torch.bool)))
    return Split(files, labels)
