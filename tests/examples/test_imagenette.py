"""The Imagenette example: folded weights, both readers and what it says without data."""

import copy
import importlib
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from slrc.errors import WorkloadError
from slrc.load_workload import load_workload

FILE = Path(__file__).parents[2] / "examples" / "imagenette.py"


@pytest.fixture
def imagenette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with an empty data folder and a cache of its own."""
    monkeypatch.setenv("SLRC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("imagenette")


def jpeg(level: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_reads_the_pack(imagenette: ModuleType, tmp_path: Path) -> None:
    levels, numbers = (0, 64, 255), (0, 701, 491)
    files = [jpeg(level, (96, 96)) for level in levels]
    pack = {
        "data": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": np.array(numbers),
    }
    np.savez(tmp_path / "data" / "imagenette96_train.npz", **pack)
    for _ in range(2):  # the second time from what was decoded
        pixels, labels = imagenette.load_images("train")
        assert pixels.shape == (3, 96, 96, 3)
        assert pixels[:, 48, 48, 0].tolist() == list(levels)
        assert labels.tolist() == [0, 9, 3]


def test_reads_folders_and_cuts_a_square(imagenette: ModuleType, tmp_path: Path) -> None:
    for number, name in enumerate(("n01440764", "n02102040")):
        folder = tmp_path / "data" / "imagenette2-160" / "val" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(jpeg(100 * number, (200, 160)))
    pixels, labels = imagenette.load_images("val")
    assert pixels.shape == (2, 96, 96, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 100]
    assert labels.tolist() == [0, 1]


def test_folded_weights_keep_their_outputs(imagenette: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = imagenette.mobilenet_v2()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    weights = {}
    for i, conv in enumerate(convs):
        weights[f"{i:02}.weight"] = nn.init.kaiming_normal_(torch.empty_like(conv.weight)).half()
        weights[f"{i:02}.bias"] = torch.randn(conv.out_channels) / 4
    weights["52.weight"], weights["52.bias"] = torch.randn(1001, 1280, 1, 1).half(), torch.randn(1001)
    save_file(weights, tmp_path / "weights.safetensors")
    batches = [(torch.randn(4, 3, 64, 64), torch.zeros(4)) for _ in range(2)]
    imagenette.load_folded(model, tmp_path / "weights.safetensors", batches)

    folded = copy.deepcopy(model)
    for layer in list(folded.modules()):
        for name, norm in list(layer.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                layer.add_module(name, nn.Identity())
    for i, conv in enumerate(m for m in folded.modules() if isinstance(m, nn.Conv2d)):
        conv.weight = nn.Parameter(weights[f"{i:02}.weight"].float())
        conv.bias = nn.Parameter(weights[f"{i:02}.bias"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), folded(x), rtol=1e-3, atol=1e-3)
        model.train()
        x, _ = batches[0]
        assert (model.features[0](x) - folded.features[0](x)).abs().mean() < 0.05  # its own statistics
        model.eval()
        torch.testing.assert_close(
            model.classifier[1].weight, weights["52.weight"].float()[[n + 1 for n in imagenette.CLASSES]].flatten(1)
        )


def test_without_data_the_error_says_what_to_download(
    imagenette: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)no Imagenette in `SLRC_DATA=.*fastai/imagenette"):
        load_workload(str(FILE))
    monkeypatch.delenv("SLRC_DATA")
    with pytest.raises(WorkloadError, match="`SLRC_DATA` is not set"):
        load_workload(str(FILE))


def test_the_workload_trains_on_squares(
    imagenette: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        folder = tmp_path / "data" / "imagenette2-160" / split / "n01440764"
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.jpg").write_bytes(jpeg(80 * i, (96, 96)))
    monkeypatch.setenv("SLRC_DENSE_EPOCHS", "1")
    workload = load_workload(str(FILE))
    assert workload.example_inputs[0].shape == (1, 3, 96, 96)
    assert 0 <= workload.evaluate(workload.model)["accuracy"] <= 1
