"""The method as a whole: plans are obeyed, the dense outputs are kept, means are absorbed, nothing is random."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import slrc
from slrc.config import make_config
from slrc.errors import WorkloadError
from slrc.reconstruction import observe
from slrc.reconstruction.reconstruct import reconstruct
from slrc.reconstruction.statistics import Statistics
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import LatencyForecast, Plan
from slrc.training.trained import Trained

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import digits

MakeNet = Callable[[], nn.Module]
PATTERNS = ["block:8x1", "block:4x2", "columns:2", "2:4", "unstructured", "channel"]


def run(workload: slrc.Workload, plan: Plan | None = None, pattern: str = "block:8x1", **settings: Any) -> Trained:
    program = slrc.capture(workload)
    plan = plan or slrc.plan(program, pattern, None if pattern == "2:4" else 0.5)
    config = make_config({"method": "reconstruct", "reconstruct": settings})
    return reconstruct(program, workload, plan, config)


def distance(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """The mean squared error of outputs, beside their variance."""
    with torch.no_grad():
        a, b = model(x), dense(x)
    return float((a - b).square().mean() / (b - b.mean(dim=0)).square().mean())


def calibration_of(workload: slrc.Workload) -> Tensor:
    assert workload.calibration is not None
    return torch.cat(list(workload.calibration))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_plan_is_obeyed_and_the_outputs_are_nearer_than_by_magnitude(
    residual_workload: slrc.Workload, residual_net: MakeNet, pattern: str
) -> None:
    x, model = calibration_of(residual_workload), residual_workload.model
    program = slrc.capture(residual_workload)
    fixed = pattern == "2:4"
    plan = slrc.plan(program, pattern, None if fixed else 0.5, keep_ends=pattern != "2:4", skip=("stem",))
    trained = run(residual_workload, plan)
    assert not trained.notes
    parameters = dict(model.named_parameters())
    trained.masks.check(plan, parameters)
    assert trained.masks.sparsity(plan) >= plan.sparsity - 1e-3  # members may be columns of other groups too
    for name, mask in trained.masks.tensors.items():
        assert not trained.tensors[name][~mask].any()
        assert torch.equal(trained.tensors[name], model.state_dict()[name])
    masked = residual_net()
    trained.masks.apply_(dict(masked.named_parameters()))
    by_magnitude = residual_net()
    Masks.project(plan, program.tensors).apply_(dict(by_magnitude.named_parameters()))
    dense, found = residual_net(), distance(model, residual_net(), x)
    assert found < 0.5 * min(distance(masked, dense, x), distance(by_magnitude, dense, x))
    assert found < 0.4


def test_with_nothing_to_prune_the_network_stays(residual_workload: slrc.Workload, residual_net: MakeNet) -> None:
    plan = slrc.plan(slrc.capture(residual_workload), "block:8x1", 0.0)
    run(residual_workload, plan)
    assert distance(residual_workload.model, residual_net(), calibration_of(residual_workload)) < 1e-6


def two_layers(**first: Any) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if first.pop("norm", False) else nn.Identity()
    return nn.Sequential(nn.Conv2d(8, 8, 1, **first), norm).eval()


@pytest.mark.parametrize(("first", "absorbed"), [({}, "0.bias"), ({"bias": False, "norm": True}, "1.running_mean")])
def test_a_bias_or_a_running_mean_absorbs_the_means(first: dict[str, Any], absorbed: str) -> None:
    x = torch.randn(40, 8, 3, 3) + torch.linspace(-3, 3, 8).reshape(-1, 1, 1)
    model, dense = two_layers(**first), two_layers(**first)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    before = dict(dense.state_dict())
    trained = run(workload, slrc.plan(slrc.capture(workload), "block:8x1", 0.5, keep_ends=False))
    assert not torch.equal(trained.tensors[absorbed], before[absorbed])
    with torch.no_grad():
        left = (model(x) - dense(x)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(left, torch.zeros(8), atol=1e-5, rtol=0)
    unchanged = set(before) - {absorbed, "0.weight"}
    assert all(torch.equal(trained.tensors[n], before[n]) for n in unchanged)


def test_without_either_the_fit_is_about_zero() -> None:
    x = torch.randn(200, 8, 1, 1) + 1
    model, dense = two_layers(bias=False), two_layers(bias=False)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    trained = run(workload, slrc.plan(slrc.capture(workload), "block:8x1", 0.5, keep_ends=False), damping=1e-6)
    kept = trained.masks.tensors["0.weight"].flatten(1)[0]
    features = x.flatten(1)
    expected = torch.linalg.lstsq(features[:, kept], dense(x).detach().flatten(1)).solution.T
    torch.testing.assert_close(trained.tensors["0.weight"].flatten(1)[:, kept], expected, atol=1e-3, rtol=1e-3)


def test_a_bias_that_two_layers_read_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    x, model = torch.randn(200, 8), Tied()
    before = model.a.bias.detach().clone()
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    run(workload, slrc.plan(slrc.capture(workload), "block:8x1", 0.5, keep_ends=False))
    assert torch.equal(model.a.bias, before)
    assert distance(model, Tied(), x) < 0.5


def test_a_shared_weight_is_pruned_once_and_used_twice(residual_workload: slrc.Workload, residual_net: MakeNet) -> None:
    trained = run(residual_workload)
    mask = trained.masks.tensors["shared.weight"]
    assert not residual_workload.model.shared.weight[~mask].any()  # type: ignore[union-attr,index]


def test_a_drift_before_an_unpruned_layer_is_corrected(residual_workload: slrc.Workload, residual_net: MakeNet) -> None:
    plan = slrc.plan(slrc.capture(residual_workload), "block:8x1", 0.5)
    assert "head" not in {c.name for c in plan}
    run(residual_workload, plan)
    model, x = residual_workload.model, calibration_of(residual_workload)
    after = distance(model, residual_net(), x)
    model.head.load_state_dict(residual_net().head.state_dict())  # type: ignore[union-attr,arg-type]
    assert after < distance(model, residual_net(), x)


def decoder() -> nn.Module:
    torch.manual_seed(0)
    wide, smooth = nn.ConvTranspose2d(8, 16, 2, 2), nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.running_mean)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), wide, nn.ReLU(), smooth, norm, nn.Conv2d(8, 3, 1)).eval()


@pytest.mark.parametrize("pattern", ["block:8x1", "unstructured", "channel"])
def test_transposed_convolutions_are_refitted(pattern: str) -> None:
    x = torch.randn(64, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    workload = slrc.Workload(model=decoder(), example_inputs=(x[:1],), calibration=[x])
    program = slrc.capture(workload)
    plan = slrc.plan(program, pattern, 0.5, round_to=1)
    assert {"2", "4"} <= {c.name for c in plan if c.keep < c.groups}
    trained = run(workload, plan)
    assert not trained.notes
    trained.masks.check(plan, dict(workload.model.named_parameters()))
    masked, by_magnitude = decoder(), decoder()
    trained.masks.apply_(dict(masked.named_parameters()))
    Masks.project(plan, program.tensors).apply_(dict(by_magnitude.named_parameters()))
    others = min(distance(masked, decoder(), x), distance(by_magnitude, decoder(), x))
    assert distance(workload.model, decoder(), x) < 0.7 * others


class Called(nn.Module):
    """A transposed convolution by ATen's operator for all kinds of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.weight = nn.Conv2d(4, 8, 3), nn.Parameter(torch.randn(8, 16, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.convolution(x, self.weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)


