"""The comparison that every step has to pass, and artifacts run as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.backends import Artifact
from slrc.backends.runner_module import RunnerModule
from slrc.errors import VerificationError
from slrc.ir.program import capture
from slrc.probes import Probe
from slrc.verify import METRIC_TOLERANCE, TOLERANCE_FP32, Checker, compare, compare_metric, compare_rounded, outputs_of

NAN, INF = float("nan"), float("inf")


def test_equal_outputs_pass() -> None:
    check = compare("step", [torch.ones(3), torch.zeros(2)], [torch.ones(3), torch.zeros(2)], 1e-4)
    assert check.passed
    assert (check.step, check.max_abs_error, check.max_rel_error, check.tolerance) == ("step", 0.0, 0.0, 1e-4)


def test_errors_are_relative_to_the_largest_value_of_each_output() -> None:
    reference = [torch.tensor([100.0, 0.0]), torch.tensor([0.1, 0.0])]
    outputs = [torch.tensor([100.0, 0.5]), torch.tensor([0.1, 0.004])]
    check = compare("step", reference, outputs, 0.05)
    assert check.max_abs_error == pytest.approx(0.5)
    assert check.max_rel_error == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("reference", "output"),
    [
        ([1.0, 2.0], [1.0, 2.1]),
        ([0.0, 0.0], [0.0, 0.1]),
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, INF]),
        ([1.0, INF], [1.0, -INF]),
    ],
)
def test_different_outputs_fail(reference: list[float], output: list[float]) -> None:
    with pytest.raises(VerificationError, match=r"check `fold` failed: the outputs differ by .*tolerance 1e-04"):
        compare("fold", [torch.tensor(reference)], [torch.tensor(output)], 1e-4)


@pytest.mark.parametrize("values", [[INF, 1.0], [-INF, 1.0], [NAN, 1.0], []])
def test_the_same_unusual_values_pass(values: list[float]) -> None:
    x = torch.tensor(values)
    assert compare("step", [x], [x.clone()], 0.0).max_abs_error == 0.0


@pytest.mark.parametrize("outputs", [[], [torch.ones(2)], [torch.ones(3), torch.ones(3)], [torch.ones(1, 3)]])
def test_outputs_of_other_shapes_fail(outputs: list[Tensor]) -> None:
    with pytest.raises(VerificationError, match=r"expected outputs of shapes \[\(3,\)\], got"):
        compare("step", [torch.ones(3)], outputs, 1e-4)


def test_integer_outputs_are_compared() -> None:
    with pytest.raises(VerificationError):
        compare("step", [torch.tensor([1, 2])], [torch.tensor([1, 3])], 1e-4)


def test_a_metric_may_move_a_little() -> None:
    assert compare_metric("accuracy", 0.9, 0.9 * (1 + METRIC_TOLERANCE / 2)).passed
    assert compare_metric("accuracy", 0.0, 0.0).passed
    assert compare_metric("bias", 1e-9, 2e-9).passed


def test_a_metric_near_zero_may_move_as_one_of_a_tenth() -> None:
    check = compare_metric("mAP", 0.0012, 0.0013)
    assert check.passed
    assert check.max_abs_error == pytest.approx(1e-4)
    assert check.max_rel_error == pytest.approx(1e-3)
    assert compare_metric("mAP", 0.0, 0.0001).passed


@pytest.mark.parametrize(
    ("reference", "value"),
    [(0.9, 0.89), (0.9, 0.91), (0.0, 0.1), (0.0012, 0.0018), (0.0, 0.0003), (0.9, NAN), (-5.0, -5.1)],
)
def test_a_metric_that_moves_fails(reference: float, value: float) -> None:
    with pytest.raises(VerificationError, match="check `accuracy` failed: the metric was"):
        compare_metric("accuracy", reference, value)


@pytest.mark.parametrize(("reference", "value", "samples"), [(0.9, 0.88, 100), (0.5, 0.7, 10), (0.0, 0.2, 10)])
def test_two_of_few_samples_may_change_sides(reference: float, value: float, samples: int) -> None:
    check = compare_metric("accuracy", reference, value, samples)
    assert check.passed
    assert check.tolerance == pytest.approx(check.max_rel_error)
    with pytest.raises(VerificationError, match="check `accuracy` failed"):
        compare_metric("accuracy", reference, value)


@pytest.mark.parametrize(
    ("value", "samples", "says"),
    [
        (0.87, 100, "now 0.8700: by 3 of 100 samples, and 2 may differ"),
        (0.8979, 10_000, "now 0.8979: by 21 of 10,000 samples, and 18 may differ"),
    ],
)
def test_more_samples_that_change_sides_are_counted(value: float, samples: int, says: str) -> None:
    with pytest.raises(VerificationError, match=says):
        compare_metric("accuracy", 0.9, value, samples)


def test_of_many_samples_the_share_decides() -> None:
    check = compare_metric("accuracy", 0.9, 0.8985, 10_000)
    assert check.passed
    assert check.tolerance == METRIC_TOLERANCE


def test_outputs_of_runs_in_evaluation_mode_without_a_gradient() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.scale = nn.Dropout(0.9), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"b": [self.drop(x) * self.scale], "a": x + 1, "note": "text"}

    x = torch.ones(4)
    first, second = outputs_of(Nested(), (x,))
    assert torch.equal(first, x)
    assert torch.equal(second, x + 1)
    assert not first.requires_grad


class Cancels(nn.Module):
    """Loses most of its digits in float32: what is added is taken off again."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.tensor(large))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.large) - self.large


