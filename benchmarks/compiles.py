"""Runs of `slrc compile` as a reader would type them, each in a process of its own, and what their reports say."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import ROOT


@dataclass(frozen=True)
class Compile:
    """One compile."""

    network: str
    """With its data."""
    how: str
    """What is asked of it, such as a pattern and a sparsity."""
    arguments: str
    """All that the command line says."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What a reader types."""
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), f"slrc compile {self.arguments}"])

    def run(self, out: Path) -> dict[str, Any]:
        """Compile into a folder and return what the report says; an interrupted compile goes on.

        Raises:
            SystemExit: the compile failed, and has said why.
        """
        if not (out / "report.json").exists():
            resumed = ["--resume"] if out.with_name(f"{out.name}.work").exists() else []
            words = [*shlex.split(self.arguments), "--out", str(out), *resumed]
            environment = {**os.environ, **self.environment}
            command = [sys.executable, "-m", "slrc", "compile", *words]
            if subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(f"failed: {self.command}")
        report = json.loads((out / "report.json").read_text())
        latency = report["latency"][0]
        found = {
            "network": self.network,
            "how": self.how,
            "accuracy": report["accuracy"],
            "params": report["params"],
            "macs": report["macs"],
            "size_bytes": report["size_bytes"],
            "dense_ms": latency["dense_ms"]["p50"],
            "compiled_ms": latency["compiled_ms"]["p50"],
            "speedup": latency["speedup"],
            "spread": latency["speedup_spread"],
            "targets": [t["target"] for t in report["targets"]],
        }
        if int8 := report["targets"][0]["int8"]:
            found |= beside_float32(found["accuracy"], int8["corners"])
        return found


def beside_float32(accuracy: dict[str, Any], corners: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a row says of the compiled int8 model beside the dense one in float32, of the four of a report."""
    found = {(c["model"], c["precision"]): c for c in corners}
    dense, compiled = found["dense", "float32"], found["compiled", "int8"]
    slow, fast = dense["latency_ms"], compiled["latency_ms"]
    return {
        "accuracy": accuracy | {"final": compiled["metric"]},
        "size_bytes": {"dense": dense["size_bytes"], "compiled": compiled["size_bytes"]},
        "dense_ms": slow["p50"],
        "compiled_ms": fast["p50"],
        "speedup": slow["p50"] / fast["p50"],
        "spread": [slow["p50"] / fast["p90"], slow["p90"] / fast["p50"]],
        "corners": corners,
    }
