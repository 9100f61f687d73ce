"""ONNX Runtime: what is exported computes what the program does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.backends import Artifact, parse_target
from slrc.backends.ort import OnnxRuntime
from slrc.backends.runner_module import RunnerModule
from slrc.errors import BackendError
from slrc.ir.program import Program, capture
from slrc.verify import outputs_of


class TwoInputs(nn.Module):
    """Returns a nested dict of two outputs; takes a tensor and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Any]:
        y = self.linear(x) + more["offset"]
        return {"logits": y, "all": (y.softmax(-1), x * 2)}


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(2, 4))


def two_inputs(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(batch)
    return torch.randn(batch, 4), {"offset": torch.randn(batch, 3)}


def module_of(program: Program, folder: Path) -> RunnerModule:
    runner = OnnxRuntime().load(folder, threads=1)
    return RunnerModule(runner, Artifact.read(folder), program)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that takes `(n, 4)`; read-only."""
    folder = tmp_path_factory.mktemp("linear")
    slrc.lower(capture(nn.Sequential(nn.Linear(4, 3)), (torch.randn(1, 4),)), "ort", folder)
    return folder


@pytest.fixture
def own_copy(linear: Path, tmp_path: Path) -> Path:
    return shutil.copytree(linear, tmp_path / "copy")


def test_what_is_exported_equals_the_program(tiny_net: Callable[[], nn.Module], tmp_path: Path) -> None:
    program = capture(tiny_net(), (torch.randn(1, 4, 6, 6),))
    lowered = slrc.lower(program, "ort", tmp_path / "out")
    assert lowered.artifact == Artifact.read(lowered.folder)
    assert (lowered.artifact.dynamic_batch, lowered.artifact.max_batch) == (True, None)
    assert (len(lowered.artifact.inputs), len(lowered.artifact.outputs)) == (1, 1)
    assert lowered.size_bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    runner = OnnxRuntime().load(lowered.folder)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(runner(x), outputs_of(program.module(), (x,)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(runner(x.transpose(2, 3)), outputs_of(program.module(), (x.transpose(2, 3),)))


def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    model = TwoInputs().eval()
    program = capture(model, two_inputs(1))
    slrc.lower(program, "ort", tmp_path)
    inputs = two_inputs(5)
    found, expected = module_of(program, tmp_path)(*inputs), model(*inputs)
    assert found.keys() == expected.keys()
    assert isinstance(found["all"], tuple)
    torch.testing.assert_close(found, expected)


class WindowAttention(nn.Module):
    """Attention over five dimensions, as in models that attend within blocks of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(8, 24), {}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5)
        return nn.functional.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize("name", ["plain", "causal", "bias", "choice", "scale"])
def test_attention_over_five_dimensions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WindowAttention().eval()
    options = {
        "causal": {"is_causal": True},
        "bias": {"attn_mask": torch.randn(5, 5)},
        "choice": {"attn_mask": torch.rand(5, 5) < 0.8},
        "scale": {"scale": 0.3},
    }
    model.options = options.get(name, {})
    program = capture(model, (torch.randn(2, 3, 5, 8),))
    slrc.lower(program, "ort", tmp_path)
    x = torch.randn(3, 3, 5, 8)
    torch.testing.assert_close(module_of(program, tmp_path)(x), model(x))


def test_a_fixed_batch_is_run_in_pieces(tmp_path: Path) -> None:
    model = FixedBatch().eval()
    program = capture(model, (torch.randn(2, 4),))
    lowered = slrc.lower(program, "ort", tmp_path)
    assert (lowered.artifact.dynamic_batch, lowered.artifact.max_batch) == (False, 2)
    x = torch.randn(5, 4)
    torch.testing.assert_close(module_of(program, tmp_path)(x), model.linear(x))


def test_prepare_runs_on_its_inputs(linear: Path) -> None:
    x = torch.randn(3, 4)
    runner = OnnxRuntime().load(linear)
    assert torch.equal(torch.from_numpy(runner.prepare(x)()[0]), runner(x)[0])


def test_the_wrong_number_of_inputs(linear: Path) -> None:
    x = torch.randn(1, 4)
    with pytest.raises(BackendError, match="takes 1 inputs, got 2"):
        OnnxRuntime().load(linear)(x, x)


@pytest.mark.parametrize("damage", [b"", b"not onnx"])
def test_a_damaged_model_file(own_copy: Path, damage: bytes) -> None:
    (own_copy / "model.onnx").write_bytes(damage)
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load `.*model\.onnx`"):
        OnnxRuntime().load(own_copy)


def test_a_model_file_that_is_gone(own_copy: Path) -> None:
    (own_copy / "model.onnx").unlink()
    with pytest.raises(BackendError, match="cannot load"):
        OnnxRuntime().load(own_copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "it has no manifest.json"), ("{", "Invalid JSON"), ("{}", "field `target`: Field required")],
)
def test_a_folder_that_is_no_artifact(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BackendError, match=message):
        OnnxRuntime().load(tmp_path)


def test_a_manifest_of_another_version(own_copy: Path) -> None:
    manifest = own_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"manifest_version": 1', '"manifest_version": 99'))
    with pytest.raises(BackendError, match="field `manifest_version`: Input should be 1"):
        OnnxRuntime().load(own_copy)


def test_targets() -> None:
    assert parse_target(" ort ").folder == "ort"
    with pytest.raises(BackendError, match="`ort` takes a processor"):
        parse_target("ort:fp16")
    with pytest.raises(BackendError, match="unknown target `onnx`: expected one of ort, "):
        parse_target("onnx")
