"""The comparison of methods in its short form: it measures, resumes, and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BUDGETS = ("budget-1", "budget-2", "budget-3")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        env={**os.environ, "SLRC_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_short_form_measures_resumes_and_answers(tmp_path: Path) -> None:
    rows, both = (
        tmp_path / "rows.jsonl",
        ["short", "--only", "*/[sg][lr][ra]*/*", "--out", str(tmp_path / "rows.jsonl")],
    )
    printed = run("convergence/run.py", *both, cache=tmp_path)
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
    assert run("convergence/run.py", *both, cache=tmp_path).count("\n") == 1
    assert len(rows.read_text().splitlines()) == 2
    assert run("convergence/run.py", *both, cache=tmp_path) == ""

    measured = rows.read_text()
    rows.write_text("".join(measured.replace("short/", f"{tier}/") for tier in ("small", *BUDGETS)))
    answers = run("convergence/answers.py", "--rows", str(rows), "--out", str(tmp_path / "answers"), cache=tmp_path)
    assert f"{slr['final']['hard_bn']:.2f}" in answers
    assert ", ".join([f"{slr['final']['hard_bn']:.1f}"] * 4) in answers  # runs of 1, 2, 3 and 6 epochs
    assert (tmp_path / "answers" / "convergence.md").read_text() == answers.removesuffix("\n")
    assert "SLR" in answers
    plots = {path.stem for path in (tmp_path / "answers").glob("*.svg") if "<svg" in path.read_text()}
    questions = ("curves", "sparsity", "epochs", "budgets", "retraining", "sensitivity", "residual")
    assert plots == {f"convergence_{question}" for question in questions}
