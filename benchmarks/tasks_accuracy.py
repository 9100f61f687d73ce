"""What the examples of detection, lanes and lidar keep of their metric on the data packs: one compile each.

    SLRC_DATA=~/data python benchmarks/tasks_accuracy.py                # all: five hours of one core
    SLRC_DATA=~/data python benchmarks/tasks_accuracy.py --only 1 2     # YOLOv3-tiny

Each is the `slrc compile` that the table names. YOLOv3-tiny is measured on images that it does not train on, lanes and
lidar on the ten images and six frames that they train on: whether a pruned network overfits them as the dense one does.
Models in int8 stand beside the dense one in float32.
What a report says becomes a row of `benchmarks/results/tasks_accuracy.json`; an interrupted compile lies in the cache,
and goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from hashlib import sha256

from compiles import Compile
from results import Rows

from slrc.machine.cache import cache_folder

REFITTED = "--method reconstruct --epochs 20 --threads 1"
OVERFITTED = "--pattern block:8x1 --sparsity 0.75 --epochs {} --threads 1 --target ort --target tensorrt-rtx:sm86"
CASES = (
    Compile(
        "YOLOv3-tiny, COCO, 128 images",
        "half the latency",
        f"examples/yolov3.py --speedup 2 --pattern block:8x1 {REFITTED}",
    ),
    Compile(
        "YOLOv3-tiny, COCO, 128 images", "a third", f"examples/yolov3.py --speedup 3 --pattern block:8x1 {REFITTED}"
    ),
    Compile(
        "YOLOv3-tiny, COCO, 128 images",
        "int8, twice as fast as dense int8",
        f"examples/yolov3.py --target ort+int8 --speedup 2 {REFITTED}",
    ),
    Compile(
        "Ultra-Fast-Lane-Detection, TuSimple, ten images",
        "`block:8x1`, 75%",
        f"examples/lanes.py {OVERFITTED.format(60)}",
        {"SLRC_DENSE_EPOCHS": "60"},
    ),
    Compile(
        "PointPillars, KITTI, six frames",
        "`block:8x1`, 75%",
        f"examples/pointpillars.py {OVERFITTED.format('80 --precision bf16')}",
    ),
)
NUMBERS = range(1, len(CASES) + 1)


def main() -> None:
    """Run what is missing; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=int, nargs="+", choices=NUMBERS, help="numbers of the compiles, from 1", metavar="N"
    )
    args = parser.parse_args()
    rows = Rows(__file__)
    for number, case in enumerate(CASES, start=1):
        if args.only and number not in args.only:
            continue
        print(case.command, flush=True)
        if not rows.has(case.command):
            out = cache_folder() / "compiles" / sha256(case.command.encode()).hexdigest()[:16]
            rows.add(case.command, case.run(out))
            shutil.rmtree(out)
        row = rows[case.command]
        found = row["accuracy"]
        print(f"    {found['metric']} {found['dense']:.3f} to {found['final']:.3f}, {row['speedup']:.2f}x", flush=True)


if __name__ == "__main__":
    main()