def test_a_transposed_convolution_by_the_general_operator_is_refitted() -> None:
    x = torch.randn(64, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    workload = slrc.Workload(model=Called(), example_inputs=(x[:1],), calibration=[x])
    program = slrc.capture(workload)
    plan = slrc.plan(program, "block:8x1", 0.5, skip=("stem",), keep_ends=False)
    assert [(c.name, c.members[0].dim) for c in plan] == [("weight", 1)]
    run(workload, plan)
    masked = Called()
    Masks.project(plan, program.tensors).apply_(dict(masked.named_parameters()))
    assert distance(workload.model, Called(), x) < 0.9 * distance(masked, Called(), x)


def test_a_layer_that_cannot_be_unfolded_is_pruned_by_magnitude_and_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=2))
    x = torch.randn(20, 8, 5, 5)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    plan = slrc.plan(slrc.capture(workload), "unstructured", 0.5, keep_ends=False)
    before = model[2].weight.detach().clone()
    trained = run(workload, plan)
    (c,) = [c for c in plan if c.name == "2"]
    assert trained.notes == ("`2` was pruned by magnitude and not refitted: it is a transposed convolution in groups",)
    kept = c.project({"2.weight": before})
    mask = torch.ones(before.shape, dtype=torch.bool)
    c.scatter(kept, {"2.weight": mask}, followers=False)
    assert torch.equal(trained.tensors["2.weight"], before * mask)
    trained.masks.check(plan)


