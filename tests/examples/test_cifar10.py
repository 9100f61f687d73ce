"""The CIFAR-10 example: networks, batches, readers and what it says without data."""

import importlib.util
import io
import os
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_model

import slrc
from slrc.errors import WorkloadError
from slrc.load_workload import load_workload

FILE = Path(__file__).parents[2] / "examples" / "cifar10.py"
WEIGHTS = Path(os.environ.get("SLRC_DATA", "missing")).expanduser() / "weights"


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10_example", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and a cache of its own."""
    for name in ("SLRC_MODEL", "SLRC_SUBSET", "SLRC_DENSE_EPOCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_original(folder: Path) -> None:
    """Write torchvision's format: two images in each training batch and six test images."""
    target = folder / "cifar-10-batches-py"
    target.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        count = 6 if name == "test_batch" else 2
        planes = np.zeros((count, 3, 32, 32), np.uint8)
        planes[:, 0], planes[:, 1, 0], planes[:, 2, :, 0] = number, 100, 200
        batch = {"data": planes.reshape(count, -1), "labels": [number] * count}
        (target / name).write_bytes(pickle.dumps(batch))


def write_pack(folder: Path) -> None:
    """Write the pack: grey JPEG images of one size share everything before the scan."""
    pack: dict[str, np.ndarray] = {}
    for split, levels in (("train", (0, 64, 128, 255)), ("test", (32, 192))):
        scans = []
        for level in levels:
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (level,) * 3).save(file, "JPEG", quality=75)
            jpeg = file.getvalue()
            start = jpeg.index(b"\xff\xda")
            scans.append(jpeg[start:])
            pack["head"] = np.frombuffer(jpeg[:start], np.uint8)
        pack[f"{split}_scan"] = np.frombuffer(b"".join(scans), np.uint8)
        pack[f"{split}_len"] = np.array([len(scan) for scan in scans], np.uint16)
        pack[f"{split}_y"] = np.arange(len(levels), dtype=np.uint8)
    np.savez(folder / "cifar10.npz", **pack)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("resnet18", 11_173_962),
        ("vgg16", 14_724_042),
        ("resnet50", 23_520_842),
        ("mobilenet_v2", 2_236_682),
        ("swin", 929_822),
        ("mixer", 900_618),
    ],
)
def test_a_network_maps_images_to_ten_logits(cifar10: ModuleType, name: str, parameters: int) -> None:
    model = cifar10.NETWORKS[name]().eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_published_weights_load(cifar10: ModuleType, name: str) -> None:
    file = WEIGHTS / f"cifar10_{name}.safetensors"
    if not file.exists():
        pytest.skip("needs SLRC_DATA with weights")
    assert load_model(cifar10.NETWORKS[name](), str(file)) == (set(), [])


def test_without_data_the_error_says_what_to_download(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no CIFAR-10 in `SLRC_DATA=.*cifar-10-python\.tar\.gz") as raised:
        load_workload(f"{FILE}:vgg16")
    assert "set SLRC_DATA to the folder that holds `cifar-10-batches-py`" in str(raised.value.hint)
    monkeypatch.delenv("SLRC_DATA")
    with pytest.raises(WorkloadError, match="`SLRC_DATA` is not set"):
        load_workload(str(FILE))


def test_an_unknown_model_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRC_MODEL", "resnet21")
    with pytest.raises(WorkloadError, match=r"`SLRC_MODEL=resnet21` is unknown\n\nhint: .*resnet20"):
        load_workload(str(FILE))


def test_reads_what_torchvision_unpacks(cifar10: ModuleType, data: Path) -> None:
    write_original(data)
    pixels, labels = cifar10.load_images("train")
    assert pixels.shape == (10, 32, 32, 3)
    assert pixels.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert pixels[-1, 0, 0].tolist() == [4, 100, 200]
    assert pixels[-1, 0, 1].tolist() == [4, 100, 0]
    assert pixels[-1, 1, 0].tolist() == [4, 0, 200]
    assert cifar10.load_images("test")[1].tolist() == [5] * 6


def test_reads_the_pack_and_decodes_it_once(cifar10: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pack(data)
    pixels, labels = cifar10.load_images("train")
    assert pixels[:, 16, 16].tolist() == [[level] * 3 for level in (0, 64, 128, 255)]
    assert labels.tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(cifar10, "Image", None)
    assert torch.equal(cifar10.load_images("train")[0], pixels)
    assert [file.name for file in cifar10.cache_folder().iterdir()] == ["cifar10-jpeg-train.npy"]


def test_a_subset_is_evenly_spread(cifar10: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original(data)
    monkeypatch.setenv("SLRC_SUBSET", "3")
    assert cifar10.load_images("train")[1].tolist() == [0, 1, 3]
    assert len(cifar10.load_images("test")[0]) == 3


def test_batches_follow_the_seed_and_change_with_the_epoch(cifar10: ModuleType) -> None:
    pixels = torch.randint(256, (70, 32, 32, 3), dtype=torch.uint8)
    batches = cifar10.Batches(pixels, torch.arange(70), batch_size=32)
    torch.manual_seed(0)
    first, second = list(batches), list(batches)
    torch.manual_seed(0)
    again = list(batches)
    assert len(first) == len(batches) == 2
    assert first[0][0].shape == (32, 3, 32, 32)
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], second[0][1])
    labels = torch.cat([y for _, y in first])
    assert len(labels.unique()) == 64


def test_fewer_images_than_a_batch_are_one_batch(cifar10: ModuleType) -> None:
    batches = cifar10.Batches(torch.zeros(5, 32, 32, 3, dtype=torch.uint8), torch.arange(5))
    assert [len(y) for _, y in batches] == [5]


def test_crop_shifts_pads_and_mirrors(cifar10: ModuleType) -> None:
    pixels = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    corners = torch.tensor([[4, 0, 4], [4, 8, 4]])
    cut = cifar10.crop(pixels, corners, torch.tensor([False, False, True]))
    assert torch.equal(cut[0], pixels[0])
    assert torch.equal(cut[1, 4:, :28], pixels[1, :28, 4:])
    assert not cut[1, :4].any()
    assert not cut[1, :, 28:].any()
    assert torch.equal(cut[2], pixels[2].flip(1))


def test_normalize_uses_the_channels_mean_and_deviation(cifar10: ModuleType) -> None:
    x = cifar10.normalize(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor(expected))


def test_accuracy_takes_a_runner_without_parameters(cifar10: ModuleType) -> None:
    class Runner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[[3]].expand(len(x), 10)

    labels = torch.tensor([3, 3, 3, 0])
    assert cifar10.accuracy(Runner(), torch.zeros(4, 32, 32, 3, dtype=torch.uint8), labels, 3) == 0.75


def test_the_dense_network_is_trained_once(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_original(data)
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "1")
    torch.manual_seed(1)
    first = load_workload(f"{FILE}:resnet20")
    drawn = torch.rand(1)
    output = capsys.readouterr()
    assert "dense resnet20: epoch 1/1, loss" in output.err
    assert not output.out
    torch.manual_seed(1)
    second = load_workload(f"{FILE}:resnet20")
    assert torch.equal(drawn, torch.rand(1))
    assert not capsys.readouterr().err
    assert isinstance(second, slrc.Workload)
    assert second.name == "cifar10-resnet20"
    assert second.example_inputs[0].shape == (1, 3, 32, 32)
    assert second.measure(second.model) == first.measure(first.model)
    assert second.model.conv1.weight.is_contiguous()
