"""Packages of AOTInductor: what is compiled equals the program, and nothing else is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.backends import Artifact, Target, get_backend, parse_target
from slrc.backends.base import MANIFEST
from slrc.backends.runner_module import RunnerModule
from slrc.backends.torch import TorchInductor, backend
from slrc.backends.torch.package import why_no_compiler
from slrc.backends.torch.precision import in_half
from slrc.errors import BackendError
from slrc.forms.form import FormKind
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.measuring import choose_forms as form_choice
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.latency_meter import LatencyMeter
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.progress import Quiet
from slrc.reporting.bench import bench_output
from slrc.reporting.report import Report
from slrc.verify import outputs_of

TORCH = Target("torch")
pytestmark = pytest.mark.usefixtures("quick_timing")
needs_compiler = pytest.mark.skipif(bool(why_no_compiler()), reason=f"needs a C++ compiler: {why_no_compiler()}")


class Tokens(nn.Module):
    """A convolution, then attention; two inputs, and outputs in containers, of which one is whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.LayerNorm(32)
        self.wide, self.back, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, others: dict[str, Tensor]) -> dict[str, Any]:
        y = self.conv(x).relu().flatten(2).transpose(1, 2)
        y = y + self.back(self.wide(self.norm(y)).relu())
        seen = nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]
        logits = self.head(seen.softmax(-1).mean(1)) + others["offset"]
        return {"logits": logits, "more": (logits.argmax(-1), seen)}


