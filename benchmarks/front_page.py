"""The table of the README: five compiles, one after another, on one machine with one build.

    SLRC_DATA=~/data python benchmarks/front_page.py

Each is the `slrc compile` that the README names; what its report says becomes a row of
`benchmarks/results/front_page.json`. Fashion-MNIST is read from `$SLRC_DATA`, as `examples/fashion_mnist.py` explains.
A second run goes on with what is missing or out of date. `make tables` then writes the table. All takes about twenty
minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from compiles import Compile
from results import Rows

RESNET50 = "torchvision:resnet50@random --method magnitude --epochs 0"


def case(network: str, pattern: str, sparsity: float, arguments: str) -> Compile:
    """Return a compile on one thread."""
    asked = f"--pattern {pattern} --sparsity {sparsity:g} --threads 1"
    return Compile(network, f"`{pattern}`, {sparsity:.0%}", f"{arguments} {asked}")


CASES = (
    case("small ResNet, scikit-learn's digits", "channel", 0.5, "examples/digits.py --epochs 5"),
    case("small ResNet, scikit-learn's digits", "block:8x1", 0.75, "examples/digits.py --epochs 5"),
    case("small ResNet, Fashion-MNIST", "block:8x1", 0.75, "examples/fashion_mnist.py --epochs 6"),
    case("ResNet-50, random weights", "channel", 0.5, RESNET50),
    case("ResNet-50, random weights", "block:8x1", 0.75, RESNET50),
)
NUMBERS = range(1, len(CASES) + 1)


def main() -> None:
    """Run what is missing; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=int, nargs="+", choices=NUMBERS, help="numbers of the compiles, from 1", metavar="N"
    )
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    args = parser.parse_args()
    rows = Rows(__file__)
    for number, case in enumerate(CASES, start=1):
        if args.only and number not in args.only:
            continue
        if args.again or not rows.has(case.command):
            print(case.command, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                rows.add(case.command, case.run(Path(folder) / "out"))
        row = rows[case.command]
        print(f"    {row['speedup']:.2f}x ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
