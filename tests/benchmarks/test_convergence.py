"""The comparison of methods in its short form: it measures, resumes, and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BUDGETS = ("budget-1", "budget-2", "budget-3")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(start_process: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Runs a script as `python script arguments` does; returns what it printed."""

    def call(script: str, *arguments: str) -> str:
        path = BENCHMARKS / script
        code = f"""
import runpy
sys.argv[:] = {[str(path), *arguments]!r}
sys.path.insert(0, {str(path.parent)!r})
runpy.run_path({str(path)!r}, run_name="__main__")
"""
        done = start_process(code, tmp_path, SLRC_CACHE=str(tmp_path)).finish()
        assert done.code == 0, done.err
        return done.out

    return call


def test_the_short_form_measures_resumes_and_answers(run: Callable[..., str], tmp_path: Path) -> None:
    rows, both = (
        tmp_path / "rows.jsonl",
        ["short", "--only", "*/[sg][lr][ra]*/*", "--out", str(tmp_path / "rows.jsonl")],
    )
    printed = run("convergence/run.py", *both)
    by_name = {row["row"].split("/")[3]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert by_name.keys() == {"slr", "gradual"}
    assert printed.count("\n") == 2
    slr = by_name["slr"]
    assert [point["epoch"] for point in slr["curve"]] == [0.5 * i for i in range(1, 7)]
    assert len(slr["history"]) == 6
    assert slr["final"]["hard_bn"] > 80
    assert slr["retrained"].keys() == {"1"}
    assert slr["history"][-1]["residual"] < 0.2 * slr["history"][0]["residual"]

    before = rows.read_bytes()
    rows.write_bytes(b"".join(before.splitlines(keepends=True)[:1]))  # as if it had been interrupted
    assert run("convergence/run.py", *both).count("\n") == 1
    assert len(rows.read_text().splitlines()) == 2
    assert run("convergence/run.py", *both) == ""

    measured = rows.read_text()
    rows.write_text("".join(measured.replace("short/", f"{tier}/") for tier in ("small", *BUDGETS)))
    answers = run("convergence/answers.py", "--rows", str(rows), "--out", str(tmp_path / "answers"))
    assert f"{slr['final']['hard_bn']:.2f}" in answers
    assert ", ".join([f"{slr['final']['hard_bn']:.1f}"] * 4) in answers  # runs of 1, 2, 3 and 6 epochs
    assert (tmp_path / "answers" / "convergence.md").read_text() == answers.removesuffix("\n")
    assert "SLR" in answers
    plots = {path.stem for path in (tmp_path / "answers").glob("*.svg") if "<svg" in path.read_text()}
    questions = ("curves", "sparsity", "epochs", "budgets", "retraining", "sensitivity", "residual")
    assert plots == {f"convergence_{question}" for question in questions}
