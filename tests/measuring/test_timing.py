"""What a measurement consists of; the figures themselves are nobody's to assert."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc import lower
from slrc.backends import get_backend, parse_target
from slrc.ir.program import capture
from slrc.machine import denormals
from slrc.measuring import timing


class Counted:
    def __init__(self, order: list[str], name: str) -> None:
        self.order, self.name = order, name

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        raise AssertionError("only what `prepare` returns is timed")

    def prepare(self, *inputs: Tensor) -> Callable[[], Any]:
        return lambda: self.order.append(self.name)


@pytest.fixture
def measured(quick_timing: None) -> tuple[timing.Latency, list[str]]:
    order: list[str] = []
    inputs = [torch.zeros(5, 3), torch.zeros(())]
    latency = timing.measure("ort", Counted(order, "dense"), Counted(order, "compiled"), inputs, 2)
    return latency, order


def test_what_a_latency_holds(measured: tuple[timing.Latency, list[str]]) -> None:
    latency, _ = measured
    assert (latency.target, latency.threads, latency.batch) == ("ort", 2, 5)
    for side in (latency.dense_ms, latency.compiled_ms):
        assert 0 < side.p50 <= side.p90
    assert 0 < latency.speedup_spread[0] <= latency.speedup <= latency.speedup_spread[1]
    assert set(json.loads(latency.model_dump_json())) >= {
        *("target", "threads", "batch", "dense_ms", "compiled_ms", "speedup", "speedup_spread"),
    }


def test_a_speedup_lies_within_its_range_whatever_the_machine_does() -> None:
    """The pace falls to a half between two blocks: the medians of all runs are of different halves."""
    blocks = [([4.0], [2.0]), ([4.0], [2.0]), ([8.0], [4.0]), ([8.0, 8.0], [4.0])]
    latency = timing.latency_of("ort", blocks, [], 1)
    assert latency.dense_ms.p50 / latency.compiled_ms.p50 > 2.5
    assert (latency.speedup, latency.speedup_spread) == (2.0, (2.0, 2.0))
    blocks = [([3.0], [1.0]), ([2.0], [1.0]), ([5.0], [2.0]), ([9.0], [3.0])]
    latency = timing.latency_of("ort", blocks, [], 1)
    assert (latency.speedup, latency.speedup_spread) == (2.75, (2.0, 3.0))


def test_the_two_are_timed_in_turns(measured: tuple[timing.Latency, list[str]]) -> None:
    latency, order = measured
    timed = order[-4 * latency.runs :]
    turns = [tuple(timed[i : i + 4 : 2]) for i in range(0, len(timed), 4)]
    assert set(turns) == {("dense", "compiled"), ("compiled", "dense")}
    assert timed[::2] == timed[1::2]  # each turn: a run that does not count, and one that does
    assert latency.runs >= timing.REPORT.least_rounds
    assert order[: len(order) - len(timed)].count("dense") >= 3  # warm-up


@pytest.mark.parametrize("race", [False, True])
def test_who_clearly_is_slower_leaves_a_race(monkeypatch: pytest.MonkeyPatch, race: bool, quick_timing: None) -> None:
    ms = {"fast": [1.0, 1.1, 0.9], "alike": [1.05, 0.95, 1.15], "slow": [3.0, 2.9, 3.1]}
    runs = {name: itertools.cycle(times) for name, times in ms.items()}
    monkeypatch.setattr(timing, "_time_ms", lambda call: next(runs[call()]))
    budget = timing.Budget(1.0, 8, race=race)
    times = timing.time_in_turns([lambda name=name: name for name in ms], budget)  # type: ignore[misc]
    assert [len(one) for one in times] == [8, 8, timing.RACE_ROUNDS if race else 8]
    assert timing.medians(times) == pytest.approx([1.0, 1.05, 3.0], abs=0.06)
    alone = timing.time_in_turns([lambda: "fast", lambda: "slow"], budget)
    assert {len(one) for one in alone} == {timing.RACE_ROUNDS if race else 8}


def test_denormal_numbers_are_zero_only_while_something_is_timed(quick_timing: None, tmp_path: Path) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always computes them")
    torch.set_flush_denormal(False)
    modes: list[bool] = []
    timing.time_in_turns([lambda: modes.append(denormals.are_zero())], timing.PART)
    assert set(modes) == {True}
    assert not denormals.are_zero()
    tiny_model = capture(nn.Linear(2, 2), (torch.zeros(1, 2),), "tiny")
    get_backend(parse_target("ort")).load(lower(tiny_model, "ort", tmp_path).folder)  # the option would change the mode
    assert not denormals.are_zero()
    with pytest.raises(ValueError, match="inside"), denormals.taken_for_zero():
        raise ValueError("inside")
    assert not denormals.are_zero()
    with denormals.taken_for_zero():
        with denormals.taken_for_zero():
            pass
        assert denormals.are_zero()  # as before, not as by default
    torch.set_flush_denormal(False)


def test_the_environment() -> None:
    found = timing.environment()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert {"slrc", "torch", "onnxruntime"} <= found["versions"].keys()
    assert json.loads(json.dumps(found)) == found
