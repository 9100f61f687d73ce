"""What a MODEL argument becomes, and what is said about one that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from slrc.errors import WorkloadError
from slrc.load_workload import load_workload

MINIMAL = """
import torch
import slrc

def workload():
    return slrc.Workload(model=torch.nn.Linear(2, 2), example_inputs=(torch.zeros(1, 2),))
"""


@pytest.fixture(autouse=True)
def _imports_undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "site-packages" not in (getattr(sys.modules[name], "__file__", None) or "site-packages"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "mynet.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


def test_from_a_file(write: Callable[..., Path]) -> None:
    workload = load_workload(str(write(MINIMAL)))
    assert isinstance(workload.model, nn.Linear)
    assert workload.name == "mynet"


def test_from_a_named_function_of_a_file(write: Callable[..., Path]) -> None:
    path = write(MINIMAL.replace("def workload", "def small"))
    assert load_workload(f"{path}:small").name == "small"


def test_a_name_of_its_own_is_kept(write: Callable[..., Path]) -> None:
    path = write(MINIMAL.replace("slrc.Workload(", "slrc.Workload(name='mine', "))
    assert load_workload(str(path)).name == "mine"


def test_a_file_may_import_its_neighbour(write: Callable[..., Path]) -> None:
    write("SIZE = 2\n", "neighbour_of_mynet.py")
    path = write(MINIMAL.replace("import torch\n", "import torch\nfrom neighbour_of_mynet import SIZE\n", 1))
    assert load_workload(str(path)).name == "mynet"


def test_files_of_the_same_name_do_not_mix(write: Callable[..., Path]) -> None:
    first = write(MINIMAL, "one/mynet.py")
    second = write(MINIMAL.replace("Linear(2, 2)", "Linear(2, 5)"), "two/mynet.py")
    sizes = [load_workload(str(p)).model.out_features for p in (first, second, first)]
    assert sizes == [2, 5, 2]


def test_a_file_named_like_a_library_does_not_hide_it(write: Callable[..., Path]) -> None:
    import copy

    load_workload(str(write(MINIMAL, "copy.py")))
    assert sys.modules["copy"] is copy


def test_from_a_module(write: Callable[..., Path]) -> None:
    write("", "netpackage/__init__.py")
    write(MINIMAL.replace("def workload", "def small"), "netpackage/nets.py")
    assert load_workload("netpackage.nets:small").name == "small"


def test_from_torchvision_with_random_weights() -> None:
    workload = load_workload("torchvision:squeezenet1_1@random")
    assert workload.name == "squeezenet1_1"
    assert workload.example_inputs[0].shape == (1, 3, 224, 224)
    assert workload.train_batches is None
    assert workload.warnings == []


def test_from_timm_with_random_weights() -> None:
    workload = load_workload("timm:test_vit@random")
    size = workload.model.default_cfg["input_size"]
    assert workload.example_inputs[0].shape == (1, *size)


@pytest.mark.parametrize("fetched", [True, False])
def test_pretrained_weights_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch, fetched: bool) -> None:
    import torchvision

    def get_model(name: str, weights: str | None) -> nn.Module:
        if weights is not None and not fetched:
            raise ConnectionError("no network")
        return nn.Identity() if weights is None else nn.Flatten()

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    workload = load_workload("torchvision:resnet18")
    assert isinstance(workload.model, nn.Flatten if fetched else nn.Identity)
    assert ["its weights are random" in w for w in workload.warnings] == ([] if fetched else [True])


SHAPES = {
    "squeezenet1_1": (3, 224, 224),
    "inception_v3": (3, 299, 299),
    "efficientnet_b3": (3, 300, 300),
    "swin_v2_t": (3, 256, 256),
    "vit_b_16": (3, 224, 224),
    "lraspp_mobilenet_v3_large": (3, 520, 520),
    "r3d_18": (3, 16, 112, 112),
    "quantized_mobilenet_v2": (3, 224, 224),
}


@pytest.mark.parametrize("name", SHAPES)
def test_inputs_of_torchvision_are_of_the_size_that_its_weights_take(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **given: asked.append(given) or nn.Identity())
    workload = load_workload(f"torchvision:{name}@random")
    assert workload.example_inputs[0].shape == (1, *SHAPES[name])
    assert workload.warnings == []
    backbone = {"weights_backbone": None} if name.startswith("lraspp") else {}
    assert asked == [{"weights": None, **backbone}]  # else a backbone's weights would be fetched


def test_a_transformer_is_given_images_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    for size in (224, 518):  # that of `vit_h_14` without weights, and with them
        model = nn.Identity()
        model.image_size = size
        monkeypatch.setattr(torchvision.models, "get_model", lambda name, model=model, **_: model)
        assert load_workload("torchvision:vit_h_14@random").example_inputs[0].shape[-2:] == (size, size)


def test_a_size_that_nothing_says_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: nn.Identity())
    workload = load_workload("torchvision:raft_small@random")
    assert workload.example_inputs[0].shape == (1, 3, 224, 224)
    assert "does not say what size of images raft_small takes" in workload.warnings[0]


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("torchvision:resnet19", "`torchvision` has no model `resnet19`", "resnet18"),
        ("timm:nope", "`timm` has no model `nope`", "see the models of timm"),
        ("torchvision:resnet18@imagenet", "unknown weights `@imagenet`", "torchvision:resnet18@random"),
        ("nowhere.py", "`nowhere.py` does not exist", "slrc init nowhere.py"),
        ("nowhere.py:small", "`nowhere.py` does not exist", "slrc init nowhere.py"),
        ("no_such_package.nets:small", "module `no_such_package.nets` cannot be imported", "import"),
        ("resnet50", "cannot tell what model `resnet50` is", "slrc init model.py"),
        ("torchvision:", "cannot tell what model", "torchvision:resnet50"),
    ],
)
def test_unknown_names(spec: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkloadError) as caught:
        load_workload(spec)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"has no function `workload`"),
        ("workload = 3\n", r"has no function `workload`"),
        ("def workload(width): ...\n", "`workload` in .* must take no arguments"),
        ("def workload(): return 3\n", "must return a slrc.Workload, got a int"),
        ("def workload(): return {'model': 1}\n", "must return a slrc.Workload, got a dict with keys 'model'"),
        ("import torch\ndef workload(): return torch.nn.ReLU()\n", "must return a slrc.Workload, got a ReLU"),
        ("def workload():\n    return 1 / 0\n", r"failed at .*mynet\.py:2: `return 1 / 0`: ZeroDivisionError"),
        ("x = undefined\n", r"failed at .*mynet\.py:1: `x = undefined`: NameError"),
        ("def workload(:\n", r"SyntaxError: .*mynet\.py, line 1"),
        (
            "import json\ndef workload():\n    return json.loads('{')\n",
            r"failed at .*mynet\.py:3: `return json\.loads\('\{'\)`: JSONDecodeError",
        ),
        (
            "import torch\ndef workload():\n    return torch.nn.Linear(2, 2)(torch.zeros(3))\n",
            r"failed at .*mynet\.py:3: .*RuntimeError",
        ),
    ],
)
def test_what_a_file_can_get_wrong(write: Callable[..., Path], text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_workload(str(write(text)))


def test_a_module_that_fails_names_its_line(write: Callable[..., Path]) -> None:
    write("x = 1\ny = x.nope\n", "brokenmodule.py")
    with pytest.raises(WorkloadError, match=r"module `brokenmodule` failed at .*brokenmodule\.py:2: `y = x\.nope`"):
        load_workload("brokenmodule:workload")