def inputs_of(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(batch)
    return torch.randn(batch, 3, 6, 6), {"offset": torch.randn(batch, 4)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    return capture(model, inputs_of(1))


@pytest.fixture(scope="module")
def compiled(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """What a compile to this target alone writes; read-only."""
    out = tmp_path_factory.mktemp("torch") / "out"
    workload = slrc.Workload(model=model, example_inputs=inputs_of(1), name="tokens")
    return slrc.compile(workload, out, target="torch", pattern="channel", sparsity=0.5, threads=1), out


@pytest.fixture
def own_copy(compiled: tuple[Report, Path], tmp_path: Path) -> Path:
    return shutil.copytree(compiled[1] / "torch" / "compiled", tmp_path / "copy")


@needs_compiler
def test_a_compile_is_proven_and_measured(compiled: tuple[Report, Path]) -> None:
    report, out = compiled
    checks = {check.step: check for check in report.checks}
    for step in ("eager module = dense on torch", "masked module = torch"):
        assert len(checks[step].inputs) >= 2
        assert 0 < checks[step].max_rel_error <= 1e-4
    assert report.params.compiled < report.params.dense
    (latency,) = report.latency
    assert (latency.target, latency.threads) == ("torch", 1)
    assert latency.compiled_ms.p50 > 0
    (target,) = report.targets
    assert target.size_bytes.compiled == (out / "torch" / "compiled" / "package.pt2").stat().st_size
    assert bench_output(out, 1, Quiet()).latency[0].target == "torch"


@needs_compiler
def test_what_is_loaded_equals_the_program_at_every_batch(compiled: tuple[Report, Path]) -> None:
    folder = compiled[1] / "torch" / "compiled"
    artifact, slim = Artifact.read(folder), slrc.Program.load(compiled[1] / "program")
    assert (artifact.dynamic_batch, artifact.max_batch) == (True, None)
    assert (len(artifact.inputs), len(artifact.outputs)) == (2, 3)
    runner = TorchInductor().load(folder, threads=1)
    module = RunnerModule(runner, artifact, slim)
    for batch in (1, 2, 20):
        found, expected = module(*inputs_of(batch)), slim.module()(*inputs_of(batch))
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    x, others = inputs_of(3)
    strided = x.transpose(2, 3)  # a package reads memory as it lies
    torch.testing.assert_close(runner(strided, others["offset"]), outputs_of(slim.module(), (strided, others)))
    runner.prepare(x, others["offset"])()


@needs_compiler
def test_inputs_that_do_not_fit_are_an_error(compiled: tuple[Report, Path]) -> None:
    runner, (x, others) = TorchInductor().load(compiled[1] / "torch" / "compiled"), inputs_of(2)
    with pytest.raises(BackendError, match="takes 2 inputs, got 1"):
        runner(x)
    for wrong in (x[..., :3], x.double()):
        with pytest.raises(BackendError, match="failed on inputs float"):
            runner(wrong, others["offset"])


@needs_compiler
def test_only_the_package_that_the_manifest_describes_is_loaded(
    own_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading runs code: what was exchanged must be refused before."""
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("it was loaded"))
    package = own_copy / "package.pt2"
    package.write_bytes(package.read_bytes()[:-1] + b"!")
    with pytest.raises(BackendError, match="is not the one that its manifest describes"):
        TorchInductor().load(own_copy)
    package.unlink()
    with pytest.raises(BackendError, match="there is no package"):
        TorchInductor().load(own_copy)
    with pytest.raises(BackendError, match="holds no ONNX file"):
        TorchInductor().load(own_copy, stock=True)


@needs_compiler
@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"torch": "1.13.1"}, "was compiled by PyTorch 1.13.1, and this is"),
        ({"processor": "riscv64"}, "it is for riscv64, and this machine is"),
        ({"instruction_sets": "fma avx1024"}, "the processor has no avx1024"),
        ({"device": "cuda", "compute_capability": "sm10"}, "it is for a GPU sm10, and this machine is"),
    ],
)
def test_a_package_for_another_machine_is_refused(own_copy: Path, properties: dict[str, str], message: str) -> None:
    data = json.loads((own_copy / MANIFEST).read_text())
    data["properties"] |= properties
    (own_copy / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BackendError, match=message):
        TorchInductor().load(own_copy)


def test_without_a_compiler_it_is_said(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    why = TorchInductor().available(TORCH)
    assert why == ("no C++ compiler: tried no-such-compiler; set CXX or install g++", "")
    with pytest.raises(BackendError, match="cannot be emitted for target `torch`: no C\\+\\+ compiler"):
        slrc.lower(program, "torch", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said() -> None:
    why = "there is no CUDA GPU that torch can use"
    assert TorchInductor().available(parse_target("torch:cuda+bf16")) == (why, why)


def test_targets() -> None:
    assert parse_target("torch:cuda+fp16").folder == "torch-cuda-fp16"
    for text, message in (
        ("torch:int8", "unknown option `int8`: expected cpu, cuda, fp32, fp16, bf16"),
        ("torch:cpu+cuda", "a package runs on one device, got cpu and cuda"),
        ("torch:fp16+bf16", "a package has one precision, got fp16 and bf16"),
    ):
        with pytest.raises(BackendError, match=message):
            parse_target(text)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_of_layers(program: Program, model: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    half = in_half(program, dtype)
    kinds = {node.name: node.meta["val"].dtype for node in half.graph.nodes if op_name(node) in ("linear", "conv2d")}
    assert set(kinds.values()) == {dtype}
    norm = next(node for node in half.graph.nodes if op_name(node) in ("layer_norm", "native_layer_norm"))
    assert norm.args[0].meta["val"].dtype == torch.float32
    stored = {t.dtype for n, t in half.state_dict.items() if "norm" not in n}
    assert stored == {dtype}
    for batch in (1, 3):
        found, expected = half.module()(*inputs_of(batch)), model(*inputs_of(batch))
        assert found["logits"].dtype == torch.float32
        torch.testing.assert_close(found["logits"], expected["logits"], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found["more"][1], expected["more"][1], atol=tolerance, rtol=tolerance)


def test_forms_are_chosen_by_cost_and_blocks_run_dense(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package takes too long to compile for timing every layer."""
    monkeypatch.setattr(form_choice, "Clock", lambda *_: pytest.fail("it was timed"))
    for pattern in ("columns:2", "block:8x1"):
        plan = slrc.plan(program, pattern, 0.75)
        pruned, _ = ApplyMasks(slrc.Masks.project(plan, program.tensors))(program)
        choice = choose_forms(pruned, TORCH, threads=1)
        assert choice.taken == "cost model"
        assert {layer.form.kind for layer in choice.layers} == {FormKind.SPLIT}
    assert "torch has no kernels for packed blocks" in choice.dropped[0]


def test_weights_that_run_dense_are_told(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "build_package", lambda *_: {})
    monkeypatch.setattr(backend, "why_no_compiler", lambda: "")
    plan = slrc.plan(program, "2:4")
    pruned, _ = ApplyMasks(slrc.Masks.project(plan, program.tensors))(program)
    assert TorchInductor().lower(program, TORCH, tmp_path).warnings == ()
    (warning,) = TorchInductor().lower(pruned, TORCH, tmp_path).warnings
    assert warning == f"{len(list(plan))} layers with 2:4 weights run dense: a package has no kernels for them"


def test_a_latency_budget_is_refused(program: Program) -> None:
    assert get_backend(TORCH).why_not_timed(TORCH)
    with pytest.raises(BackendError, match="torch cannot be timed here: a package takes many seconds to compile"):
        LatencyMeter(program, TORCH)
