"""The measurement on a GPU, played on the CPU with tiny networks: it ends with a table, and all is right."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_latency(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_latency")


def test_a_dry_run_ends_with_a_table(gpu_latency: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rows = gpu_latency.main(["--dry-run", "vit_s"])
    timed = {name: row for name, row in rows.items() if "speedup" in row}
    runs = [f"{p}, batch {b}, torch" for p in ("fp32", "fp16", "bf16") for b in (1, 2)]
    expected = [f"vit_s, {label}, {run}" for run in runs for label in ("dense", "channel 50%", "channel 75%")]
    expected += [f"vit_s, {x}, fp32, batch {b}, ort" for b in (1, 2) for x in ("dense", "channel 50%", "2:4")]
    assert set(timed) == set(expected)
    assert all(row["right"] and row["ms"] > 0 for row in timed.values())
    assert max(row["error"] for row in timed.values()) > 0
    training = rows["resnet50, a training step with SLR, bf16, batch 2, torch"]
    assert training["ms"] > 0
    assert {name for name, row in rows.items() if "why_not" in row} == {f"vit_s, 2:4, {run}" for run in runs}
    out = capsys.readouterr().out
    assert all(name in out for name in rows)


def test_a_wrong_network_is_shown(gpu_latency: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_latency.TOLERANCES, "fp32", 0.0)
    run = gpu_latency.Run(dry=True, deadline=0.0, store=lambda name, row: None)
    gpu_latency.add_rows(run, "net", "fp32", 1, "torch", {"dense": [2.0], "2:4": [1.0]}, {"dense": 0.0, "2:4": 0.1})
    lines = list(gpu_latency.lines_of(run))
    assert "WRONG" not in lines[1]
    assert "2.00x" in lines[2]
    assert lines[2].endswith("WRONG")


def test_pairs_are_stored_where_there_are_kernels(gpu_latency: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors themselves are for a GPU."""
    stored = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: stored.append(weight.shape) or weight)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 8))
    assert gpu_latency.semi_structured(model, frozenset({"0.weight", "1.weight"})) == ""
    assert stored == [(8, 4)]
    assert "no 2:4 kernel for convolutions" in gpu_latency.semi_structured(model, frozenset({"0.weight"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_at_once(gpu_latency: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_latency.main([])
    assert "there is no CUDA GPU" in capsys.readouterr().err
