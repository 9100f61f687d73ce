"""The table of the README: five compiles, one after another, on one machine with one build.

    SLRC_DATA=~/data python benchmarks/front_page.py

Each is the `slrc compile` that the README names; what its report says becomes a row of
`benchmarks/results/front_page.json`. Fashion-MNIST is read from `$SLRC_DATA`, as `examples/fashion_mnist.py` explains.
A second run goes on with what is missing or out of date. `make tables` then writes the table. All takes about twenty
minutes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import ROOT, Rows

RESNET50 = "torchvision:resnet50@random --method magnitude --epochs 0"


@dataclass(frozen=True)
class Case:
    """One compile."""

    network: str
    pattern: str
    sparsity: float
    arguments: str
    """The model and what is not the default."""

    @property
    def command(self) -> str:
        """What a reader types."""
        return f"slrc compile {self.arguments} --pattern {self.pattern} --sparsity {self.sparsity:g} --threads 1"


CASES = (
    Case("small ResNet, scikit-learn's digits", "channel", 0.5, "examples/digits.py --epochs 5"),
    Case("small ResNet, scikit-learn's digits", "block:8x1", 0.75, "examples/digits.py --epochs 5"),
    Case("small ResNet, Fashion-MNIST", "block:8x1", 0.75, "examples/fashion_mnist.py --epochs 6"),
    Case("ResNet-50, random weights", "channel", 0.5, RESNET50),
    Case("ResNet-50, random weights", "block:8x1", 0.75, RESNET50),
)


def compile_case(case: Case) -> dict[str, Any]:
    """Run a compile in a process of its own and return what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        words = [*shlex.split(case.command)[1:], "--out", str(out)]
        subprocess.run([sys.executable, "-m", "slrc", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
    latency = report["latency"][0]
    return {
        "network": case.network,
        "pattern": case.pattern,
        "sparsity": case.sparsity,
        "accuracy": report["accuracy"],
        "params": report["params"],
        "macs": report["macs"],
        "size_bytes": report["size_bytes"],
        "dense_ms": latency["dense_ms"]["p50"],
        "compiled_ms": latency["compiled_ms"]["p50"],
        "speedup": latency["speedup"],
        "spread": latency["speedup_spread"],
    }


def main() -> None:
    """Run what is missing; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the compiles, from 1", metavar="N")
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    args = parser.parse_args()
    rows = Rows(__file__)
    for number, case in enumerate(CASES, start=1):
        if args.only and number not in args.only:
            continue
        if args.again or not rows.has(case.command):
            print(case.command, flush=True)
            rows.add(case.command, compile_case(case))
        row = rows[case.command]
        print(f"    {row['speedup']:.2f}x ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
