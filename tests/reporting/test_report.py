"""Reports read from a folder that may come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slrc.errors import OutputError
from slrc.progress import Quiet
from slrc.reporting.bench import bench_output
from slrc.reporting.report import Report

TARGET = {"target": "ort", "folder": "ort", "size_bytes": {"dense": 2, "compiled": 1}, "precision": "float32"}
REPORT: dict[str, Any] = {
    "model": "net",
    "pattern": "channel",
    "method": "slr",
    "training": None,
    "sparsity": {"asked": 0.5, "reached": 0.5},
    "accuracy": None,
    **{name: {"dense": 2, "compiled": 1} for name in ("params", "macs", "size_bytes")},
    **{name: [] for name in ("latency", "checks", "history", "curve", "layers", "notes")},
    "targets": [TARGET],
    "config": {},
    "environment": {},
}


@pytest.mark.parametrize("folder", ["/tmp", "../other", "ort/..", "..", "", "C:\\other"])
def test_a_report_names_folders_beside_it_only(folder: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert Report.load(tmp_path).targets[0].folder == "ort"
    (tmp_path / "report.json").write_text(json.dumps(REPORT | {"targets": [TARGET | {"folder": folder}]}))
    with pytest.raises(OutputError, match=r"field `targets\.0\.folder`: .*expected the bare name"):
        bench_output(tmp_path, 1, Quiet())
