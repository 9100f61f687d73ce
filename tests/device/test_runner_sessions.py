"""How the runner on a device opens sessions of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slrc.device.runner import bench
from slrc.machine.processor import processor


class Options:
    """What a session is asked for."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_it_knows_the_processors_dot_product() -> None:
    assert bench.has_vnni() == processor().has_vnni


@pytest.mark.parametrize("vnni", [False, True])
def test_exact_sums_are_asked_for_only_where_they_cost_nothing(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With VNNI ONNX Runtime would give up its fast kernels for them."""
    made: list[Options] = []

    def open_session(_file: str, options: Options, **_: Any) -> Any:
        made.append(options)
        return SimpleNamespace(run=None)

    runtime = object.__new__(bench.RUNTIMES["ort"])
    runtime.ort, runtime.threads = SimpleNamespace(SessionOptions=Options, InferenceSession=open_session), None
    monkeypatch.setattr(bench, "has_vnni", lambda: vnni)
    runtime.load({"name": "dense", "file": "model.onnx", "inputs": [], "outputs": [], "kernels": None})
    assert ("session.x64quantprecision" in made[0].entries) is not vnni
