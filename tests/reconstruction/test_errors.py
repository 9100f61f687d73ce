"""What pruning a layer alone costs, against a run of the layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.errors import PlanError
from slrc.methods.settings import ReconstructSettings
from slrc.reconstruction import errors as errors_of_layers
from slrc.reconstruction import select as selecting
from slrc.reconstruction.calibration import calibration_inputs
from slrc.reconstruction.errors import group_divergences, layer_errors
from slrc.sparsity.constraints import Constraint

SETTINGS = ReconstructSettings(positions=64, damping=1e-4)


def test_errors_are_those_of_the_layer_pruned_alone(residual_workload: slrc.Workload) -> None:
    program = slrc.capture(residual_workload)
    inputs = calibration_inputs(program, residual_workload, 96, 0)
    options: dict[str, list[Constraint]] = {}
    for pattern in ("block:8x1", "columns:2", "unstructured"):
        for sparsity in (0.75, 0.5, 0.0):
            for c in slrc.plan(program, pattern, sparsity):
                options.setdefault(c.name, []).append(c)
    errors = layer_errors(program, inputs, options, SETTINGS)
    assert errors.keys() == options.keys()
    for name, found in errors.items():
        assert len(found) == len(options[name])
        assert all(0 <= e < 0.9 for e in found), (name, found)
        by_pattern: dict[str, list[float]] = {}
        for c, e in zip(options[name], found, strict=True):
            by_pattern.setdefault(str(c.pattern), []).append(e)
        for values in by_pattern.values():
            assert values == sorted(values, reverse=True)
            assert values[0] > values[1] > values[2]
            assert values[2] == pytest.approx(0, abs=1e-6)


def test_an_error_is_that_of_a_refit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    x = torch.randn(200, 6)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    program, settings = slrc.capture(workload), ReconstructSettings(damping=1e-6)
    plan = slrc.plan(program, "block:8x1", 0.5)
    (c,) = [c for c in plan if c.name == "2"]
    inputs = calibration_inputs(program, workload, 200, 0)
    (found,) = layer_errors(program, inputs, {"a name of its own": [c]}, settings)["a name of its own"]
    with torch.no_grad():
        features, y = torch.relu(model[0](x)).double(), model[2](torch.relu(model[0](x))).double()
    features, y = features - features.mean(0), y - y.mean(0)
    best = min(_residual(features[:, list(s)], y) for s in _supports(8, c.keep))
    assert found == pytest.approx(best / float(y.square().sum()), rel=0.05)


@pytest.mark.parametrize("pattern", ["block:8x1", "block:16x4", "block:32x1", "block:5x1", "2:4", "unstructured"])
def test_some_outputs_tell_the_error_of_many(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sparsity = None if pattern == "2:4" else 0.5
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 320), nn.ReLU(), nn.Linear(320, 4))
    x = torch.randn(300, 12)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    program = slrc.capture(workload)
    options = {c.name: [c] for c in slrc.plan(program, pattern, sparsity) if c.name == "2"}
    inputs, found = calibration_inputs(program, workload, 300, 0), []
    for telling in (320, 64):
        monkeypatch.setattr("slrc.reconstruction.errors.TELLING", telling)
        found += layer_errors(program, inputs, options, SETTINGS)["2"]
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.15)


def test_a_group_alone_moves_the_outputs_as_its_refitted_reader_does() -> None:
    """Against least squares: the reader of a group, fitted to what is left of it, and a group that nothing misses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
    x = torch.randn(400, 6)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    program, settings = slrc.capture(workload), ReconstructSettings(damping=1e-9, rate=1e-3)
    before = {n: t.clone() for n, t in program.tensors.items()}
    groups = slrc.plan(program, "channel", 0.5, keep_ends=False).constraints
    assert [c.name for c in groups] == ["0", "2"]
    inputs = calibration_inputs(program, workload, 400, 0)
    found = group_divergences(program, inputs, groups, settings)
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    assert found["0"] == pytest.approx(0, abs=1e-6)

    with torch.no_grad():
        features = torch.relu(model[2](torch.relu(model[0](x)))).double()
        y = model(x).double()
    ones, values = torch.ones(len(x), 1, dtype=torch.float64), []
    for kept in _supports(8, groups[1].keep):
        seen = torch.cat([features[:, list(kept)], ones], dim=1)
        fitted = seen @ torch.linalg.lstsq(seen, y).solution
        p, q = y.log_softmax(1), fitted.log_softmax(1)
        values.append((float((fitted - y).square().sum()), float((p.exp() * (p - q)).sum(1).mean())))
    assert any(found["2"] == pytest.approx(value, rel=1e-3) for _, value in sorted(values)[:5])


def test_a_transposed_convolution_reads_a_group() -> None:
    """It reads half of the units, those that are small: they are kept, and nothing moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 5, 2, 2))
    with torch.no_grad():
        model[0].weight[4:] *= 10
        model[2].weight[4:] = 0
    x = torch.randn(32, 3, 4, 4)
    workload = slrc.Workload(model=model, example_inputs=(x[:1],), calibration=[x])
    program = slrc.capture(workload)
    groups = slrc.plan(program, "channel", 0.5, keep_ends=False, round_to=1).constraints
    assert [(c.name, c.groups, c.keep) for c in groups] == [("0", 8, 4)]
    found = group_divergences(program, calibration_inputs(program, workload, 32, 0), groups)
    assert found["0"] == pytest.approx(0, abs=1e-6)


def _supports(columns: int, keep: int) -> list[tuple[int, ...]]:
    from itertools import combinations

    return list(combinations(range(columns), keep))


def _residual(x: Tensor, y: Tensor) -> float:
    return float((x @ torch.linalg.lstsq(x, y).solution - y).square().sum())


def test_one_elimination_serves_all_amounts(residual_workload: slrc.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    eliminate = selecting.eliminate
    monkeypatch.setattr(selecting, "eliminate", lambda *args: calls.append(1) or eliminate(*args))
    program = slrc.capture(residual_workload)
    inputs = calibration_inputs(program, residual_workload, 32, 0)
    plans = [slrc.plan(program, "block:8x1", s) for s in (0.25, 0.5, 0.75)]
    options = {c.name: [p.constraints[i] for p in plans] for i, c in enumerate(plans[0])}
    layer_errors(program, inputs, options, SETTINGS)
    assert len(calls) == len(options)


def test_a_coupled_group_has_no_error_of_one_layer(residual_workload: slrc.Workload) -> None:
    program = slrc.capture(residual_workload)
    c = slrc.plan(program, "channel", 0.5).constraints[0]
    with pytest.raises(PlanError, match="spans layers"):
        layer_errors(program, [], {c.name: [c]}, SETTINGS)


def test_a_layer_that_was_not_observed_says_why(
    residual_workload: slrc.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = slrc.capture(residual_workload)
    inputs = calibration_inputs(program, residual_workload, 32, 0)
    c = slrc.plan(program, "block:8x1", 0.5).constraints[0]
    observe = errors_of_layers.observe
    monkeypatch.setattr(
        errors_of_layers, "observe", lambda *args: replace(observe(*args), moments=None, why_not="it is odd")
    )
    with pytest.raises(PlanError, match="has no error of reconstruction: it is odd"):
        layer_errors(program, inputs, {c.name: [c]}, SETTINGS)
