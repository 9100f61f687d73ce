"""What a MODEL argument becomes, and what is said about one that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slrc
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


X = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": lambda x: x}, "`Workload.model` must be a torch.nn.Module, got a function"),
        ({"example_inputs": X}, "`Workload.example_inputs` must be a tuple of inputs, got a tensor"),
        ({"example_inputs": [X]}, "must be a tuple of inputs, got a list of 1"),
        ({"example_inputs": ()}, "must be a tuple of inputs, got a tuple of 0"),
        ({"train_batches": 3}, "`Workload.train_batches` must be iterable, got a int"),
        ({"train_batches": iter([X])}, "can be read only once"),
        ({"eval_batches": X}, "`Workload.eval_batches` must be an iterable of batches, got a tensor"),
        ({"eval_batches": [X], "evaluate": lambda model: {}}, "`Workload.eval_batches` exclude each other"),
        ({"evaluate_batch": lambda model, batch: {}}, "`Workload.evaluate_batch` needs `eval_batches`"),
    ],
)
def test_what_a_workload_can_get_wrong(fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": nn.Linear(2, 2), "example_inputs": (X,)}
    with pytest.raises(WorkloadError, match=message):
        slrc.Workload(**{**given, **fields})


def test_a_workload_does_not_start_to_read_its_data() -> None:
    class Expensive:
        def __iter__(self) -> Iterator[Any]:
            pytest.fail("starts eight worker processes")

    slrc.Workload(model=nn.Linear(2, 2), example_inputs=(X,), train_batches=Expensive())


def test_measure_gives_the_leading_metric_and_puts_the_mode_back() -> None:
    modes = []

    def evaluate(model: nn.Module) -> dict[str, Any]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"accuracy": torch.tensor(0.75), "loss": 0.5}

    workload = slrc.Workload(model=nn.Linear(2, 2), example_inputs=(X,), evaluate=evaluate)
    for training in (True, False):
        workload.model.train(training)
        assert workload.measure(workload.model) == ("accuracy", 0.75)
        assert workload.model.training is training
    assert modes == [(False, False)] * 2


def test_measure_without_evaluate() -> None:
    assert slrc.Workload(model=nn.Linear(2, 2), example_inputs=(X,)).measure(nn.Linear(2, 2)) is None


LABELS = torch.tensor([0, 1, 1, 1, 0])
BATCHES = [(torch.eye(2)[LABELS[:4]], LABELS[:4]), (torch.eye(2)[LABELS[4:]], 1 - LABELS[4:])]
"""Four samples that a model which returns its inputs gets right, and one that it gets wrong."""


def test_batches_count_as_many_samples_as_they_hold() -> None:
    workload = slrc.Workload(model=nn.Identity(), example_inputs=(X,), eval_batches=BATCHES)
    assert workload.is_evaluated
    assert workload.measure(nn.Identity()) == ("accuracy", 0.8)
    pixels = [(x[:, :, None, None].expand(-1, -1, 3, 2), y[:, None, None].expand(-1, 3, 2)) for x, y in BATCHES]
    segmentation = slrc.Workload(model=nn.Identity(), example_inputs=(X,), eval_batches=pixels)
    assert segmentation.measure(nn.Identity()) == ("accuracy", 0.8)


def test_batches_are_measured_in_evaluation_mode_by_a_function_of_ones_own() -> None:
    modes = []

    def evaluate_batch(model: nn.Module, batch: Any) -> dict[str, Any]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"loss": (batch[0].sum() / 3, len(batch[0])), "other": 1}

    model = nn.Linear(2, 2)
    workload = slrc.Workload(model=model, example_inputs=(X,), eval_batches=BATCHES, evaluate_batch=evaluate_batch)
    assert workload.measure(model) == ("loss", pytest.approx(1 / 3))
    assert modes == [(False, False)] * 2
    assert model.training


@pytest.mark.parametrize(
    ("batches", "found", "message"),
    [
        (BATCHES, {"accuracy": 0.5}, r"must return {\"metric\": \(sum, count\)}, got {'accuracy': 0.5}"),
        (BATCHES, {"accuracy": ("many", 2)}, "must return"),
        (BATCHES, {}, "must return"),
        (BATCHES, None, "must return"),
        (BATCHES, {"loss": (1.0, 0)}, "hold nothing to evaluate: 2 batches, a count of 0"),
        ([], {"loss": (1.0, 1)}, "hold nothing to evaluate: 0 batches"),
    ],
)
def test_what_evaluate_batch_can_get_wrong(batches: Any, found: Any, message: str) -> None:
    workload = slrc.Workload(
        model=nn.Identity(), example_inputs=(X,), eval_batches=batches, evaluate_batch=lambda model, batch: found
    )
    with pytest.raises(WorkloadError, match=message):
        workload.measure(nn.Identity())


def test_errors_in_batches_of_evaluation_name_the_line() -> None:
    def evaluate_batch(model: nn.Module, batch: Any) -> Any:
        return {f"metric {len(batch[0])}": (1.0, 1)} if batch else {}[0]

    def workload(batches: Any, **fields: Any) -> slrc.Workload:
        return slrc.Workload(model=nn.Identity(), example_inputs=(X,), eval_batches=batches, **fields)

    with pytest.raises(WorkloadError, match=r"`evaluate_batch` failed at .*test_workload\.py.*else \{\}\[0\]"):
        workload([()], evaluate_batch=evaluate_batch).measure(nn.Identity())
    with pytest.raises(WorkloadError, match="returned `metric 4` first for one batch, `metric 1` for another"):
        workload(BATCHES, evaluate_batch=evaluate_batch).measure(nn.Identity())
    with pytest.raises(WorkloadError, match="the default `evaluate_batch` needs batches `\\(x, y\\)`"):
        workload([X]).measure(nn.Identity())
    failing = torch.utils.data.DataLoader(BATCHES, batch_size=None, collate_fn=lambda batch: batch[2])
    with pytest.raises(WorkloadError, match=r"reading `eval_batches` failed at .*test_workload\.py"):
        workload(failing).measure(nn.Identity())


def test_cached_weights_trains_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "weights.safetensors"
    trained = []

    def train(model: nn.Module) -> None:
        trained.append(model)
        nn.init.constant_(model.weight, 3.0)

    first = slrc.cached_weights(nn.Linear(2, 2), path, train)
    second = slrc.cached_weights(nn.Linear(2, 2), path, train)
    assert len(trained) == 1
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"]


def test_cached_weights_of_an_interrupted_training_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"

    def fails(model: nn.Module) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slrc.cached_weights(nn.Linear(2, 2), path, fails)
    assert list(tmp_path.iterdir()) == []


def test_cached_weights_whose_writing_fails_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"

    def half_written(model: nn.Module, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("slrc.workload.save_model", half_written)
        with pytest.raises(OSError, match="No space left"):
            slrc.cached_weights(nn.Linear(2, 2), path, lambda m: None)
    assert not path.exists()
    slrc.cached_weights(nn.Linear(2, 2), path, lambda m: None)
    assert path.exists()
