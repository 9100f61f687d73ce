"""The recipe's parts, each against what it should be by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slrc
from slrc.config import make_config
from slrc.errors import ConfigError, WorkloadError
from slrc.options import RecipeSettings
from slrc.training.distillation import Teacher, common_outputs, output_error, returns_logits, soft_divergence
from slrc.training.loop import train
from slrc.training.recipe import AveragedWeights, peak_learning_rate, schedule, share_of_peak
from slrc.training.trained import Trained

MakeWorkload = Callable[..., slrc.Workload]
STEPS = 6
"""Of an epoch of the tiny workload."""


def run(workload: slrc.Workload, **options: Any) -> Trained:
    plan = slrc.plan(slrc.capture(workload), "channel", 0.5)
    return train(workload, plan, make_config({"epochs": 2, **options}))


class Rates:
    """A schedule that keeps the learning rates of the steps."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        seen = self.seen

        class Kept(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                seen.append(self.param_groups[0]["lr"])
                return super().step(closure)

        return Kept(parameters, lr=0.2)


def test_the_learning_rate_rises_to_the_optimisers_own_and_falls_to_nothing(tiny_workload: MakeWorkload) -> None:
    rates = Rates()
    run(tiny_workload(optimizer=rates), epochs=10)
    assert len(rates.seen) == 10 * STEPS
    assert max(rates.seen) == pytest.approx(0.2)
    assert rates.seen.index(max(rates.seen)) == round(0.3 * 10 * STEPS)
    assert rates.seen[0] == pytest.approx(0.02)
    assert rates.seen[-1] < 0.001
    rises, falls = rates.seen[:18], rates.seen[18:]
    assert rises == sorted(rises)
    assert falls == sorted(falls, reverse=True)


def test_without_the_rise_it_is_a_cosine() -> None:
    settings = RecipeSettings(one_cycle=False)
    for time in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert share_of_peak(time, settings) == pytest.approx((1 + math.cos(math.pi * time)) / 2)


def test_a_schedule_of_the_workloads_wins(tiny_workload: MakeWorkload) -> None:
    rates = Rates()
    constant = torch.optim.lr_scheduler.LambdaLR
    run(tiny_workload(optimizer=rates, scheduler=lambda o, steps: constant(o, lambda step: 1.0)))
    assert set(rates.seen) == {0.2}


@pytest.mark.parametrize(("rho", "expected"), [(0.0, 0.05), (0.5, 0.05), (2.0, 0.025), (10.0, 0.005)])
def test_the_peak_follows_from_the_penalty(rho: float, expected: float) -> None:
    assert peak_learning_rate(RecipeSettings(), lambda time: rho) == pytest.approx(expected)


def test_the_peak_minds_a_penalty_that_grows() -> None:
    settings = RecipeSettings(peak_lr=1.0)
    peak = peak_learning_rate(settings, lambda time: 100**time)
    strongest = max(100**t * peak * share_of_peak(t, settings) / 0.1 for t in torch.linspace(0, 1, 1001).tolist())
    assert strongest == pytest.approx(0.5, rel=1e-2)


def test_gradients_are_clipped_before_the_penalty_and_only_with_the_recipes_own_optimiser() -> None:
    x = torch.randn(8, 3)
    norms: list[float] = []

    def train_with(clip: float, optimizer: Any = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        workload = slrc.Workload(
            model=model,
            example_inputs=(x,),
            train_batches=[x],
            loss=lambda m, batch: 1e4 * m(batch).square().sum(),
            optimizer=optimizer,
        )
        plan = slrc.plan(slrc.capture(workload), "unstructured", 0.5, keep_ends=False)
        before = model.weight.detach().clone()
        recipe = {"clip": clip, "one_cycle": False}
        options = {"steps": 1, "method": "slr", "distill": False, "slr": {"rho": 1e-6}, "recipe": recipe}
        train(workload, plan, make_config(options))
        norms.append(float((model.weight.detach() - before).norm()))
        return before

    train_with(0.0)
    train_with(2.0)
    train_with(2.0, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True))
    assert norms[0] > 100
    assert norms[1] < 1
    assert norms[2] > 100


def test_averaged_weights_are_the_exponential_average_of_the_last_tenth() -> None:
    weight = nn.Parameter(torch.zeros(2))
    average = AveragedWeights({"w": weight}, 0.75, steps=20)
    expected = None
    for step in range(1, 21):
        with torch.no_grad():
            weight.fill_(float(step))
        average.after_step(step)
        if step >= 18:
            expected = float(step) if expected is None else 0.75 * expected + 0.25 * step
    average.store()
    torch.testing.assert_close(weight.detach(), torch.full((2,), expected))


def test_averaged_weights_are_pruned_like_others(tiny_workload: MakeWorkload) -> None:
    plain, averaged = (run(tiny_workload(), recipe={"average": decay}) for decay in (0.0, 0.9))
    assert any(not torch.equal(t, averaged.tensors[n]) for n, t in plain.tensors.items())
    assert all(not averaged.tensors[n][~m].any() for n, m in averaged.masks.tensors.items())


def test_the_soft_divergence_is_that_of_hinton() -> None:
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    p, q = torch.softmax(theirs / 3, 1), torch.softmax(ours / 3, 1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(soft_divergence(ours, theirs, 3.0), expected)
    pixels = soft_divergence(
        ours.reshape(5, 7, 1, 1).expand(5, 7, 4, 2), theirs.reshape(5, 7, 1, 1).expand(5, 7, 4, 2), 3.0
    )
    torch.testing.assert_close(pixels, expected)


def test_other_outputs_are_compared_by_their_squared_error() -> None:
    ours = {"boxes": torch.ones(2, 3), "count": torch.tensor([1, 2]), "scores": [torch.zeros(4)]}
    theirs = {"boxes": torch.zeros(2, 3), "count": torch.tensor([5, 6]), "scores": [torch.full((4,), 2.0)]}
    assert float(output_error(ours, theirs)) == pytest.approx((1.0 + 4.0) / 2)


def test_the_teacher_is_the_dense_network_in_evaluation_mode(tiny_workload: MakeWorkload) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def distill(output: torch.Tensor, teacher_output: torch.Tensor) -> torch.Tensor:
        assert output.requires_grad
        assert not teacher_output.requires_grad
        seen.append((output.detach().clone(), teacher_output))
        return nn.functional.mse_loss(output, teacher_output)

    workload = tiny_workload(distill=distill)
    x = workload.example_inputs[0]
    workload.train_batches = [(x, torch.zeros(len(x), dtype=torch.int64))]
    with torch.no_grad():
        dense = workload.model.eval()(x)
    run(workload, epochs=3)
    assert len(seen) == 3
    for _, answer in seen:
        torch.testing.assert_close(answer, dense)
    assert not torch.equal(seen[0][0], seen[2][0])


def test_the_loss_is_a_blend(tiny_workload: MakeWorkload) -> None:
    """With a weight of 1 the workload's loss has no say; without distillation the teacher has none."""

    def trained(weight: float | None, scale: float, distance: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        workload = tiny_workload(
            loss=lambda m, batch: scale * slrc.cross_entropy(m, batch),
            distill=lambda ours, theirs: distance * nn.functional.mse_loss(ours, theirs),
        )
        recipe = {} if weight is None else {"distill_weight": weight}
        return run(workload, distill=weight is not None, recipe=recipe, method="magnitude").tensors

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(t, b[n]) for n, t in a.items())

    assert same(trained(1.0, 1.0, 1.0), trained(1.0, 2.0, 1.0))
    assert same(trained(None, 1.0, 1.0), trained(None, 1.0, 2.0))
    assert not same(trained(0.5, 1.0, 1.0), trained(0.5, 1.0, 2.0))


class OtherInTraining(nn.Module):
    """Returns its features too while it trains: after the logits, or before them."""

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        self.logits = logits

    def forward(self, x: torch.Tensor) -> Any:
        features = torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean(dim=(2, 3))
        if not self.training:
            return self.head(features)
        return (features, self.head(features)) if self.logits else (self.head(features), features)


def loss_of_either(model: Any, batch: Any) -> torch.Tensor:
    output = model(batch[0])
    return nn.functional.cross_entropy(output[model.logits] if isinstance(output, tuple) else output, batch[1])


def test_outputs_that_do_not_compare_are_told_and_left_out(tiny_workload: MakeWorkload) -> None:
    trained = run(tiny_workload(model=OtherInTraining(1), loss=loss_of_either))
    assert "something else in training than in evaluation mode" in trained.undistilled
    assert run(tiny_workload()).undistilled == ""

    def distill(ours: Any, theirs: Any) -> torch.Tensor:
        return slrc.soft_divergence(ours[1], theirs)

    assert run(tiny_workload(model=OtherInTraining(1), loss=loss_of_either, distill=distill)).undistilled == ""
    with pytest.raises(WorkloadError, match="something else in training than in evaluation mode"):
        run(tiny_workload(model=OtherInTraining(1), loss=loss_of_either, distill=slrc.soft_divergence))


@pytest.mark.parametrize("distill", [None, slrc.soft_divergence])
def test_auxiliary_outputs_of_training_are_left_out_of_the_comparison(
    tiny_workload: MakeWorkload, distill: Any
) -> None:
    assert run(tiny_workload(model=OtherInTraining(0), loss=loss_of_either, distill=distill)).undistilled == ""


A, B, C = torch.zeros(2, 3), torch.ones(2, 3), torch.full((4,), 2.0)


@pytest.mark.parametrize(
    ("output", "answer", "common"),
    [
        ({"out": A, "aux": C}, {"out": B}, [(A, B)]),
        ({"out": A}, {"aux": C, "out": B}, [(A, B)]),
        ([A, [C, A], C], (B, [C]), [(A, B), (C, C)]),
        ({"out": A, "aux": C}, B, [(A, B)]),
        (A, [{"out": B}, C], [(A, B)]),
        (
            {"out": A, "count": torch.tensor(1), "note": None},
            {"out": B, "count": torch.tensor(2), "note": None},
            [(A, B)],
        ),
    ],
)
def test_what_outputs_have_in_common(output: Any, answer: Any, common: list[tuple[Any, Any]]) -> None:
    found = common_outputs(output, answer)
    assert len(found) == len(common)
    assert all(a is c and b is d for (a, b), (c, d) in zip(found, common, strict=True))


@pytest.mark.parametrize(("output", "answer"), [({"loss": A}, {"boxes": B}), ((C, A), B), ({"out": A}, (B,)), ((), A)])
def test_outputs_with_nothing_in_common(output: Any, answer: Any) -> None:
    with pytest.raises(WorkloadError, match="something else in training") as raised:
        common_outputs(output, answer)
    assert "Workload(distill=...)" in str(raised.value.hint)


def test_the_soft_divergence_of_several_outputs_is_their_mean() -> None:
    a, b, c, d = torch.randn(4, 2, 5, 3, 3)
    expected = (soft_divergence(a, b) + soft_divergence(c, d)) / 2
    torch.testing.assert_close(soft_divergence({"out": a, "aux": c}, {"out": b, "aux": d}), expected)
    torch.testing.assert_close(soft_divergence({"out": a, "aux": c}, {"out": b}), soft_divergence(a, b))


def test_pixels_without_a_label_count_in_the_distance_alone(tiny_workload: MakeWorkload) -> None:
    """The default loss takes `(n, classes, h, w)`, leaves out pixels labelled −100, and distils over dimension 1."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(2, 4, 6, 6)
    labels = torch.randint(3, (2, 6, 6))
    labels[:, :3] = -100
    workload = tiny_workload(model=model, train_batches=[(x, labels)], evaluate=None)
    expected = nn.functional.cross_entropy(model(x)[:, :, 3:], labels[:, 3:])
    torch.testing.assert_close(workload.loss(model, (x, labels)), expected)
    judge = Teacher(nn.Sequential(nn.Conv2d(4, 3, 1)), workload, RecipeSettings(distill_weight=1.0, temperature=1.0))
    with judge.watch(model) as calls:
        loss = workload.loss(model, (x, labels))
    distance = judge.blend(loss, calls)
    p, q = judge.model(x).softmax(1), model(x).softmax(1)
    torch.testing.assert_close(distance, (p * (p / q).log()).sum(1).mean())
    assert run(workload).undistilled == ""


def test_which_workloads_return_logits(tiny_workload: MakeWorkload) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).square().mean()

    assert returns_logits(tiny_workload())
    assert returns_logits(tiny_workload(loss=loss, distill=slrc.soft_divergence))
    assert not returns_logits(tiny_workload(loss=loss))
    assert not returns_logits(tiny_workload(distill=nn.functional.mse_loss))


def test_a_loss_that_does_not_call_the_model_is_told(tiny_workload: MakeWorkload) -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model.head(model.conv1(batch[0]).mean(dim=(2, 3))), batch[1])

    torch.manual_seed(0)
    workload = tiny_workload(loss=loss, model=OtherInTraining(0))
    assert "does not call the model itself" in run(workload).undistilled


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        (lambda a, b: a - b, "must return a scalar tensor"),
        (lambda a, b: a.nope, r"`distill\(output, teacher_output\)` failed at .*test_recipe.py:\d+"),
    ],
)
def test_a_distance_that_fails(tiny_workload: MakeWorkload, distill: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        run(tiny_workload(distill=distill))


def test_a_teacher_takes_calls_with_keywords_and_several_a_step() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 3), nn.Linear(3, 3)
    workload = slrc.Workload(model=student, example_inputs=(torch.zeros(1, 3),))
    x, y = torch.randn(4, 3), torch.randn(2, 3)
    judge = Teacher(teacher, workload, RecipeSettings(distill_weight=0.25))
    with judge.watch(student) as calls:
        student(x)
        student(input=y)
    student(x)  # not watched any more
    blended = judge.blend(torch.tensor(4.0), calls)
    distances = [soft_divergence(student(z), teacher(z), 2.0) for z in (x, y)]
    torch.testing.assert_close(blended, 3.0 + 0.25 * (distances[0] + distances[1]) / 2)


def test_a_budget_in_steps(tiny_workload: MakeWorkload) -> None:
    rates = Rates()
    trained = run(tiny_workload(optimizer=rates), epochs=None, steps=STEPS + 2, method="gradual")
    assert len(rates.seen) == STEPS + 2
    assert [r.epoch for r in trained.curve] == [0, 1, 2]
    assert trained.cost is not None
    assert trained.cost.steps == STEPS + 2
    assert len(trained.history) == 2  # after steps 3 and 6; the last epoch ends before its first
    trained.masks.check(slrc.plan(slrc.capture(tiny_workload()), "channel", 0.5))


def test_without_a_budget_short_epochs_are_many(tiny_workload: MakeWorkload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrc.training.batches.USUAL_STEPS", 70)
    assert run(tiny_workload(), epochs=None).curve[-1].epoch == 12
    monkeypatch.setattr("slrc.training.batches.USUAL_STEPS", 20)
    assert run(tiny_workload(), epochs=None).curve[-1].epoch == 10


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="`--epochs` and `--steps` exclude each other"):
        make_config({"epochs": 2, "steps": 10})


def test_what_a_step_takes_is_told(tiny_workload: MakeWorkload) -> None:
    cost = run(tiny_workload(), method="slr").cost
    assert cost is not None
    assert cost.steps == 2 * STEPS
    assert cost.step_ms > 0
    assert 0 < cost.distillation < 5
    assert 0 < cost.method < 20
    assert cost.peak_mb is not None
    assert 0 < cost.teacher_mb < cost.peak_mb
    assert cost.method_mb > 0
    without = run(tiny_workload(), method="magnitude", distill=False).cost
    assert without is not None
    assert (without.distillation, without.teacher_mb, without.method_mb) == (0.0, 0.0, 0.0)


def test_a_schedule_of_one_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    one = schedule(optimizer, 1, RecipeSettings())
    optimizer.step()
    one.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