class Constants(nn.Module):
    """A layer whose weight is no state, between two that are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("fixed", torch.randn(8, 8), persistent=False)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.b(nn.functional.linear(torch.relu(self.a(x)), self.fixed) * scale)


def test_a_weight_that_is_no_state_and_arguments_that_are_no_tensors() -> None:
    x, model = torch.randn(100, 8), Constants()
    workload = slrc.Workload(model=model, example_inputs=(x[:1], 2.0), calibration=[(x, 2.0)])
    trained = run(workload, slrc.plan(slrc.capture(workload), "block:8x1", 0.5, keep_ends=False, skip=("fixed*",)))
    assert trained.tensors.keys() == model.state_dict().keys()
    assert distance(model, Constants(), x) < 0.8


def test_half_precision_is_refitted_in_float32() -> None:
    x = 100 * torch.randn(100, 8, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).bfloat16()
    dense = copy.deepcopy(model)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    trained = run(workload, slrc.plan(slrc.capture(workload), "block:8x1", 0.25, keep_ends=False))
    assert trained.tensors["2.weight"].dtype == torch.bfloat16
    assert distance(model, dense, x) < 0.5


def test_an_order_of_outputs_is_obeyed(residual_workload: slrc.Workload) -> None:
    program = slrc.capture(residual_workload)
    plan = slrc.plan(program, "block:4x1", 0.5)
    order = tuple(torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist())
    constraints = [c.model_copy(update={"order": order}) if c.name == "conv1" else c for c in plan]
    plan = plan.model_copy(update={"constraints": tuple(constraints)})
    run(residual_workload, plan).masks.check(plan)


def test_the_same_seed_gives_the_same_bits(residual_net: MakeNet, residual_workload: slrc.Workload) -> None:
    x = calibration_of(residual_workload)
    found = []
    for _ in range(2):
        workload = slrc.Workload(model=residual_net(), example_inputs=(x[:1],), calibration=x.split(40))
        found.append(run(workload, positions=9))
        torch.rand(3)  # what else was drawn does not matter
    assert all(torch.equal(t, found[1].tensors[n]) for n, t in found[0].tensors.items())


def test_one_layers_moments_are_alive_at_a_time(
    residual_workload: slrc.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = []

    class Watched(Statistics):
        def moments(self) -> Any:
            found = super().moments()
            alive.append(weakref.ref(found.hessian))
            gc.collect()
            most.append(sum(ref() is not None for ref in alive))
            return found

    monkeypatch.setattr(observe, "Statistics", Watched)
    run(residual_workload)
    assert len(most) > 3
    assert max(most) == 1


def test_values_that_overflow_are_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.fill_(1e38)
    x = torch.full((20, 8), 1e3) + torch.rand(20, 8)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    plan = slrc.plan(slrc.capture(workload), "block:8x1", 0.5, keep_ends=False)
    with pytest.raises(WorkloadError, match=r"`0.weight` are not finite on the calibration data"):
        run(workload, plan)


def test_training_that_is_asked_for_needs_labels(residual_workload: slrc.Workload) -> None:
    plan = slrc.plan(slrc.capture(residual_workload), "block:8x1", 0.5)
    for option in ({"epochs": 2}, {"steps": 10}, {"retrain_epochs": 1}):
        with pytest.raises(WorkloadError, match="needs training data, and the workload has none"):
            slrc.train(residual_workload, plan, method="reconstruct", **option)


def test_it_is_the_method_where_there_are_inputs_without_labels(residual_workload: slrc.Workload) -> None:
    plan = slrc.plan(slrc.capture(residual_workload), "block:8x1", 0.5)
    assert slrc.train(residual_workload, plan).method == "reconstruct"


def test_it_may_be_followed_by_training_under_its_masks(
    residual_workload: slrc.Workload, residual_net: MakeNet, tmp_path: Path
) -> None:
    """The dense network teaches, masks stay, and an interrupted run goes on to the same bits."""
    x = calibration_of(residual_workload)
    with torch.no_grad():
        labels = residual_workload.model.eval()(x).flatten(1).argmax(1)
    calls: list[float] = []

    def start(at: int | None = None) -> slrc.Workload:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            calls.append(1)
            if len(calls) == at:
                raise InterruptedError
            return nn.functional.cross_entropy(model(batch[0]).flatten(1), batch[1])

        calls.clear()
        model = residual_net()
        batches = list(zip(x.split(32), labels.split(32), strict=True))
        return slrc.Workload(
            model=model, example_inputs=(x[:1],), train_batches=batches, loss=loss, calibration=x.split(40)
        )

    def go(workload: slrc.Workload, epochs: int | None = 2, **others: Any) -> Trained:
        program = slrc.capture(workload)
        config = make_config({"method": "reconstruct", "epochs": epochs, "recalibration_batches": 2})
        return reconstruct(program, workload, slrc.plan(program, "block:8x1", 0.5), config, **others)

    refitted, whole = go(start(), None), go(start())
    assert [r.phase for r in whole.curve] == ["reconstruct", "reconstruct", "retrain", "retrain"]
    assert all(torch.equal(m, refitted.masks.tensors[n]) for n, m in whole.masks.tensors.items())
    assert any(not torch.equal(t, refitted.tensors[n]) for n, t in whole.tensors.items())
    for name, mask in whole.masks.tensors.items():
        assert not whole.tensors[name][~mask].any()
    with pytest.raises(WorkloadError, match="InterruptedError"):
        go(start(at=8), checkpoints=tmp_path)
    resumed = go(start(), checkpoints=tmp_path, resume=True)
    assert len(calls) < 8
    assert all(torch.equal(t, resumed.tensors[n]) for n, t in whole.tensors.items())


@pytest.mark.parametrize(
    ("options", "method", "trained"),
    [
        ({}, "gradual", 2),
        ({"speedup": True}, "reconstruct", 2),
        ({"speedup": True, "method": "reconstruct"}, "reconstruct", 0),
        ({"speedup": True, "method": "reconstruct", "retrain_epochs": 1}, "reconstruct", 1),
        ({"speedup": True, "method": "gradual"}, "gradual", 2),
        ({"speedup": True, "epochs": 0}, "magnitude", 0),
    ],
)
def test_a_latency_that_is_asked_for_is_trained_to_from_a_refitted_network(
    residual_net: MakeNet, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: str, trained: int
) -> None:
    """Epochs where nobody says how many are the usual ones; a method that is asked for by name does only that."""
    monkeypatch.setattr("slrc.training.batches.USUAL_EPOCHS", 2)
    monkeypatch.setattr("slrc.training.batches.USUAL_STEPS", 2)
    x, y = torch.randn(16, 4, 8, 8), torch.arange(16) % 3
    workload = slrc.Workload(model=residual_net(), example_inputs=(x[:1],), train_batches=[(x, y)], loss=_loss)
    plan = slrc.plan(slrc.capture(workload), "block:8x1", 0.5)
    if options.pop("speedup", None):
        forecast = LatencyForecast(target="ort", threads=1, budget=0.5, predicted=0.5, segments_ms=1.0)
        plan = plan.model_copy(update={"latency": forecast})
    found = slrc.train(workload, plan, **options)
    assert found.method == method
    assert sum(r.loss is not None for r in found.curve) == trained


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(1), batch[1])


@pytest.fixture(scope="module")
def small_digits() -> tuple[nn.Module, dict[str, Any]]:
    """A narrow network for scikit-learn's digits, and the other fields of its workload, without labels."""
    train, test = digits.data()
    torch.manual_seed(0)
    model = digits.DigitsNet(width=16)
    digits.train_dense(model, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))

    def evaluate(model: nn.Module) -> dict[str, float]:
        x, y = test.tensors
        return {"accuracy": float((model(x).argmax(1) == y).float().mean())}

    fields = {"example_inputs": (test.tensors[0][:1],), "evaluate": evaluate}
    return model, {**fields, "calibration": train.tensors[0][:256].split(64)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_digits_keep_their_accuracy(small_digits: tuple[nn.Module, dict[str, Any]], pattern: str) -> None:
    model, fields = small_digits
    trained = run(slrc.Workload(model=copy.deepcopy(model), **fields), pattern=pattern)
    assert trained.dense is not None
    assert trained.hard_pruned is not None
    assert trained.dense > 0.95
    assert trained.hard_pruned > trained.dense - 0.02


@pytest.mark.usefixtures("quick_timing")
def test_a_whole_compile(small_digits: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    model, fields = small_digits
    workload = slrc.Workload(model=copy.deepcopy(model), **fields)
    report = slrc.compile(workload, tmp_path / "out", pattern="channel", method="reconstruct", threads=1)
    assert report.method == "reconstruct"
    assert report.accuracy is not None
    assert report.accuracy.hard_pruned == report.accuracy.final
    assert report.accuracy.final > report.accuracy.dense - 0.02
    assert [(record.epoch, record.metric) for record in report.curve] == [
        (0, report.accuracy.dense),
        (1, report.accuracy.final),
    ]
    assert not [note for note in report.notes if "training data" in note or "magnitude" in note]


def test_train_takes_it_too(residual_workload: slrc.Workload) -> None:
    plan = slrc.plan(slrc.capture(residual_workload), "block:8x1", 0.5)
    trained = slrc.train(residual_workload, plan, method="reconstruct")
    trained.masks.check(plan)
    assert trained.method == "reconstruct"
