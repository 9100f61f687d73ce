"""The stages by hand and `compile`, end to end on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc import api, compilation
from slrc.backends import Artifact, Availability
from slrc.backends.ort import OnnxRuntime
from slrc.backends.ort.run import OnnxRuntimeRunner
from slrc.backends.runner_module import RunnerModule
from slrc.backends.tensorrt import TensorRT, backend
from slrc.errors import (
    BackendError,
    ConfigError,
    OutputError,
    PlanError,
    SlrcError,
    VerificationError,
    WorkloadError,
)
from slrc.forms.form import FormChoice
from slrc.ir.program import Program
from slrc.measuring.choose_forms import choose_forms
from slrc.passes.base import PassResult
from slrc.passes.structure.fold_batch_norm import FoldBatchNorm
from slrc.reporting.report import Report
from slrc.verify import outputs_of

MakeWorkload = Callable[..., slrc.Workload]
PATTERNS = {
    "channel": {"sparsity": 0.5},
    "block:4x1": {"sparsity": 0.75},
    "columns:2": {"sparsity": 0.5},
    "unstructured": {"sparsity": 0.9},
    "2:4": {},
}

pytestmark = pytest.mark.usefixtures("quick_timing")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outputs by pattern, made once each."""
    return {"folder": tmp_path_factory.mktemp("compiled")}


@pytest.fixture
def compile_once(compiled: dict[str, Any], tiny_workload: MakeWorkload) -> Callable[[str], tuple[Report, Path]]:
    def run(pattern: str) -> tuple[Report, Path]:
        out = compiled["folder"] / pattern.replace(":", "-")
        if pattern not in compiled:
            compiled[pattern] = slrc.compile(
                tiny_workload(name="tiny"),
                out,
                pattern=pattern,
                epochs=2,
                retrain_epochs=1,
                threads=1,
                **PATTERNS[pattern],
            )
        return compiled[pattern], out

    return run


def check_proof(report: Report, *transforms: str) -> None:
    """Each step was compared, on all probes, and lies within a tolerance that is small."""
    steps = {check.step: check for check in report.checks}
    outputs = ["eager module = captured program", "eager module = dense on ort", "masked module = ort"]
    for step in [*outputs, *(f"masked module = {name}" for name in transforms)]:
        assert len(steps[step].inputs) >= 2, step
        assert 0 <= steps[step].max_rel_error <= steps[step].tolerance <= 1e-3, step


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_end_to_end(
    compile_once: Callable[[str], tuple[Report, Path]],
    tiny_workload: MakeWorkload,
    tiny_data: TensorDataset,
    pattern: str,
) -> None:
    report, out = compile_once(pattern)
    assert report.pattern == pattern
    assert report.sparsity.asked == pytest.approx(PATTERNS[pattern].get("sparsity", 0.5))
    assert report.sparsity.reached == pytest.approx(report.sparsity.asked, abs=0.1)
    check_proof(report, "shrink-channels" if pattern == "channel" else "fold-batch-norm")
    assert [p.name for p in out.parent.glob("*.work")] == []

    plan, masks = slrc.Plan.load(out / "plan.json"), slrc.Masks.load(out / "masks.safetensors")
    masks.check(plan)
    assert masks.sparsity(plan) >= report.sparsity.reached - 1e-6
    assert report.params.compiled < report.params.dense

    # The three things that were written compute the same: the program, its artifact, and what the report says of both.
    program = slrc.Program.load(out / "program")
    archived = torch.export.load(out / "model.pt2").module()
    folder = out / "ort" / "compiled"
    x = torch.randn(5, 4, 6, 6)
    for module in (archived, program.module()):
        torch.testing.assert_close(OnnxRuntime().load(folder)(x)[0], module(x), atol=1e-5, rtol=1e-4)
    accuracy = report.accuracy
    assert accuracy is not None
    runner = RunnerModule(OnnxRuntime().load(folder), Artifact.read(folder), program)
    assert tiny_workload().measure(runner) == (accuracy.metric, accuracy.final)
    in_batches = tiny_workload(evaluate=None, eval_batches=DataLoader(tiny_data, batch_size=20))
    assert in_batches.measure(runner) == ("accuracy", pytest.approx(accuracy.final))
    assert report.size_bytes.compiled == (folder / "model.onnx").stat().st_size


