"""The comparison of methods in its short form: it measures, resumes, and answers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    rows = tmp_path / "rows.jsonl"
    some = ["short", "--only", "*/[dgm][era][nas]*[elt]/3/0", "--out", str(rows)]
    printed = run("convergence/run.py", *some)
    found = {row["contender"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found.keys() == {"gradual", "dense", "masks from the start"}
    assert printed.count("\n") == len(found)
    gradual, dense, masked = (found[name] for name in ("gradual", "dense", "masks from the start"))
    assert len(gradual["curve"]) == 4
    assert gradual["cost"]["steps"] == dense["cost"]["steps"] == masked["cost"]["steps"]
    assert gradual["test"] > 80
    assert (masked["changed"], dense["changed"]) == (0.0, None)
    assert len(gradual["history"]) == 6

    before = rows.read_bytes()
    rows.write_bytes(b"".join(before.splitlines(keepends=True)[:1]))  # as if it had been interrupted
    assert run("convergence/run.py", *some).count("\n") == len(found) - 1
    assert run("convergence/run.py", *some) == ""

    rows.write_text(rows.read_text().replace('"row": "short/', '"row": "small/').replace("/3/0", "/6/0"))
    answers = run("convergence/answers.py", "--rows", str(rows), "--out", str(tmp_path))
    assert f"| gradual | {gradual['test']:.2f} | 1 |" in answers
    assert f"| dense | {dense['test']:.2f} | 1 |" in answers
    assert f"{gradual['test'] - masked['test']:+.2f}" in answers
    assert "epochs to ADMM's last" in answers
    renamed = rows.read_text().replace('"row": "small/', '"row": "tasks/')
    rows.write_text(renamed.replace("/masks from the start/", "/admm/"))
    answers = run("convergence/answers.py", "--rows", str(rows), "--out", str(tmp_path))
    last = next(e for e, value in enumerate(masked["curve"]) if value >= masked["val"])
    assert f"| admm | 6 | {masked['dense']:.2f} | {masked['test']:.2f} | 1 | {last} |" in answers
    assert "<svg" in (tmp_path / "convergence_budgets.svg").read_text()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (BENCHMARKS / "convergence", BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("answers")


def test_intervals_and_verdicts(answers: Any) -> None:
    interval = answers.Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert interval.verdict == "tie"
    assert answers.Interval.of([1.0, 1.1, 0.9]).verdict == "ahead"
    assert answers.Interval.of([-1.0, -1.1, -0.9]).verdict == "behind"
    assert answers.Interval.of([5.0]).verdict == "tie"  # one value says nothing


def test_settings_are_taken_from_the_validation_split_of_all_cases(answers: Any) -> None:
    def row(case: str, setting: str, value: float) -> dict[str, Any]:
        name = f"tuning/{case}/admm: {setting}/6/0"
        options = {"admm": {"rho": float(setting[-1])}}
        return {"row": name, "contender": "admm", "setting": setting, "val": value, "test": 99.0, "options": options}

    first, second = (answers.name_of(case) for case in answers.TUNED_ON)
    rows = [
        row(first, "rho 1", 80.0),
        row(second, "rho 1", 84.0),
        row(first, "rho 2", 83.0),
        row(second, "rho 2", 83.0),
    ]
    rows.append(row(first, "rho 3", 95.0))  # was run on one case alone
    assert answers.tuned("admm", {r["row"]: r for r in rows}) == {"admm": {"rho": 2.0}}
    with pytest.raises(SystemExit, match="is not tuned"):
        answers.tuned("ac-dc", {})
