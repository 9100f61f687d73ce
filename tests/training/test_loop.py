"""The training loop: what it measures, what it leaves alone, what stops it, and that a resumed run repeats it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import slrc
from slrc.config import CompileConfig, make_config
from slrc.errors import ConfigError, OutputError, SlrcError, TrainingError, WorkloadError
from slrc.methods.settings import MethodName
from slrc.sparsity.budget import Budget, Menu, Option
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.patterns import Block
from slrc.sparsity.plans import Plan
from slrc.sparsity.slices import Slice
from slrc.training.checkpoints import CheckpointFolder
from slrc.training.choose_method import choose_method
from slrc.training.loop import RETRAIN, train
from slrc.training.trained import Trained, save_weights

MakeWorkload = Callable[..., slrc.Workload]
STEPS = 6  # 48 images in batches of 8


PLANS: dict[tuple[str, str], Plan] = {}


def plan_for(workload: slrc.Workload, pattern: str = "channel") -> Plan:
    """The plan that half of the weights are pruned; made once for each model, since it depends on shapes alone."""
    key = type(workload.model).__name__, pattern
    if key not in PLANS:
        PLANS[key] = slrc.plan(slrc.capture(workload), pattern, 0.5)
    return PLANS[key]


def run(
    workload: slrc.Workload, pattern: str = "channel", *, checkpoints: Path | None = None, **options: Any
) -> Trained:
    resume = options.pop("resume", False)
    config = make_config({"epochs": 2, **options})
    return train(workload, plan_for(workload, pattern), config, checkpoints=checkpoints, resume=resume)


def assert_same(a: Trained, b: Trained) -> None:
    """Bit by bit, all but the seconds."""
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    assert a.masks.tensors.keys() == b.masks.tensors.keys()
    assert all(torch.equal(m, b.masks.tensors[n]) for n, m in a.masks.tensors.items())
    timeless = [[r.model_copy(update={"seconds": 0.0}) for r in t.curve] for t in (a, b)]
    assert timeless[0] == timeless[1]
    assert a.history == b.history
    assert (a.method, a.dense, a.hard_pruned) == (b.method, b.dense, b.hard_pruned)


class Watch:
    """An `evaluate` that keeps the state of every model it sees."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.training: list[bool] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.seen.append({n: t.detach().clone() for n, t in model.state_dict().items()})
        self.training.append(model.training)
        return {"count": float(len(self.seen))}


def zeros(state: dict[str, torch.Tensor], masks: slrc.Masks) -> bool:
    return all(not state[n][~m].any() for n, m in masks.tensors.items())


def test_hard_pruned_is_measured_on_a_copy(tiny_workload: MakeWorkload) -> None:
    watched, free = Watch(), tiny_workload(evaluate=None)
    measured = run(tiny_workload(evaluate=watched), method="slr")
    unmeasured = run(free, method="slr")
    assert all(torch.equal(t, unmeasured.tensors[n]) for n, t in measured.tensors.items())
    assert [(r.metric, r.hard_pruned) for r in measured.curve] == [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]
    assert not any(watched.training)
    live, pruned = watched.seen[-2:]
    assert not zeros(live, measured.masks)
    assert zeros(pruned, measured.masks)
    assert all(torch.equal(pruned[n], t) for n, t in measured.tensors.items())  # what was measured is what is left
    assert (measured.dense, measured.hard_pruned) == (1.0, 6.0)


def test_the_model_is_trained_in_place(tiny_workload: MakeWorkload) -> None:
    workload = tiny_workload()
    model = workload.model
    trained = run(workload)
    assert workload.model is model
    assert all(torch.equal(t, trained.tensors[n]) for n, t in model.state_dict().items())