EXAMPLE = [Probe("example", (torch.rand(64, generator=torch.Generator().manual_seed(0)),))]


@pytest.mark.parametrize(("large", "error", "passes"), [(1e5, 5e-3, True), (1e5, 1.0, False), (0.0, 5e-3, False)])
def test_a_step_may_lose_what_the_model_loses_in_float32(large: float, error: float, passes: bool) -> None:
    check = Checker(Cancels(large), EXAMPLE)
    assert (check.largest_loss > 1e-3) == bool(large)
    if passes:
        found = check("step", lambda x: x + error)
        assert found.max_rel_error == pytest.approx(error, rel=0.1)
        assert found.inputs == ("example",)
        assert check.checks == [found]
    else:
        with pytest.raises(VerificationError, match="check `step` failed"):
            check("step", lambda x: x + error)


def test_a_step_that_is_wrong_on_one_input_alone_fails() -> None:
    probes = [*EXAMPLE, Probe("random", (torch.full((64,), -1.0),))]
    check = Checker(nn.ReLU(), probes)
    assert check("step", nn.ReLU()).inputs == ("example", "random")
    with pytest.raises(VerificationError):
        check("no activation", nn.Identity())


def test_inputs_that_the_model_cannot_take_are_left_out() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.numel() > 64:
                raise ValueError("too many")
            return x.log()

    below_zero, too_many = torch.full((64,), -1.0), torch.ones(65)
    check = Checker(Logarithm(), [*EXAMPLE, Probe("random", (below_zero,)), Probe("other", (too_many,))])
    assert check("step", torch.log).inputs == ("example",)


