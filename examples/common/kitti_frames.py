"""Frames of KITTI's 3D object detection: points, labels and calibration, in the lidar's coordinates.

A box in space is `(x, y, z, length, width, height, yaw)`: its middle, its sizes in metres, and how far its length is
turned from the x axis, which points ahead, towards y, which points left.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.kitti_metric import LEAST_OVERLAP, Objects
from slrc.errors import WorkloadError

Array = NDArray[np.float64]
CLASSES = tuple(LEAST_OVERLAP)
FOLDERS = ("velodyne", "calib", "label_2")
USUAL_IMAGE = (1242, 375)
LEAST_DEPTH = 0.1
SPLIT_HINT = (
    "put `train.txt` and `val.txt` in `kitti/ImageSets/`: the usual split of Chen et al., 3712 and 3769 frames, is in "
    "`data/kitti/ImageSets` of https://github.com/open-mmlab/OpenPCDet"
)
"""KITTI's own downloads do not say which frames are to train on."""


@dataclass(frozen=True)
class Frame:
    """One frame.

    `points` `(n, 4)` are x, y, z and intensity of what the camera sees; `boxes` `(m, 7)` with `classes` `(m,)`, the
    numbers in `CLASSES`, are the objects to find; `objects` are all labels.
    """

    points: NDArray[np.float32]
    boxes: Array
    classes: NDArray[np.int64]
    objects: Objects
    calibration: "Calibration"


@dataclass(frozen=True)
class Calibration:
    """From the lidar to the camera `(4, 4)`, from there to the image `(3, 4)`, and the image's width and height."""

    to_camera: Array
    to_image: Array
    size: tuple[int, int]

    @staticmethod
    def read(file: Path, size: tuple[int, int]) -> "Calibration":
        """Read a file of matrices, a line each."""
        lines = [line.split(":") for line in file.read_text().splitlines() if ":" in line]
        matrices = {name: np.array(values.split(), dtype=np.float64) for name, values in lines}
        rectify, velodyne = np.eye(4), np.eye(4)
        rectify[:3, :3] = matrices["R0_rect"].reshape(3, 3)
        velodyne[:3] = matrices["Tr_velo_to_cam"].reshape(3, 4)
        return Calibration(rectify @ velodyne, matrices["P2"].reshape(3, 4), size)

    def camera(self, points: Array) -> Array:
        """Turn points `(n, 3)` of the lidar into points of the camera."""
        return points @ self.to_camera[:3, :3].T + self.to_camera[:3, 3]

    def lidar(self, points: Array) -> Array:
        """Turn points `(n, 3)` of the camera into points of the lidar."""
        back = np.linalg.inv(self.to_camera)
        return points @ back[:3, :3].T + back[:3, 3]

    def project(self, points: Array) -> tuple[Array, Array]:
        """Return pixels `(n, 2)` and depths `(n,)` of points `(n, 3)` of the camera."""
        seen = points @ self.to_image[:, :3].T + self.to_image[:, 3]
        return seen[:, :2] / np.maximum(seen[:, 2:], LEAST_DEPTH), seen[:, 2]


def find_kitti() -> Path:
    """Return the folder of KITTI's training frames.

    Raises:
        WorkloadError: there is none.
    """
    folder = os.environ.get("SLRC_DATA")
    found = Path(folder or "").expanduser() / "kitti" / "training"
    if folder and all((found / name).is_dir() for name in FOLDERS):
        return found
    raise WorkloadError(
        f"no KITTI in `SLRC_DATA={folder}`: expected `kitti/training/` with {', '.join(FOLDERS)} there"
        if folder
        else "no KITTI: `SLRC_DATA` is not set",
        hint="download the velodyne points, calibration and labels of the 3D object data set from "
        f"https://www.cvlibs.net/datasets/kitti and unpack them in `kitti/`; {SPLIT_HINT}; then set SLRC_DATA to the "
        "folder that holds `kitti`",
    )


def frame_names(folder: Path, split: str) -> tuple[list[str], bool]:
    """Return the names of the frames of `train` or `val`, and whether `ImageSets/` says which these are.

    Without it every frame is in both.

    Raises:
        WorkloadError: it lists the frames of one split alone.
    """
    lists = {name: folder.parent / "ImageSets" / f"{name}.txt" for name in ("train", "val")}
    missing = [path for path in lists.values() if not path.exists()]
    if len(missing) == 1:
        raise WorkloadError(f"KITTI's split is not whole: `{missing[0]}` is missing", hint=SPLIT_HINT)
    if missing:
        return sorted(file.stem for file in (folder / "velodyne").glob("*.bin")), False
    return lists[split].read_text().split(), True


def read_frame(folder: Path, name: str) -> Frame:
    """Read a frame, its points cropped to what the camera sees: only that is labelled."""
    image = folder / "image_2" / f"{name}.png"
    size = Image.open(image).size if image.exists() else USUAL_IMAGE
    calibration = Calibration.read(folder / "calib" / f"{name}.txt", size)
    objects = Objects.parse((folder / "label_2" / f"{name}.txt").read_text())
    points = np.fromfile(folder / "velodyne" / f"{name}.bin", np.float32).reshape(-1, 4)
    pixels, depth = calibration.project(calibration.camera(points[:, :3].astype(np.float64)))
    seen = (depth > LEAST_DEPTH) & (pixels >= 0).all(1) & (pixels < size).all(1)
    wanted = np.isin(objects.names, CLASSES)
    boxes = to_lidar(objects, calibration)[wanted]
    classes = np.array([CLASSES.index(str(name)) for name in objects.names[wanted]], dtype=np.int64)
    return Frame(points[seen], boxes, classes, objects, calibration)


@dataclass(frozen=True)
class Frames:
    """The frames of those names in KITTI's training folder, each read anew when it is asked for."""

    folder: Path
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Frame:
        return read_frame(self.folder, self.names[number])


def to_lidar(objects: Objects, calibration: Calibration) -> Array:
    """Return the boxes of labels, `(n, 7)`."""
    places = calibration.lidar(objects.places)
    height, width, length = objects.sizes.T
    yaws = wrapped(-objects.yaws - np.pi / 2)
    return np.column_stack([places[:, :2], places[:, 2] + height / 2, length, width, height, yaws])


def to_objects(boxes: Array, classes: NDArray[np.int64], scores: Array, calibration: Calibration) -> Objects:
    """Return boxes `(n, 7)` as KITTI's results, with their outlines in the image."""
    lower = boxes[:, :3] - np.array([0, 0, 0.5]) * boxes[:, 5:6]
    places, yaws = calibration.camera(lower), wrapped(-boxes[:, 6] - np.pi / 2)
    signs = np.stack(np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5], indexing="ij"), -1).reshape(8, 3)
    local = signs * boxes[:, None, 3:6]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    turned = [local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos, local[..., 2]]
    corners = boxes[:, None, :3] + np.stack(turned, -1)
    pixels, _ = calibration.project(calibration.camera(corners.reshape(-1, 3)))
    pixels = np.clip(pixels.reshape(-1, 8, 2), 0, np.array(calibration.size) - 1)
    outlines = np.concatenate([pixels.min(1), pixels.max(1)], 1)
    nothing = np.zeros(len(boxes))
    names = np.array([CLASSES[k] for k in classes], dtype=np.str_)
    return Objects(names, nothing, nothing, outlines, boxes[:, [5, 4, 3]], places, yaws, scores)


def wrapped(angles: Array) -> Array:
    """Return angles between −π and π."""
    return (angles + np.pi) % (2 * np.pi) - np.pi