class Fixed(torch.optim.SGD):
    """Leaves the weights where they are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)


@pytest.mark.parametrize("method", ["gradual", "slr", "magnitude"])
def test_training_starts_from_other_weights_and_learns_from_the_dense_ones(
    tiny_workload: MakeWorkload, tiny_net: Callable[[int], nn.Module], tmp_path: Path, method: str
) -> None:
    given, start = tiny_workload().model.state_dict(), tiny_net(1).state_dict()
    save_weights(start, tmp_path)
    watched, taught = Watch(), []

    def distill(output: Tensor, teacher_output: Tensor) -> Tensor:
        taught.append(teacher_output.detach())
        return (output - teacher_output).square().mean()

    def train_on(model: nn.Module, **options: Any) -> Trained:
        taught.clear()
        fields = {"evaluate": watched, "optimizer": Fixed, "distill": distill}
        return run(tiny_workload(model=model, **fields), "block:8x1", method=method, recalibration_batches=0, **options)

    trained = train_on(tiny_net(0), start_from=tmp_path)
    assert all(torch.equal(t, given[n]) for n, t in watched.seen[0].items())  # the dense metric
    for name, mask in trained.masks.tensors.items():
        assert torch.equal(trained.tensors[name], start[name] * mask)
    from_dense = list(taught)
    alone = train_on(tiny_net(1))
    assert all(torch.equal(m, trained.masks.tensors[n]) for n, m in alone.masks.tensors.items())
    assert len(from_dense) == len(taught)
    assert not any(torch.equal(a, b) for a, b in zip(from_dense, taught, strict=True))


def test_weights_to_start_from_must_be_there_and_fit(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"weights.safetensors` cannot be read"):
        run(tiny_workload(), start_from=tmp_path, method="gradual")
    save_weights({**tiny_workload().model.state_dict(), "head.bias": torch.zeros(4)}, tmp_path)
    with pytest.raises(OutputError, match=r"is of another model: `head.bias` differs"):
        run(tiny_workload(), start_from=tmp_path, method="gradual")
    with pytest.raises(ConfigError, match="`--start-from` needs a method that trains, and `--method reconstruct`"):
        make_config({"start_from": tmp_path, "method": "reconstruct"})


@pytest.mark.parametrize(("updates", "expected"), [(1, 2), (2, 4), (4, 8), (100, 2 * STEPS)])
def test_update_frequency(tiny_workload: MakeWorkload, updates: int, expected: int) -> None:
    trained = run(tiny_workload(), updates_per_epoch=updates)
    assert [x.k for x in trained.history] == list(range(1, expected + 1))


@pytest.mark.parametrize("method", ["slr", "admm"])
def test_methods_update_equally_often(tiny_workload: MakeWorkload, method: str) -> None:
    assert len(run(tiny_workload(), method=method).history) == 4


def test_probe_leaves_the_running_statistics_alone(tiny_workload: MakeWorkload) -> None:
    """With as many updates as steps and with one, the statistics differ only through the weights: freeze those."""

    def frozen(_: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(workload.model.parameters(), lr=0.0)

    statistics = []
    for updates in (1, STEPS):
        workload = tiny_workload(optimizer=frozen)
        tensors = run(workload, method="slr", updates_per_epoch=updates, recalibration_batches=0).tensors
        statistics.append({n: t for n, t in tensors.items() if "running" in n or "num_batches" in n})
        assert tensors["bn1.num_batches_tracked"] == 2 * STEPS
    assert all(torch.equal(t, statistics[1][n]) for n, t in statistics[0].items())


def test_probe_is_the_same_data_in_evaluation_mode(tiny_workload: MakeWorkload) -> None:
    seen: list[tuple[bool, bool, torch.Tensor]] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((model.training, torch.is_grad_enabled(), batch[0]))
        return slrc.cross_entropy(model, batch)

    run(tiny_workload(loss=loss), method="slr", probe_batches=3, recalibration_batches=0)
    probes = [x for training, grad, x in seen if not training and not grad]
    assert len(probes) == 3 * (1 + 4)
    assert all(torch.equal(x, probes[i % 3]) for i, x in enumerate(probes))
    assert sum(training and grad for training, grad, _ in seen) == 2 * STEPS == len(seen) - len(probes)


@pytest.mark.parametrize("retrain_epochs", [0, 1])
def test_bf16_trains_in_bf16_and_evaluates_in_float32(tiny_workload: MakeWorkload, retrain_epochs: int) -> None:
    trained_in, evaluated_in = set(), set()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inner: list[torch.dtype] = []
        hook = model.conv3.register_forward_hook(lambda *a: inner.append(a[-1].dtype))
        value = slrc.cross_entropy(model, batch)
        hook.remove()
        trained_in.add(inner[0])
        return value

    def evaluate(model: nn.Module) -> dict[str, float]:
        hook = model.conv3.register_forward_hook(lambda *a: evaluated_in.add(a[-1].dtype))
        model(torch.randn(2, 4, 6, 6))
        hook.remove()
        return {"x": 1.0}

    workload = tiny_workload(loss=loss, evaluate=evaluate)
    trained = run(workload, precision="bf16", retrain_epochs=retrain_epochs, recalibration_batches=0)
    assert trained_in == {torch.bfloat16}
    assert evaluated_in == {torch.float32}
    assert {t.dtype for n, t in trained.tensors.items() if "num_batches" not in n} == {torch.float32}
    evaluate(workload.model)  # and the user's model comes back as it was
    assert evaluated_in == {torch.float32}


def doubled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any) -> torch.Tensor:
        return 2 * forward(*args)

    return wrapper


class Decorated(nn.Sequential):
    @doubled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("of_the_instance", [False, True])
def test_bf16_leaves_a_decorated_forward_alone(tiny_workload: MakeWorkload, of_the_instance: bool) -> None:
    layers = (nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 4), nn.Flatten(), nn.Linear(8, 3))
    model = nn.Sequential(*layers) if of_the_instance else Decorated(*layers)
    if of_the_instance:
        model.forward = doubled(model.forward)
    x = torch.randn(2, 4, 6, 6)
    before, seen = model(x).detach(), []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model(x))
        return {"x": 1.0}

    frozen = tiny_workload(model=model, evaluate=evaluate, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    nothing = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
    train(frozen, nothing, make_config({"epochs": 1, "retrain_epochs": 1, "precision": "bf16"}))
    assert len(seen) == 5
    assert all(torch.equal(y, before) for y in [*seen, model(x)])


def test_a_failed_run_leaves_no_precision_behind(tiny_workload: MakeWorkload) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return slrc.cross_entropy(model, batch) * (float("nan") if model.training else 1.0)

    workload = tiny_workload(loss=loss)
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(TrainingError):
        run(workload, precision="bf16")
    model = workload.model.eval()
    assert torch.equal(model(x), type(model).forward(model, x))


class Tied(nn.Module):
    """Two layers with one weight, which the plan may name either way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(4, 8, 3), nn.Linear(8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.b(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_tied_weights_go_by_either_name(tiny_workload: MakeWorkload, name: str) -> None:
    constraint = Constraint(name=name, pattern=Block(4, 1), groups=144, keep=40, members=(Slice(tensor=name),))
    plan = Plan(sparsity_asked=0.7, sparsity=0.7, constraints=(constraint,))
    trained = train(tiny_workload(model=Tied()), plan, make_config({"epochs": 1, "retrain_epochs": 1}))
    assert torch.equal(trained.tensors["a.weight"], trained.tensors["b.weight"])
    assert torch.equal(trained.tensors["a.weight"] != 0, trained.masks.tensors[name])


def test_a_second_run_may_choose_another_precision(tiny_workload: MakeWorkload) -> None:
    run(tiny_workload(), epochs=1, precision="fp32")
    run(tiny_workload(), epochs=1, precision="bf16")
    again, once = (run(tiny_workload(), epochs=1, precision="fp32") for _ in range(2))
    assert_same(again, once)


def test_a_model_may_be_trained_twice(tiny_workload: MakeWorkload) -> None:
    trained_in: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        hook = model.conv3.register_forward_hook(lambda *a: trained_in.append(a[-1].dtype))
        value = slrc.cross_entropy(model, batch)
        hook.remove()
        return value

    workload = tiny_workload(loss=loss)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        trained_in.clear()
        run(workload, epochs=1, precision=precision, recalibration_batches=0)
        assert set(trained_in) == {expected}


@pytest.mark.parametrize("pattern", ["channel", "block:4x1", "columns:2", "unstructured", "2:4"])
def test_retraining_keeps_pruned_weights_at_zero(tiny_workload: MakeWorkload, pattern: str) -> None:
    watch = Watch()

    def heavy(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.95, weight_decay=0.1)

    workload = tiny_workload(evaluate=watch, optimizer=heavy)
    plan = plan_for(workload, pattern)
    trained = train(workload, plan, make_config({"epochs": 1, "retrain_epochs": 2}))
    trained.masks.check(plan)
    assert len(watch.seen) == 2 * 2 + 2
    before, first, second = watch.seen[-3:]
    for state in (first, second, trained.tensors):
        assert zeros(state, trained.masks)
    kept = next(iter(trained.masks.tensors))
    assert not torch.equal(before[kept], first[kept])
    assert not torch.equal(first[kept], second[kept])
    assert trained.hard_pruned == 4.0  # before any retraining


def test_the_loss_is_not_finite(tiny_workload: MakeWorkload) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += model.training
        return slrc.cross_entropy(model, batch) * (float("nan") if calls == STEPS + 3 else 1.0)

    with pytest.raises(TrainingError, match=r"the loss is nan in gradual, epoch 2, step 3") as caught:
        run(tiny_workload(loss=loss))
    assert "learning rate" in (caught.value.hint or "")


def test_the_loss_is_not_finite_in_retraining(tiny_workload: MakeWorkload) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += model.training
        return slrc.cross_entropy(model, batch) / (0.0 if calls == STEPS + 1 else 1.0)

    with pytest.raises(TrainingError, match=r"the loss is inf in retrain, epoch 1, step 1"):
        run(tiny_workload(loss=loss), epochs=1, retrain_epochs=1)


def test_the_probe_loss_is_not_finite(tiny_workload: MakeWorkload) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return slrc.cross_entropy(model, batch) * (1.0 if model.training else float("inf"))

    with pytest.raises(TrainingError, match="the loss is inf on the probe batches"):
        run(tiny_workload(loss=loss))


class Batches:
    """An iterable without a length."""

    def __init__(self, data: TensorDataset, first_epochs: int = 10**6) -> None:
        self.data, self.left = data, first_epochs

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        if self.left >= 0:
            yield from DataLoader(self.data, batch_size=8)


class Stream(IterableDataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def test_batches_without_a_length(tiny_workload: MakeWorkload, tiny_data: TensorDataset) -> None:
    whole = list(DataLoader(tiny_data, batch_size=8))
    from_list = run(tiny_workload(train_batches=whole))
    assert_same(run(tiny_workload(train_batches=Batches(tiny_data))), from_list)
    assert_same(run(tiny_workload(train_batches=DataLoader(Stream(tiny_data), batch_size=8))), from_list)


def test_training_data_in_other_shapes(tiny_workload: MakeWorkload, tiny_data: TensorDataset) -> None:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    as_dicts = [{"x": x, "y": y} for x, y in DataLoader(tiny_data, batch_size=8)]
    pairs = list(DataLoader(tiny_data, batch_size=8))
    own = tiny_workload(train_batches=as_dicts, loss=loss, distill=slrc.soft_divergence)
    assert_same(run(own), run(tiny_workload(train_batches=pairs)))


def test_one_shot_iterators_are_refused(tiny_workload: MakeWorkload, tiny_data: TensorDataset) -> None:
    with pytest.raises(WorkloadError, match="can be read only once"):
        tiny_workload(train_batches=iter(DataLoader(tiny_data)))
    with pytest.raises(WorkloadError, match="can be read only once"):
        tiny_workload(train_batches=(b for b in DataLoader(tiny_data)))


@pytest.mark.parametrize("empty", [[], DataLoader(TensorDataset(torch.zeros(0, 4, 6, 6), torch.zeros(0)))])
def test_empty_batches(tiny_workload: MakeWorkload, empty: Any) -> None:
    with pytest.raises(WorkloadError, match="`train_batches` yielded nothing"):
        run(tiny_workload(train_batches=empty))


def test_batches_that_run_dry_later(tiny_workload: MakeWorkload, tiny_data: TensorDataset) -> None:
    batches = Batches(tiny_data, first_epochs=3)  # the probe, the count and one epoch
    with pytest.raises(WorkloadError, match="yielded nothing in epoch 2"):
        run(tiny_workload(train_batches=batches), recalibration_batches=0)


def test_a_hard_pruned_copy_has_statistics_of_its_own(tiny_workload: MakeWorkload) -> None:
    """What is measured and what is left behind have the statistics of the pruned weights, on the same data."""
    for options in ({"method": "slr"}, {"method": "slr", "precision": "bf16"}, {"epochs": 0, "method": "magnitude"}):
        seen: list[dict[str, torch.Tensor]] = []
        workload = tiny_workload(evaluate=lambda m, seen=seen: seen.append(m.state_dict()) or {"x": 1.0})
        trained = run(workload, **options)
        hard = seen[-1]
        assert all(torch.equal(t, trained.tensors[n]) for n, t in hard.items())
        assert trained.tensors["bn1.num_batches_tracked"] == STEPS
        assert not torch.equal(hard["bn1.running_mean"], seen[-2]["bn1.running_mean"])


def test_a_live_model_under_masks_has_statistics_of_its_own_too(tiny_workload: MakeWorkload) -> None:
    """Masks come in force with the last step of an epoch: what it did to batch norm is no news about accuracy."""
    seen: list[dict[str, torch.Tensor]] = []
    run(tiny_workload(evaluate=lambda m: seen.append(m.state_dict()) or {"x": 1.0}), method="gradual")
    live, pruned = seen[-2:]
    assert live["bn1.num_batches_tracked"] == STEPS
    assert all(torch.equal(t, pruned[n]) for n, t in live.items())


class Broken(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        raise ValueError("image 7 is truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_raises_names_the_users_line(tiny_workload: MakeWorkload, workers: int) -> None:
    loader = DataLoader(Broken(torch.zeros(8, 4, 6, 6)), batch_size=4, num_workers=workers)
    with pytest.raises(WorkloadError, match="reading `train_batches` failed at") as caught:
        run(tiny_workload(train_batches=loader))
    assert 'raise ValueError("image 7 is truncated")' in caught.value.message
    assert caught.value.message.endswith("ValueError: image 7 is truncated")
    assert Path(__file__).name in caught.value.message


def vector_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def number_loss(model: nn.Module, batch: Any) -> float:
    return 0.5


def detached_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return slrc.cross_entropy(model, batch).detach()


def raising_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["image"])


class WithoutClosure(torch.optim.SGD):
    def step(self) -> None:  # type: ignore[override]
        super().step()


def without_closure(parameters: Any) -> torch.optim.Optimizer:
    return WithoutClosure(parameters, lr=0.01)


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.conv2(torch.relu(self.conv(x))).mean(dim=(2, 3)))}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": vector_loss}, r"must return a scalar tensor, got a tensor of shape \(8,\)"),
        ({"loss": number_loss}, "must return a scalar tensor, got float"),
        ({"loss": detached_loss}, "returned a tensor without a gradient"),
        ({"loss": raising_loss}, r"`loss\(model, batch\)` failed at .*test_loop\.py:\d+: `return model\("),
        ({"model": ReturnsDict(), "evaluate": None}, "a model that returns logits, got a dict with keys 'logits'"),
        ({"train_batches": [torch.zeros(8, 4, 6, 6)]}, r"needs batches `\(x, y\)`, got a Tensor"),
        ({"optimizer": lambda p: 1 / 0}, "`Workload.optimizer` failed at .*ZeroDivisionError"),
        ({"optimizer": torch.optim.LBFGS}, "`Workload.optimizer` made a LBFGS, whose steps need a closure"),
        ({"optimizer": without_closure}, r"`step` of `Workload.optimizer` failed.*takes 1 positional argument"),
        ({"optimizer": lambda p: None}, "`Workload.optimizer` must return a Optimizer, got NoneType"),
        ({"scheduler": lambda o, n: None}, "`Workload.scheduler` must return a LRScheduler, got NoneType"),
        (
            {"scheduler": lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
            "schedule of its own, got ReduceLROnPlateau",
        ),
        ({"evaluate": lambda m: 0.9}, "`evaluate` must return .*got a float"),
        ({"evaluate": lambda m: {}}, "`evaluate` must return"),
        ({"evaluate": lambda m: {"accuracy": None}}, "`evaluate` must return numbers, got a NoneType"),
        ({"evaluate": lambda m: {"accuracy": torch.zeros(2)}}, "`evaluate` must return numbers, got a Tensor"),
        ({"evaluate": lambda m: {"loss": float("nan")}}, "`evaluate` returned nan for the model as it was given"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 16), nn.Linear(16, 1))},
            r"cross-entropy of two .* returns one: \(8, 1\)",
        ),
        ({"evaluate": lambda m: m.nope()}, "`evaluate` failed at .*AttributeError"),
    ],
)
def test_what_a_user_can_get_wrong(tiny_workload: MakeWorkload, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        run(tiny_workload(**fields))


class KeepsItsLoss(ReturnsDict):
    """Keeps tensors with a gradient on itself and in a container, as models with auxiliary losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)["logits"]
        self.extra = logits.square().mean()
        self.kept["all"] = [self.extra]
        return logits


def test_a_model_may_keep_tensors_with_a_gradient(tiny_workload: MakeWorkload) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return slrc.cross_entropy(model, batch) + 0.01 * model.extra

    trained = run(tiny_workload(model=KeepsItsLoss(), loss=loss))
    assert len(trained.curve) == 3


class WithExtraState(ReturnsDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)["logits"]

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_state_that_is_no_tensor(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    workload = tiny_workload(model=WithExtraState())
    with pytest.raises(WorkloadError, match="holds `_extra_state`, which is no tensor"):
        run(workload, checkpoints=tmp_path)
    assert "_extra_state" not in run(workload).tensors


def test_a_model_whose_parameters_are_frozen(tiny_workload: MakeWorkload) -> None:
    workload = tiny_workload()
    workload.model.requires_grad_(False)
    with pytest.raises(WorkloadError, match="no parameters to train"):
        run(workload)


@pytest.mark.parametrize("options", [{"method": "slr"}, {"method": "admm"}, {"retrain_epochs": 1}])
def test_no_data_for_what_needs_data(tiny_workload: MakeWorkload, options: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError, match="needs training data, and the workload has none"):
        run(tiny_workload(train_batches=None), **options)


def test_no_data_and_no_wish_prunes_in_one_shot(tiny_workload: MakeWorkload) -> None:
    workload = tiny_workload(train_batches=None)
    before = {n: t.clone() for n, t in workload.model.state_dict().items()}
    trained = run(workload)
    assert trained.method == "magnitude"
    assert trained.history == ()
    assert [r.epoch for r in trained.curve] == [0]
    masked = {**before, **trained.masks.apply(before)}
    assert all(torch.equal(t, masked[n]) for n, t in trained.tensors.items())


@pytest.mark.parametrize(
    ("with_data", "options", "expected"),
    [
        (True, {}, MethodName.GRADUAL),
        (True, {"epochs": 0}, MethodName.MAGNITUDE),
        (True, {"method": "admm"}, MethodName.ADMM),
        (True, {"method": "magnitude"}, MethodName.MAGNITUDE),
        (False, {}, MethodName.MAGNITUDE),
        (False, {"method": "slr", "epochs": 0}, MethodName.SLR),
    ],
)
def test_choose_method(
    tiny_workload: MakeWorkload, with_data: bool, options: dict[str, Any], expected: MethodName
) -> None:
    workload = tiny_workload() if with_data else tiny_workload(train_batches=None)
    assert choose_method(make_config(options), workload, plan_for(workload)) is expected


@pytest.mark.parametrize(
    ("fields", "options", "refused"),
    [
        ({}, {"sparsity": 0.5}, False),
        ({}, {"sparsity": 0.5, "epochs": 0}, False),
        ({}, {"speedup": 2}, True),
        ({}, {"speedup": 2, "method": "gradual"}, False),
        ({}, {"latency_budget": 0.5, "epochs": 0}, False),
        ({"train_batches": None}, {"speedup": 2}, False),
        ({"train_batches": None, "calibration": []}, {"sparsity": 0.5}, True),
    ],
)
def test_a_default_method_that_refits_cannot_start_from_other_weights(
    tiny_workload: MakeWorkload, tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], refused: bool
) -> None:
    config, workload = make_config({"start_from": tmp_path, **options}), tiny_workload(**fields)
    for plan in (None, plan_for(workload)) if "sparsity" in options else (None,):
        if not refused:
            assert choose_method(config, workload, plan) is not MethodName.RECONSTRUCT
            continue
        with pytest.raises(ConfigError, match="`reconstruct`, which is the default here"):
            choose_method(config, workload, plan)


def test_magnitude_trains_without_a_penalty(tiny_workload: MakeWorkload) -> None:
    trained = run(tiny_workload(), method="magnitude", retrain_epochs=1)
    assert trained.history == ()
    assert [r.phase for r in trained.curve] == ["magnitude"] * 3 + [RETRAIN]


def test_seeds(tiny_workload: MakeWorkload) -> None:
    first, again, other = (run(tiny_workload(), seed=seed) for seed in (0, 0, 1))
    assert_same(first, again)
    assert not torch.equal(first.tensors["conv2.weight"], other.tensors["conv2.weight"])


def test_a_loader_with_a_generator_of_its_own_repeats(tiny_workload: MakeWorkload, tiny_data: TensorDataset) -> None:
    def loader() -> DataLoader:
        generator = torch.Generator().manual_seed(5)
        return DataLoader(tiny_data, batch_size=8, shuffle=True, generator=generator)

    shared = loader()
    first = run(tiny_workload(train_batches=shared))
    again = run(tiny_workload(train_batches=shared))  # its generator has moved on since
    assert_same(first, again)


class StopHereError(Exception):
    pass


class Interrupted:
    """The default loss, which fails at one training step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.steps += model.training
        if self.steps == self.at:
            raise StopHereError
        return slrc.cross_entropy(model, batch)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


class WithDropout(nn.Module):
    """Draws random numbers in every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv2(torch.relu(self.conv1(x)))))
        return self.head(nn.functional.dropout(x.mean(dim=(2, 3)), 0.3, self.training))


def resumable(tiny_workload: MakeWorkload, **fields: Any) -> slrc.Workload:
    torch.manual_seed(0)
    return tiny_workload(model=WithDropout(), optimizer=adam, distill=slrc.soft_divergence, **fields)


OPTIONS: dict[str, Any] = {"epochs": 3, "retrain_epochs": 2, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("slr", {}),
        ("slr-tightening", {"average": 0.9}),
        ("gradual", {"average": 0.9, "one_cycle": False}),
        ("admm", {}),
        ("magnitude", {"clip": 0.0}),
    ],
)
def test_resume_from_every_checkpoint(
    tiny_workload: MakeWorkload, tmp_path: Path, method: str, recipe: dict[str, Any]
) -> None:
    """Stop in the middle of each epoch of both phases; before the first checkpoint a resumed run starts anew."""
    options = {**OPTIONS, "method": method, "recipe": recipe}
    uninterrupted = run(resumable(tiny_workload), **options)
    for epoch in range(5):
        check_resume(tiny_workload, tmp_path / str(epoch), options, epoch, uninterrupted)


@pytest.mark.parametrize("method", ["gradual", "slr", "slr-tightening", "admm", "ac-dc", "group-lasso"])
def test_a_budget_is_shared_out_anew_and_a_resumed_run_goes_on_with_it(
    tiny_workload: MakeWorkload, tmp_path: Path, method: str
) -> None:
    """Two layers, of which the first is about to lose what it has: the budget goes over to the other."""

    def start(**fields: Any) -> slrc.Workload:
        return resumable(tiny_workload, **fields)

    def go(workload: slrc.Workload, **others: Any) -> Trained:
        plan = with_budget(dict(workload.model.named_parameters()))
        options = {"epochs": 3, "retrain_epochs": 1, "method": method}
        resume = others.pop("resume", False)
        return train(workload, plan, make_config(options), resume=resume, **others)

    whole = go(start())
    assert whole.plan.budget is not None
    took = [option.ms for option in whole.plan.options().values()]
    assert sum(took) <= whole.plan.budget.ms
    whole.masks.check(whole.plan, whole.tensors)
    assert whole.plan.sparsity == whole.masks.sparsity(whole.plan)
    for at in (STEPS + 4, 3 * STEPS + 2):  # in the second epoch, and in retraining
        folder = tmp_path / str(at)
        with pytest.raises(WorkloadError, match="StopHere"):
            go(start(loss=Interrupted(at=at)), checkpoints=folder)
        resumed = go(start(), checkpoints=folder, resume=True)
        assert_same(resumed, whole)
        assert resumed.plan == whole.plan


def test_a_checkpoint_of_another_budget_is_refused(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    """Its options would be taken for others, which need not keep to the budget."""

    def go(loss: Any = None, slower: float = 1.0) -> Trained:
        workload = resumable(tiny_workload, **({} if loss is None else {"loss": loss}))
        plan = with_budget(dict(workload.model.named_parameters()))
        assert plan.budget is not None
        menus = [
            menu.model_copy(update={"options": tuple(o.model_copy(update={"ms": o.ms * slower}) for o in menu.options)})
            for menu in plan.budget.menus
        ]
        budget = plan.budget.model_copy(update={"menus": tuple(menus), "ms": plan.budget.ms * slower})
        plan = plan.model_copy(update={"budget": budget})
        return train(workload, plan, make_config({"epochs": 3}), checkpoints=tmp_path, resume=True)

    with pytest.raises(WorkloadError, match="StopHere"):
        go(Interrupted(at=STEPS + 4))
    with pytest.raises(TrainingError, match=r"does not fit.*an option that the plan's budget does not offer"):
        go(slower=2.0)


def with_budget(parameters: dict[str, nn.Parameter]) -> Plan:
    """A plan on both convolutions of `WithDropout` that begins dense: half of all blocks fit in its budget."""
    names, pattern = ("conv1", "conv2"), Block(4, 1)
    groups = {n: pattern.group_view(parameters[f"{n}.weight"]).shape[1] for n in names}
    menus = tuple(
        Menu(
            name=n,
            options=tuple(
                Option(pattern=pattern, groups=g, keep=max(1, g * k // 8), ms=max(1, g * k // 8))
                for k in range(8, 0, -1)
            ),
        )
        for n, g in groups.items()
    )
    constraints = tuple(
        Constraint(name=n, pattern=pattern, groups=g, keep=g, members=(Slice(tensor=f"{n}.weight"),))
        for n, g in groups.items()
    )
    budget = Budget(ms=sum(groups.values()) / 2, menus=menus)
    return Plan(sparsity_asked=0.5, sparsity=0.5, constraints=constraints, budget=budget)


def check_resume(
    tiny_workload: MakeWorkload, checkpoints: Path, options: dict[str, Any], epoch: int, uninterrupted: Trained
) -> None:
    stopped = resumable(tiny_workload, loss=Interrupted(at=epoch * STEPS + 4))
    with pytest.raises(WorkloadError, match="StopHere"):
        run(stopped, checkpoints=checkpoints, **options)
    assert len(list(checkpoints.iterdir()) if epoch else []) == min(epoch, 1)
    resumed = run(resumable(tiny_workload), checkpoints=checkpoints, resume=True, **options)
    assert_same(resumed, uninterrupted)


class Noisy(TensorDataset):
    """Images that are changed at random when they are read, as an augmentation does."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape) + float(np.random.rand()) + 0.1 * random.random(), y


@pytest.mark.parametrize(
    ("method", "recipe", "workers", "stops"),
    [
        ("slr", {}, 0, (0, 1, 4)),
        ("gradual", {"average": 0.9}, 1, (2, 3)),
        ("ac-dc", {}, 0, (1,)),
        ("group-lasso", {}, 0, (2,)),
        ("admm", {}, 0, (1,)),
    ],
)
def test_resume_within_an_epoch(
    tiny_workload: MakeWorkload,
    tiny_data: TensorDataset,
    tmp_path: Path,
    method: str,
    recipe: dict[str, Any],
    workers: int,
    stops: tuple[int, ...],
) -> None:
    """After two of six steps, from a checkpoint of that step: with dropout, noise in the data and a shuffled order."""
    loader = DataLoader(Noisy(*tiny_data.tensors), batch_size=8, shuffle=True, num_workers=workers)
    options = {**OPTIONS, "method": method, "recipe": recipe}
    uninterrupted = run(resumable(tiny_workload, train_batches=loader), **options)
    options["checkpoint_minutes"] = 0
    for epoch in stops:
        folder, calls = tmp_path / str(epoch), Interrupted(at=epoch * STEPS + 3)
        with pytest.raises(WorkloadError, match="StopHere"):
            run(resumable(tiny_workload, train_batches=loader, loss=calls), checkpoints=folder, **options)
        newest = CheckpointFolder(folder).newest()
        assert newest is not None
        assert CheckpointFolder(folder).read(newest).part.steps == 2
        calls = Interrupted(at=-1)
        resumed = run(
            resumable(tiny_workload, train_batches=loader, loss=calls), checkpoints=folder, resume=True, **options
        )
        assert_same(resumed, uninterrupted)
        assert calls.steps == (5 - epoch) * STEPS - 2  # none is trained on twice


def test_epochs_that_are_short_have_one_checkpoint(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    run(tiny_workload(), checkpoints=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]


def test_resume_after_the_last_checkpoint(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    done = run(resumable(tiny_workload), checkpoints=tmp_path, **OPTIONS)
    again = run(resumable(tiny_workload), checkpoints=tmp_path, resume=True, **OPTIONS)
    assert_same(done, again)


def test_resume_twice(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    uninterrupted = run(resumable(tiny_workload), **OPTIONS)
    with pytest.raises(WorkloadError, match="StopHere"):
        run(resumable(tiny_workload, loss=Interrupted(at=STEPS + 1)), checkpoints=tmp_path, **OPTIONS)
    with pytest.raises(WorkloadError, match="StopHere"):  # counts from the resumed step
        run(resumable(tiny_workload, loss=Interrupted(at=3 * STEPS)), checkpoints=tmp_path, resume=True, **OPTIONS)
    assert_same(run(resumable(tiny_workload), checkpoints=tmp_path, resume=True, **OPTIONS), uninterrupted)


def test_without_resume_old_checkpoints_are_not_read(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    run(resumable(tiny_workload), checkpoints=tmp_path, **OPTIONS)
    again = run(resumable(tiny_workload), checkpoints=tmp_path, **{**OPTIONS, "seed": 3})
    assert_same(again, run(resumable(tiny_workload), **{**OPTIONS, "seed": 3}))


@pytest.mark.parametrize("name", ["progress.json", "method.safetensors", "accelerate/model.safetensors"])
def test_a_damaged_checkpoint(tiny_workload: MakeWorkload, tmp_path: Path, name: str) -> None:
    run(resumable(tiny_workload), checkpoints=tmp_path, **{**OPTIONS, "retrain_epochs": 0})
    newest = CheckpointFolder(tmp_path).newest()
    assert newest is not None
    (newest / name).write_bytes(b"not what it was")
    with pytest.raises(TrainingError, match="checkpoint `"):
        run(resumable(tiny_workload), checkpoints=tmp_path, resume=True, **{**OPTIONS, "retrain_epochs": 0})


def test_a_checkpoint_of_another_model(tiny_workload: MakeWorkload, tmp_path: Path) -> None:
    run(resumable(tiny_workload), checkpoints=tmp_path, epochs=1)
    with pytest.raises(TrainingError, match=r"checkpoint `.*does not fit this model"):
        run(tiny_workload(), checkpoints=tmp_path, resume=True, epochs=1)


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("failing", "error"), [("save_file", SafetensorError(f"I/O error: {FULL}")), ("_flush", OSError(28, FULL))]
)
def test_a_full_disk(
    tiny_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"slrc.training.checkpoints.{failing}", full)
    with pytest.raises(OutputError, match=r"cannot write to .*No space left on device"):
        run(tiny_workload(), checkpoints=tmp_path / "c")
    assert CheckpointFolder(tmp_path / "c").newest() is None


def test_train_of_the_api_takes_the_options_of_a_compile(tiny_workload: MakeWorkload) -> None:
    workload = tiny_workload()
    plan = plan_for(workload)
    assert_same(slrc.train(workload, plan, epochs=1, seed=2), run(tiny_workload(), epochs=1, seed=2))
    with pytest.raises(SlrcError, match="there is no such option"):
        slrc.train(workload, plan, epoch=1)


def test_config_defaults_are_those_documented() -> None:
    config = CompileConfig()
    assert (config.epochs, config.steps, config.retrain_epochs) == (None, None, 0)
    assert (config.updates_per_epoch, config.probe_batches) == (2, 4)


def test_gradients_that_were_there_before_do_not_count(tiny_workload: MakeWorkload) -> None:
    """Dense training leaves those of its last step; a resumed run begins with other ones."""

    def trained(leave_gradients: bool) -> dict[str, Tensor]:
        workload = tiny_workload()
        if leave_gradients:
            for parameter in workload.model.parameters():
                parameter.grad = torch.ones_like(parameter)
        plan = slrc.plan(slrc.capture(workload), "unstructured", 0.5)
        return train(workload, plan, make_config({"epochs": 1})).tensors

    left, clean = trained(True), trained(False)
    assert all(torch.equal(left[name], clean[name]) for name in clean)