def test_a_model_that_does_not_run_in_float64_is_its_own_reference() -> None:
    class InFloat32(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(64, dtype=torch.float32)

    assert Checker(InFloat32(), EXAMPLE)("step", lambda x: x.sum()).tolerance == TOLERANCE_FP32


class Doubles:
    """A runner that notes the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        self.batches.append(len(inputs[0]))
        return [inputs[0] * 2, inputs[-1] + 1]

    def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
        return lambda: self(*inputs)


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"double": x * 2, "next": (y + 1,), "note": "text", "none": None}


def as_module(dynamic: bool, max_batch: int | None) -> tuple[RunnerModule, Doubles]:
    runner = Doubles()
    artifact = Artifact(
        target="ort", model_file="m", dynamic_batch=dynamic, max_batch=max_batch, inputs=("x", "y"), outputs=("a", "b")
    )
    example = 1 if max_batch is None else max_batch
    return RunnerModule(runner, artifact, capture(Pair(), (torch.zeros(example, 3), torch.zeros(example, 2)))), runner


@pytest.mark.parametrize(
    ("dynamic", "max_batch", "batch", "expected"),
    [
        (True, None, 7, [7]),
        (True, 4, 7, [4, 3]),
        (True, 8, 7, [7]),
        (False, 1, 3, [1, 1, 1]),
        (False, 4, 7, [4, 4]),
        (False, 4, 3, [4]),
        (False, 4, 8, [4, 4]),
    ],
)
def test_batches_are_run_in_pieces(dynamic: bool, max_batch: int | None, batch: int, expected: list[int]) -> None:
    module, runner = as_module(dynamic, max_batch)
    x, y = torch.randn(batch, 3), torch.randn(batch, 2)
    result = module(x, y)
    assert runner.batches == expected
    assert torch.equal(result["double"], x * 2)
    assert torch.equal(result["next"][0], y + 1)
    assert (result["note"], result["none"]) == ("text", None)


@pytest.mark.parametrize("call", [lambda m, x, y: m(x, y=y), lambda m, x, y: m(y=y, x=x)])
def test_arguments_may_be_given_by_name(call: Callable[..., Any]) -> None:
    module, _ = as_module(True, None)
    x, y = torch.randn(3, 3), torch.randn(3, 2)
    assert torch.equal(call(module, x, y)["double"], x * 2)
    with pytest.raises(TypeError, match=r"captured with the arguments \(x, y\), got \(x, z\)"):
        module(x, z=y)
    with pytest.raises(TypeError, match=r"got \(x, y, …\)"):
        module(x, y, x)


def test_an_input_of_the_examples_size_goes_to_each_piece_whole() -> None:
    class Graph(nn.Module):
        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return (adjacency @ x)[0] if x.shape[0] == 4 else adjacency @ x  # fixes the batch

    class Product:
        def __call__(self, *inputs: Tensor) -> list[Tensor]:
            assert [len(x) for x in inputs] == [5, 2]
            return [inputs[0] @ inputs[1]]

        def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
            return lambda: self(*inputs)

    adjacency, x = torch.randn(5, 5), torch.randn(7, 5, 3)
    artifact = Artifact(
        target="ort", model_file="m", dynamic_batch=False, max_batch=2, inputs=("a", "x"), outputs=("y",)
    )
    module = RunnerModule(Product(), artifact, capture(Graph(), (adjacency, x[:2])))
    torch.testing.assert_close(module(adjacency, x), adjacency @ x)


def test_dicts_may_have_another_order_of_keys() -> None:
    class Difference(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["a"] - batch["b"]

    class Runs:
        def __call__(self, *inputs: Tensor) -> list[Tensor]:
            return [inputs[0] - inputs[1]]

        def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
            return lambda: self(*inputs)

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    artifact = Artifact(target="ort", model_file="m", dynamic_batch=True, inputs=("a", "b"), outputs=("y",))
    program = capture(Difference(), ({"a": a, "b": b},))
    for module in (RunnerModule(Runs(), artifact, program), program.module()):
        assert torch.equal(module({"b": b, "a": a}), a - b)


def test_an_evaluate_may_ask_the_module_what_it_asks_a_model() -> None:
    module, _ = as_module(True, None)
    module.eval()
    assert next(module.parameters()).device == torch.device("cpu")
    assert not module.training


def test_what_rounding_may_lose() -> None:
    assert compare_rounded("m", 0.9, 0.95, 0.0).max_abs_error == 0.0
    assert compare_rounded("m", 0.9, 0.5, None).passed
    for value in (0.88, float("nan")):
        with pytest.raises(VerificationError, match=r"may lose 0\.01"):
            compare_rounded("m", 0.9, value, 0.01)
