"""The segmentation example: networks, batches, readers, the metric, a short compile, and what it says without data."""

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.segmentation import LRASPP
from torchvision.models.segmentation.fcn import FCNHead

import slrc
from slrc.errors import WorkloadError
from slrc.load_workload import load_workload
from slrc.reconstruction.calibration import calibration_inputs

FILE = Path(__file__).parents[2] / "examples" / "segmentation.py"
IGNORED = 255


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with an empty data folder and a cache of its own."""
    for name in ("SLRC_MODEL", "SLRC_DATASET", "SLRC_SPLIT", "SLRC_SUBSET", "SLRC_DENSE_EPOCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("segmentation")


@pytest.fixture
def folders(example: ModuleType) -> ModuleType:
    return importlib.import_module("common.segmentation_folders")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def png(values: Any, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode is not None:
        image = image.convert(mode)
    image.save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def stripes(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image whose colour tells the class: three stripes, and a row without a label."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(generator.permutation(3), width)[::3][:width][None].repeat(height, 0)
    labels = np.where(np.arange(height)[:, None] == 0, 11, labels)
    pixels = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]])[labels % 11 % 3]
    return pixels.astype(np.uint8), labels.astype(np.uint8)


def write_pack(data: Path, counts: dict[str, int], height: int = 32, width: int = 48) -> None:
    pack: dict[str, np.ndarray] = {}
    for split, count in counts.items():
        scenes = [stripes(height, width, seed) for seed in range(count)]
        for kind, files in (("img", [png(x) for x, _ in scenes]), ("ann", [png(y) for _, y in scenes])):
            pack[f"{split}_{kind}"] = np.frombuffer(b"".join(files), np.uint8)
            pack[f"{split}_{kind}_off"] = np.cumsum([0, *map(len, files)])
    np.savez(data / "camvid.npz", **pack)


@pytest.fixture
def small(folders: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack of few small images, not scaled up."""
    write_pack(data, {"train": 4, "val": 2, "test": 3})
    monkeypatch.setattr(folders, "PACK_SIZE", (32, 48))
    return data


@pytest.mark.parametrize(("name", "parameters"), [("unet", 1_964_267), ("lraspp", 3_219_838), ("deeplab", 11_026_648)])
def test_a_network_gives_each_pixel_logits(example: ModuleType, name: str, parameters: int) -> None:
    model = example.NETWORKS[name](11).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 36, 50))
    assert example.logits_of(output).shape == (1, 11, 36, 50)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if name == "deeplab":
        assert list(output) == ["out"]
        assert list(model.train()(torch.zeros(2, 3, 36, 50))) == ["out", "aux"]


def test_the_mean_iou_is_that_of_its_definition(example: ModuleType) -> None:
    metrics = importlib.import_module("common.segmentation_metrics")
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(4, (3, 9, 7), generator=generator)  # of five classes 4 is in neither
    labels = torch.randint(4, (3, 9, 7), generator=generator)
    labels[0, 0], labels[labels == 3] = IGNORED, 2  # 3 is predicted, never right
    counted = labels != IGNORED
    found = []
    for c in range(4):
        p, y = (predicted == c) & counted, labels == c
        found.append(float((p & y).sum() / (p | y).sum()))
    assert found[3] == 0
    matrix = sum(metrics.confusion_matrix(p, y, 5) for p, y in zip(predicted, labels, strict=True))
    assert metrics.mean_iou(matrix) == pytest.approx(sum(found) / 4)
    assert metrics.intersection_over_union(matrix)[4].isnan()
    assert metrics.pixel_accuracy(matrix) == pytest.approx(float((predicted == labels)[counted].float().mean()))
    assert int(matrix.sum()) == int(counted.sum())


def test_evaluate_takes_any_callable_and_the_labels_own_size(example: ModuleType, folders: ModuleType) -> None:
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 3:], labels[0] = 1, IGNORED
    files = ((png(np.zeros((4, 6, 3))), png(labels)),) * 3
    scenes = folders.Scenes(files, lambda x: x, ("left", "right"), (8, 12))

    def halves(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 8, 12)
        right = torch.arange(12).ge(6).float().expand(len(x), 8, 12)
        return torch.stack([1 - right, right], 1)

    assert example.evaluate(halves, scenes) == {"mIoU": 1.0, "pixel_accuracy": 1.0}
    assert example.evaluate(lambda x: {"out": -halves(x)}, scenes) == {"mIoU": 0.0, "pixel_accuracy": 0.0}
    left = example.evaluate(lambda x: {"out": torch.eye(2)[0][None, :, None, None].expand(len(x), 2, 8, 12)}, scenes)
    assert left == {"mIoU": 0.25, "pixel_accuracy": 0.5}


