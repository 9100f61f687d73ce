"""Accuracy against latency in its short form: it plans, trains, resumes, times and draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrc.kernels.build import build

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES_FOR_TIMES = """
from slrc.measuring import timing
from slrc.measuring.clock import Clock, Timing

timing.PATIENCE = 0.0

def times(clock, jobs, budget):
    found = []
    for program in (job.program(clock.target) for job in jobs):
        size = sum(t.numel() for t in program.tensors.values() if t.is_floating_point())
        rounds = any("fake_quantize" in str(node.target) for node in program.nodes)
        found.append(Timing(size / 4 if rounds else float(size)))
    return tuple(found)

Clock.times = times
"""
"""A runtime whose time is the bytes of the weights, so that any machine makes the same plans."""


@pytest.fixture
def run(start_process: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Runs a script as `python script arguments` does, with a cache that has the kernels; returns what it printed."""
    for library in (build(), build(int8=True)):
        shutil.copy(library, tmp_path)

    def call(script: str, *arguments: object) -> str:
        path = BENCHMARKS / "pareto" / script
        code = f"""
import runpy
sys.argv[:] = {[str(path), *map(str, arguments)]!r}
sys.path.insert(0, {str(path.parent)!r})
{SIZES_FOR_TIMES}
runpy.run_path({str(path)!r}, run_name="__main__")
"""
        done = start_process(code, tmp_path, SLRC_CACHE=str(tmp_path)).finish()
        assert done.code == 0, done.err
        return done.out

    return call


def test_the_short_form_trains_resumes_times_and_rounds(run: Callable[..., str], tmp_path: Path) -> None:
    rows, times = tmp_path / "rows.jsonl", tmp_path / "times.json"
    some = ["short", "--seeds", 1, "--out", rows, "--only"]
    assert run("train.py", *some, "*/auto@0.20/*").count("\n") == 1
    assert run("train.py", *some, "*/width 4/*").count("\n") == 1
    assert run("train.py", *some, "*/width 4/*") == ""
    found = {row["row"]: row for row in map(json.loads, rows.read_text().splitlines())}
    planned, smaller = found["digits-net/auto@0.20/2/0"], found["digits-net/width 4/3/0"]
    assert planned["predicted"] == pytest.approx(0.2, rel=0.1)
    assert len(planned["curve"]) == 4  # dense, refitted, two epochs
    assert planned["test"] > 80
    assert planned["dense"] == smaller["dense"] > 90
    assert "predicted" not in smaller

    printed = run("latency.py", "--trained", rows, "--out", times, "--only", "*/auto@0.20/*")
    measured = json.loads(times.read_text())["rows"]["digits-net/auto@0.20/2/0"]
    assert f"{measured['share']:.1%}" in printed
    assert measured["size"] < 1

    rounded = tmp_path / "int8.json"
    assert run("int8.py", "--trained", rows, "--out", rounded, "--only", "*/auto@0.20/*").count("\n") == 1
    corner = json.loads(rounded.read_text())["rows"]["digits-net/auto@0.20/2/0"]
    assert corner["test"] == pytest.approx(planned["test"], abs=2)
    assert corner["layers_int8"] > 0

    assert run("train.py", *some, "*/auto, for int8@0.20/*").count("\n") == 1
    assert run("latency.py", "--trained", rows, "--out", times, "--only", "*for int8*") == ""
    assert run("int8.py", "--trained", rows, "--out", rounded, "--only", "*for int8@0.20/*").count("\n") == 1
    corner = json.loads(rounded.read_text())["rows"]["digits-net/auto, for int8@0.20/2/0"]
    assert corner["test"] > 80
    assert corner["layers_int8"] > 0