def test_a_transform_that_is_wrong_ends_a_compile(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = FoldBatchNorm.__call__

    def wrong(self: FoldBatchNorm, program: slrc.Program) -> PassResult:
        folded, modified = fold(self, program)
        name = next(n for n, t in folded.tensors.items() if t.dim() == 1)
        return PassResult(folded.with_tensors({name: folded.tensors[name] + 0.1}), modified)

    monkeypatch.setattr(FoldBatchNorm, "__call__", wrong)
    options = {"pattern": "channel", "method": "magnitude", "epochs": 0, "threads": 1}
    with pytest.raises(VerificationError, match=r"fold-batch-norm|dense on ort"):
        slrc.compile(tiny_workload(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_is_wrong_ends_a_compile(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxRuntimeRunner.__call__
    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", lambda self, *x: [y + 0.1 for y in run(self, *x)])
    options = {"pattern": "channel", "method": "magnitude", "epochs": 0, "threads": 1}
    with pytest.raises(VerificationError, match="eager module = dense on ort"):
        slrc.compile(tiny_workload(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_structure_of_each_pattern(compile_once: Callable[[str], tuple[Report, Path]]) -> None:
    report, _ = compile_once("channel")
    assert report.macs.compiled < report.macs.dense
    report, _ = compile_once("columns:2")  # layers this small may be the fastest as they are
    (target,) = report.targets
    assert target.forms is not None
    assert target.forms.layers
    assert {str(x.form) for x in target.forms.layers} <= {"dense", "split:2", "grouped:2", "packed:4", "packed:8"}
    assert all("dense" in x.ms and len(x.ms) > 1 for x in target.forms.layers)
    report, _ = compile_once("unstructured")  # of so few weights, whole blocks may be left by chance
    assert report.macs.compiled <= report.macs.dense


def test_the_report_has_the_documented_fields(compile_once: Callable[[str], tuple[Report, Path]]) -> None:
    report, out = compile_once("channel")
    data = json.loads((out / "report.json").read_text())
    pair = {"dense", "compiled"}
    assert data["schema_version"] == 1
    assert (data["model"], data["pattern"]) == ("tiny", "channel")
    assert data["sparsity"].keys() == {"asked", "reached"}
    assert data["accuracy"].keys() == {"metric", "dense", "hard_pruned", "final"}
    assert data["params"].keys() == data["macs"].keys() == data["size_bytes"].keys() == pair
    (latency,) = data["latency"]
    assert latency.keys() >= {
        *("target", "threads", "batch", "dense_ms", "compiled_ms", "speedup", "speedup_spread"),
    }
    assert latency["dense_ms"].keys() == latency["compiled_ms"].keys() == {"p50", "p90"}
    assert (latency["target"], latency["threads"], latency["batch"]) == ("ort", 1, 1)
    assert len(latency["speedup_spread"]) == 2
    assert len(data["checks"]) >= 4
    for check in data["checks"]:
        assert check.keys() == {"step", "inputs", "max_abs_error", "max_rel_error", "tolerance", "passed"}
    inputs = {c["step"]: c["inputs"] for c in data["checks"]}
    assert inputs["eager module = captured program"] == ["example", "random", "random, batch 3"]
    assert inputs["masked module = ort"] == ["example", "random", "random, batch 3", "evaluation data"]
    assert len(data["history"]) == 4
    assert data["training"].keys() >= {"steps", "step_ms", "distillation", "method", "peak_mb"}
    assert data["environment"].keys() >= {"cpu", "versions"}
    assert Report.load(out) == report


def test_what_the_output_folder_holds(compile_once: Callable[[str], tuple[Report, Path]]) -> None:
    _, out = compile_once("channel")
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found >= {
        *("report.json", "report.html", "plan.json", "masks.safetensors", "weights.safetensors"),
        *("model.pt2", "inputs.safetensors"),
        *(f"ort/{side}/{name}" for side in ("dense", "compiled") for name in ("model.onnx", "manifest.json")),
    }
    assert not [f for f in found if f.endswith(".partial")]


def test_a_compile_starts_from_what_another_trained(
    compile_once: Callable[[str], tuple[Report, Path]], tiny_workload: MakeWorkload, tmp_path: Path
) -> None:
    _, out = compile_once("channel")
    workload = tiny_workload()
    start = load_file(out / "weights.safetensors")
    workload.model.load_state_dict(start)  # the model's own names and shapes
    options = {"method": "magnitude", "epochs": 0, "threads": 1, "recalibration_batches": 0, "start_from": out}
    report = slrc.compile(tiny_workload(), tmp_path / "out", pattern="block:8x1", sparsity=0.75, **options)
    assert report.config["start_from"] == str(out)
    assert report.accuracy is not None
    assert ("accuracy", report.accuracy.dense) == tiny_workload().measure(tiny_workload().model)
    masks, found = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("masks", "weights"))
    assert masks
    assert all(torch.equal(tensor, start[n] * masks.get(n, 1)) for n, tensor in found.items())
    with pytest.raises(OutputError, match=r"has no weights\.safetensors to start from"):
        slrc.compile(tiny_workload(), tmp_path / "other", **{**options, "start_from": tmp_path})


def test_weights_that_are_pruned_further_than_is_asked_for_are_told(
    compile_once: Callable[[str], tuple[Report, Path]], tiny_workload: MakeWorkload, tmp_path: Path
) -> None:
    _, out = compile_once("channel")
    options = {"pattern": "channel", "threads": 1, "method": "gradual", "steps": 6, "start_from": out}
    said = f"in `{out}` "
    for sparsity, told in ((0.0, True), (0.5, False), (0.75, False)):
        report = slrc.compile(tiny_workload(), tmp_path / str(sparsity), sparsity=sparsity, **options)
        notes = [note for note in report.notes if note.startswith(said)]
        assert bool(notes) is told
        if told:
            assert "of the constrained weights are zero, and 0.0% are asked for: channels that are gone" in notes[0]
            start, found = (load_file(folder / "weights.safetensors") for folder in (out, tmp_path / "0.0"))
            gone = [name for name in ("conv2.weight", "conv3.weight") for row in start[name] if not row.any()]
            assert gone
            assert all(not found[n][i].any() for n in set(gone) for i, row in enumerate(start[n]) if not row.any())


def test_a_report_of_another_version(compile_once: Callable[[str], tuple[Report, Path]], tmp_path: Path) -> None:
    _, out = compile_once("channel")
    text = (out / "report.json").read_text()
    (tmp_path / "report.json").write_text(text.replace('"schema_version": 1', '"schema_version": 2', 1))
    with pytest.raises(OutputError, match="field `schema_version`: Input should be 1"):
        Report.load(tmp_path)


def test_the_stages_by_hand_with_a_loop_of_ones_own(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    workload = tiny_workload()
    model, batches = workload.model, workload.train_batches
    assert batches is not None
    program = slrc.capture(workload)
    plan = slrc.plan(program, "channel", 0.5)

    slr = slrc.SLR(dict(model.named_parameters()), plan, 4, slrc.SLRSettings(rho=0.5))
    probe = next(iter(batches))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def f() -> float:
        model.eval()
        with torch.no_grad():
            value = float(slrc.cross_entropy(model, probe))
        model.train()
        return value

    slr.start(f)
    for _ in range(4):
        for batch in batches:
            optimizer.zero_grad()
            slrc.cross_entropy(model, batch).backward()
            slr.add_penalty_gradient()
            optimizer.step()
        slr.update(f)
    assert [x.k for x in slr.history] == [1, 2, 3, 4]

    masks = slr.masks()
    masks.apply_(dict(model.named_parameters()))
    slim = slrc.structure(program.with_tensors(model.state_dict()), plan, masks)
    assert slim.num_parameters < program.num_parameters
    lowered = slrc.lower(slim, "ort", tmp_path / "out")
    x = torch.randn(3, 4, 6, 6)
    expected = outputs_of(model, (x,))
    torch.testing.assert_close(OnnxRuntime().load(lowered.folder)(x), expected, atol=1e-5, rtol=1e-4)


def test_the_stages_by_hand_with_train(tiny_workload: MakeWorkload) -> None:
    workload = tiny_workload()
    program = slrc.capture(workload)
    plan = slrc.plan(program, "columns:2", 0.5)
    trained = slrc.train(workload, plan, epochs=1)
    slim = slrc.structure(program, plan, trained)
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(outputs_of(slim.module(), (x,)), outputs_of(workload.model, (x,)), atol=1e-5, rtol=1e-4)


def test_an_edited_plan_is_followed(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    slrc.plan(slrc.capture(tiny_workload()), "block:4x1", 0.5).save(path)
    data = json.loads(path.read_text())
    first, second = data["constraints"][:2]
    first["keep"] = 3
    second["pattern"], second["groups"], second["keep"] = "unstructured", 256, 16
    path.write_text(json.dumps(data))
    report = slrc.compile(tiny_workload(), tmp_path / "out", plan=path, epochs=1)
    assert slrc.Plan.load(tmp_path / "out" / "plan.json").constraints == slrc.Plan.load(path).constraints
    assert report.pattern == "block:4x1 + unstructured"
    masks = slrc.Masks.load(tmp_path / "out" / "masks.safetensors").tensors
    assert masks[first["members"][0]["tensor"]].sum() == 3 * 4
    assert masks[second["members"][0]["tensor"]].sum() == 16
    weights = sum(m.numel() for m in masks.values())
    assert report.sparsity.reached == pytest.approx(1 - 28 / weights)


def test_a_plan_of_another_model(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    other = slrc.Workload(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)), (torch.zeros(1, 4, 6, 6),)
    )
    slrc.plan(slrc.capture(other), "unstructured").save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="the model has no tensor"):
        slrc.compile(tiny_workload(), tmp_path / "out", plan=tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_edited_since_is_noticed_on_resume(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    def fails(model: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {"x": 1.0} if calls < 5 else {}

    calls, path = 0, tmp_path / "plan.json"
    plan = slrc.plan(slrc.capture(tiny_workload()), "unstructured", 0.5)
    plan.save(path)
    with pytest.raises(WorkloadError, match="`evaluate` must return"):
        slrc.compile(tiny_workload(evaluate=fails), tmp_path / "out", plan=path, epochs=2)
    first = plan.constraints[0].model_copy(update={"keep": 1})
    plan.model_copy(update={"constraints": (first, *plan.constraints[1:])}).save(path)
    with pytest.raises(OutputError, match=r"cannot resume .*`plan` was "):
        slrc.compile(tiny_workload(), tmp_path / "out", plan=path, epochs=2, resume=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ConfigError, "less than 1"),
        ({"pattern": "blok"}, SlrcError, "unknown pattern"),
        ({"target": "nope"}, BackendError, "unknown target `nope`"),
        ({"skip": ["nope"]}, PlanError, "matches no layer"),
        ({"pattern": "2:4", "sparsity": 0.75}, SlrcError, "prunes 50%"),
        ({"epoch": 3}, ConfigError, "there is no such option"),
        ({"config": slrc.CompileConfig(), "epochs": 3}, ConfigError, "not both"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    tiny_workload: MakeWorkload, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        slrc.compile(tiny_workload(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"allocate": "layer"}])
def test_plan_checks_its_options(tiny_workload: MakeWorkload, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="option `--"):
        slrc.plan(slrc.capture(tiny_workload()), **options)


def test_a_target_that_cannot_be_built_here_is_named_before_training(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRT, "available", lambda self, target=None: Availability("no GPU", "no GPU"))
    monkeypatch.setattr(api, "load_workload", lambda spec: pytest.fail("loaded the model first"))
    with pytest.raises(BackendError, match="target `tensorrt` cannot be built here: no GPU"):
        slrc.compile("model.py", tmp_path / "out", target=("ort", "tensorrt"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("targets", "kept"), [(("ort",), 24), (("ort", "tensorrt:dla"), 32)])
def test_widths_are_rounded_to_what_every_target_likes(targets: tuple[str, ...], kept: int) -> None:
    program = slrc.capture(
        slrc.Workload(
            model=nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 3)),
            example_inputs=(torch.randn(2, 4),),
        )
    )
    plan = slrc.plan(program, "channel", 0.55, target=targets, skip=("0",))
    assert {c.groups: c.keep for c in plan} == {40: kept}


def test_what_is_for_a_device_is_compared_on_the_host(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pattern": "2:4", "method": "magnitude", "threads": 1}
    report = slrc.compile(tiny_workload(), tmp_path / "out", target=("tensorrt:8.5", "tensorrt:10.3+fp16"), **options)
    full, half = report.targets
    assert (full.precision, half.precision, report.latency) == ("float32", "float16", ())
    assert all("on the device" in target.not_run for target in report.targets)
    steps = {check.step: check.tolerance for check in report.checks}
    for target, tolerance in (("tensorrt:8.5", 1e-4), ("tensorrt:10.3+fp16", 1e-2)):
        assert steps[f"eager module = dense on {target}, as ONNX on this CPU"] == tolerance
        assert steps[f"masked module = {target}, as ONNX on this CPU"] == tolerance
    notes = [note for note in report.notes if "2:4 weights" in note]
    assert [note.partition(" node")[0] for note in notes] == ["on tensorrt:8.5"] * 2 + ["on tensorrt:10.3+fp16"]


def test_a_file_for_a_device_that_computes_something_else_is_found(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = backend._write_onnx

    def spoiled(program: Any, path: Path, options: Any) -> None:
        write(program, path, options)
        model = onnx.load(path)
        bias = next(i for i in model.graph.initializer if len(i.dims) == 1)
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(backend, "_write_onnx", spoiled)
    with pytest.raises(slrc.SlrcError, match=r"eager module = dense on tensorrt:8.6, as ONNX on this CPU"):
        slrc.compile(tiny_workload(), tmp_path / "out", target="tensorrt:8.6", method="magnitude", threads=1)


def test_a_model_changed_since_cannot_be_resumed(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = slrc.cross_entropy(model, batch)
        steps.append(model.training)
        return value / 0 if sum(steps) > 6 else value

    steps: list[bool] = []
    with pytest.raises(SlrcError, match="epoch 2"):
        slrc.compile(tiny_workload(loss=loss), tmp_path / "out", epochs=2, pattern="channel")
    other = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(OutputError, match="the model is not the one that the run started with"):
        slrc.compile(tiny_workload(model=other), tmp_path / "out", epochs=2, resume=True, pattern="channel")


def test_a_full_disk_at_the_end(tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slrc.Masks, "save", full)
    with pytest.raises(OutputError, match=r"cannot write to .*No space left"):
        slrc.compile(tiny_workload(), tmp_path / "out", epochs=1, pattern="channel")
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    monkeypatch.undo()
    slrc.compile(tiny_workload(), tmp_path / "out", epochs=1, resume=True, pattern="channel")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Outputs(nn.Module):
    """Returns a dict; `evaluate` reads a key of it and asks for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))).mean(dim=(2, 3))
        return {"logits": self.head(x), "features": x}


def test_a_model_that_returns_a_dict(tiny_workload: MakeWorkload, tiny_data: Any, tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        x, y = (t.to(next(model.parameters()).device) for t in tiny_data.tensors)
        return {"accuracy": (model(x)["logits"].argmax(1) == y).float().mean().item(), "size": 1.0}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0])["logits"], batch[1])

    workload = tiny_workload(model=Outputs(), evaluate=evaluate, loss=loss)
    report = slrc.compile(workload, tmp_path / "out", pattern="columns:2", epochs=1)
    assert report.accuracy is not None
    assert report.accuracy.metric == "accuracy"
    assert report.accuracy.hard_pruned == report.accuracy.final


class Loose(Outputs):
    """Returns what is no tensor besides, and takes its input by name."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images)["logits"], None, 3


def test_outputs_that_are_no_tensors_and_inputs_by_name(
    tiny_workload: MakeWorkload, tiny_data: Any, tmp_path: Path
) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        x, y = tiny_data.tensors
        logits, nothing, number = model(images=x)
        assert (nothing, number) == (None, 3)
        return {"accuracy": (logits.argmax(1) == y).float().mean().item()}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0])[0], batch[1])

    report = slrc.compile(
        tiny_workload(model=Loose(), evaluate=evaluate, loss=loss), tmp_path / "out", epochs=1, pattern="channel"
    )
    assert report.accuracy is not None
    assert report.accuracy.hard_pruned == report.accuracy.final


class Sorts(Outputs):
    """Holds an operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(super().forward(x)["logits"].unsqueeze(1))


def test_what_a_target_cannot_take_is_said_before_training(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("trained first")

    with pytest.raises(BackendError, match="cannot be exported to ONNX"):
        slrc.compile(
            tiny_workload(model=Sorts(), loss=loss, evaluate=None), tmp_path / "out", epochs=1, pattern="channel"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_metric_may_be_infinite_for_a_while(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    values = iter([1.0, float("inf")])
    workload = tiny_workload(evaluate=lambda model: {"perplexity": next(values, 3.0)})
    report = slrc.compile(
        workload, str(tmp_path / "out"), method="magnitude", epochs=0, retrain_epochs=1, pattern="channel"
    )
    assert report.accuracy is not None
    assert report.accuracy.hard_pruned == float("inf")
    assert Report.load(str(tmp_path / "out")) == report


def test_a_cache_that_cannot_be_written(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLRC_CACHE", str(tmp_path / "file" / "cache"))
    workload = tiny_workload(train_batches=None, evaluate=None)
    report = slrc.compile(workload, tmp_path / "out", pattern="columns:2", target="ort:stock")
    assert report.latency


def test_without_data_and_evaluate(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    report = slrc.compile(tiny_workload(train_batches=None, evaluate=None), tmp_path / "out", pattern="channel")
    assert (report.accuracy, report.method, report.history) == (None, "magnitude", ())
    assert any("no training data" in note for note in report.notes)
    assert any(note.endswith("no accuracy was measured") for note in report.notes)


def test_without_labels_the_report_says_how_much_is_like_the_dense_model(
    tiny_workload: MakeWorkload, tmp_path: Path
) -> None:
    workload = tiny_workload(train_batches=None, evaluate=None)
    workload.calibration = [torch.randn(32, *workload.example_inputs[0].shape[1:])]
    report = slrc.compile(workload, tmp_path / "out", pattern="channel", method="reconstruct")
    assert any("no accuracy was measured; on 32 samples of its data" in note for note in report.notes)


def test_data_that_cannot_be_compared_on_is_no_reason_to_lose_a_compile(
    tiny_workload: MakeWorkload, tmp_path: Path
) -> None:
    workload = tiny_workload(train_batches=None, evaluate=None)
    workload.calibration = []
    report = slrc.compile(workload, tmp_path / "out", pattern="channel", method="magnitude")
    assert any("nor how much the outputs are like" in note and "yielded nothing" in note for note in report.notes)


def test_a_badly_conditioned_network_passes_with_a_warning(tmp_path: Path) -> None:
    """At 97 % most channels are constant: their new variances are nothing, and rounding errors grow by thousands."""
    torch.manual_seed(0)

    def block(channels: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        return [depthwise, nn.BatchNorm2d(channels), nn.ReLU(), pointwise, nn.BatchNorm2d(channels), nn.ReLU()]

    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model = nn.Sequential(*stem, *block(16), *block(16), *block(16), *head)
    x = torch.randn(64, 3, 12, 12)
    batches = [(x, torch.randint(0, 4, (64,)))]
    workload = slrc.Workload(model=model, example_inputs=(x[:2],), train_batches=batches)
    report = slrc.compile(
        workload, tmp_path / "out", pattern="unstructured", sparsity=0.97, method="magnitude", epochs=0
    )
    check_proof(report, "fold-batch-norm")
    assert any(
        re.search(r"constant after pruning, of batch norms: 4 \(\d+ of 16: \d+, ", note) for note in report.notes
    )


def test_a_failure_behind_training_costs_no_training(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    slim: list[Program] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        steps.append(1)
        return slrc.cross_entropy(model, batch)

    def fails_once(program: Program, *args: Any, **options: Any) -> FormChoice:
        slim.append(program)
        if len(slim) == 1:
            raise RuntimeError("the runtime is out of order")
        return choose_forms(program, *args, **options)

    def run(resume: bool) -> Report:
        workload = tiny_workload(loss=counted)
        return slrc.compile(
            workload, tmp_path / "out", resume=resume, pattern="block:4x1", epochs=1, retrain_epochs=1, threads=1
        )

    monkeypatch.setattr(compilation, "choose_forms", fails_once)
    with pytest.raises(RuntimeError, match="out of order"):
        run(resume=False)
    assert steps
    steps.clear()
    run(resume=True)
    assert not steps
    first, second = slim
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert float((first.tensors["conv2.weight"] == 0).float().mean()) > 0.4


def test_rounding_is_not_trained_in_several_processes(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    with pytest.raises(ConfigError, match="runs in one process, got 2"):
        slrc.compile(tiny_workload(name="tiny"), tmp_path / "build", target=("ort+int8",), qat_epochs=1)