def test_the_loss_leaves_out_what_has_no_label(example: ModuleType) -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    labels[:, :2] = IGNORED
    expected = torch.nn.functional.cross_entropy(logits[:, :, 2:], labels[:, 2:])
    loss = example.pixel_loss
    torch.testing.assert_close(loss(lambda x: x, (logits, labels)), expected)
    with_head = loss(lambda x: {"out": x, "aux": 2 * x}, (logits, labels))
    torch.testing.assert_close(with_head, expected + 0.5 * loss(lambda x: 2 * x, (logits, labels)))
    assert loss(lambda x: x, (logits, torch.full_like(labels, IGNORED))) == 0


def test_crops_of_images_and_labels_agree(example: ModuleType, folders: ModuleType) -> None:
    place = np.arange(64 * 96).reshape(64, 96)
    pixels = np.stack([place // 96 * 2, place % 96 * 2, 0 * place], -1)  # tells where a pixel was
    rows, columns = np.arange(64) // 32, np.arange(96) // 32
    labels = rows[:, None] * 3 + columns
    scenes = folders.Scenes(((png(pixels), png(labels)),) * 20, lambda x: x, tuple("abcdef"), (64, 96))
    batches = example.Batches(scenes, 8)
    torch.manual_seed(0)
    first, second = list(batches), list(batches)
    torch.manual_seed(0)
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(first, batches, strict=True))
    assert not torch.equal(first[0][0], second[0][0])
    assert len(first) == len(batches) == 2
    x, y = (torch.cat(parts) for parts in zip(*first, strict=True))
    assert x.shape == (16, 3, 48, 64)
    assert y.shape == (16, 48, 64)
    seen = (x.permute(0, 2, 3, 1) * example.STD + example.MEAN) / 2
    expected = (seen[..., 0] > 31.5) * 3 + ((seen[..., 1] + 0.5) // 32).long()
    assert (expected == y).float().mean() > 0.98  # all but the borders between classes
    spans = seen[:, 0, :, 1].max(1).values - seen[:, 0, :, 1].min(1).values
    assert 64 / 1.5 - 2 <= spans.min() < 64 < spans.max() <= 64 / 0.75
    falls = seen[:, 0, 0, 1] > seen[:, 0, -1, 1]
    assert 0 < falls.sum() < 16


def test_fewer_images_than_a_batch_are_one_batch(example: ModuleType, small: Path) -> None:
    assert [len(y) for _, y in example.Batches(example.load_scenes("train"))] == [4]


def test_reads_the_pack(example: ModuleType, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = example.load_scenes("test")
    assert len(scenes) == 3
    assert len(scenes.classes) == 11
    pixels, labels = stripes(32, 48, 2)
    assert np.array_equal(np.asarray(scenes[2][0]), pixels)
    assert np.array_equal(np.asarray(scenes[2][1]), np.where(labels == 11, IGNORED, labels))
    monkeypatch.setenv("SLRC_SUBSET", "2")
    spread = example.load_scenes("test")
    assert spread.files == (scenes.files[0], scenes.files[1])


def test_reads_the_folder_of_segnet(example: ModuleType, data: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            write(data / "CamVid" / split / f"{number}.png", png(np.full((6, 8, 3), 9)))
            write(data / "CamVid" / f"{split}annot" / f"{number}.png", png(np.full((6, 8), 10 + number)))
    scenes = example.load_scenes("val")
    assert [np.unique(labels).tolist() for _, labels in scenes] == [[10], [IGNORED]]
    assert scenes[0][0].size == (480, 360)
    assert scenes[0][1].size == (8, 6)
    (data / "CamVid" / "valannot" / "1.png").unlink()
    with pytest.raises(WorkloadError, match=r"`val` of camvid lacks `.*valannot/1\.png`"):
        example.load_scenes("val")


COLOURED = [[[128, 128, 128], [64, 192, 0]], [[192, 128, 64], [0, 0, 0]], [[192, 0, 192], [128, 128, 192]]]


@pytest.mark.parametrize("layout", ["split folders", "original"])
def test_reads_labels_in_colours(example: ModuleType, data: Path, layout: str) -> None:
    folder = data / "CamVid"
    if layout == "original":
        images, labels = folder / "701_StillsRaw_full", folder / "LabeledApproved_full"
        write(folder / "val.txt", b"/SegNet/CamVid/val/a.png /SegNet/CamVid/valannot/a.png\n")
        write(images / "b.png", png(np.zeros((3, 2, 3))))
    else:
        images, labels = folder / "val", folder / "val_labels"
    write(images / "a.png", png(np.zeros((3, 2, 3))))
    write(labels / "a_L.png", png(COLOURED))
    scenes = example.load_scenes("val")
    assert len(scenes) == 1
    assert np.asarray(scenes[0][1]).tolist() == [[0, 1], [9, IGNORED], [10, 4]]
    if layout == "original":
        with pytest.raises(WorkloadError, match=r"does not say which images are `train`: expected `train\.txt`"):
            example.load_scenes("train")


def test_reads_voc(example: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRC_DATASET", "voc")
    folder = data / "VOCdevkit" / "VOC2012"
    write(folder / "ImageSets" / "Segmentation" / "val.txt", b"a\n")
    write(folder / "JPEGImages" / "a.jpg", png(np.zeros((4, 6, 3))))
    write(folder / "SegmentationClass" / "a.png", png([[0, 15, 255]], "P"))
    scenes = example.load_scenes("val")
    assert len(scenes.classes) == 21
    assert np.asarray(scenes[0][1]).tolist() == [[0, 15, IGNORED]]
    with pytest.raises(WorkloadError, match="not public"):
        example.load_scenes("test")


def test_reads_cityscapes(example: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRC_DATASET", "cityscapes")
    stem = "aachen_000000_000019"
    write(data / "cityscapes/leftImg8bit/train/aachen" / f"{stem}_leftImg8bit.png", png(np.zeros((2, 4, 3))))
    write(data / "cityscapes/gtFine/train/aachen" / f"{stem}_gtFine_labelIds.png", png([[0, 7, 33, 29]]))
    scenes = example.load_scenes("train")
    assert len(scenes.classes) == 19
    assert np.asarray(scenes[0][1]).tolist() == [[IGNORED, 0, 18, IGNORED]]


@pytest.mark.parametrize(
    ("name", "held"),
    [("voc", "VOCdevkit/VOC2012/JPEGImages"), ("cityscapes", "cityscapes/leftImg8bit/train/aachen")],
)
def test_what_is_unpacked_by_half_is_not_whole(
    data: Path, name: str, held: str, monkeypatch: pytest.MonkeyPatch, example: ModuleType
) -> None:
    (data / held).mkdir(parents=True)
    monkeypatch.setenv("SLRC_DATASET", name)
    with pytest.raises(WorkloadError, match=rf"`train` of {name} in `.*` is not whole: .*\n\nhint: .*SLRC_DATA to"):
        load_workload(str(FILE))


@pytest.mark.parametrize("name", ["camvid", "voc", "cityscapes"])
def test_without_data_the_error_says_what_to_get(
    example: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLRC_DATASET", name)
    with pytest.raises(WorkloadError, match=f"no {name} in `SLRC_DATA=") as raised:
        load_workload(f"{FILE}:lraspp")
    assert "SLRC_DATA to" in str(raised.value.hint)
    monkeypatch.delenv("SLRC_DATA")
    with pytest.raises(WorkloadError, match="`SLRC_DATA` is not set"):
        load_workload(str(FILE))


@pytest.mark.parametrize("variable", ["SLRC_MODEL", "SLRC_DATASET", "SLRC_SPLIT"])
def test_an_unknown_choice_is_named(small: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "other")
    with pytest.raises(WorkloadError, match=rf"`{variable}=other` is unknown\n\nhint: choose one of "):
        load_workload(str(FILE))


def test_the_dense_network_is_trained_once(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "1")
    first = load_workload(str(FILE))
    assert "dense unet: epoch 1/1, loss" in capsys.readouterr().err
    second = load_workload(str(FILE))
    assert not capsys.readouterr().err
    assert second.name == "camvid-unet"
    assert second.example_inputs[0].shape == (1, 3, 32, 48)
    assert second.measure(second.model) == first.measure(first.model)


class Backbone(nn.Module):
    """Features of 8 channels at half the size, and of 16 at a quarter, by two names."""

    def __init__(self, shallow: str, deep: str) -> None:
        super().__init__()
        self.shallow = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.names = shallow, deep

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shallow = self.shallow(x)
        return dict(zip(self.names, (shallow, self.deep(shallow)), strict=True))


SMALL: dict[str, Callable[[ModuleType], nn.Module]] = {
    "unet": lambda example: example.UNet(11, 4),
    "lraspp": lambda example: LRASPP(Backbone("low", "high"), 8, 16, 11, 16),
    "deeplab": lambda example: example.DeepLab(Backbone("aux", "out"), FCNHead(16, 11), FCNHead(8, 11)),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_network_of_each_kind_compiles(
    example: ModuleType, small: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrc.measuring.timing.PATIENCE", 0.0)
    torch.manual_seed(0)
    batches, held_out = example.Batches(example.load_scenes("train")), example.load_scenes("val")
    workload = example.as_workload(SMALL[name](example), batches, held_out, name)
    options: dict[str, Any] = {"round_to": 1, "threads": 1, "epochs": 1}
    report = slrc.compile(workload, tmp_path / "out", pattern="channel", sparsity=0.5, **options)
    assert all(check.passed for check in report.checks)
    assert any(check.step == "mIoU: masked module = ort" for check in report.checks)
    assert report.macs.compiled < 0.7 * report.macs.dense


def test_whole_images_calibrate_though_training_crops(example: ModuleType, small: Path) -> None:
    batches, held_out = example.Batches(example.load_scenes("train")), example.load_scenes("val")
    workload = example.as_workload(example.UNet(11, 4), batches, held_out, "unet")
    program = slrc.capture(workload)
    assert [tuple(x.shape) for (x,) in calibration_inputs(program, workload, 4, 0)] == [(4, 3, 32, 48)]
