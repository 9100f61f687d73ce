"""The networks of segmentation, detection, lanes and lidar at their usual sizes: dense against compiled, one thread.

    python benchmarks/tasks_latency.py                            # all: an hour of one quiet core
    python benchmarks/tasks_latency.py unet pointpillars --pattern block:8x1

Random weights, pruned by magnitude in one shot: how fast a network is does not depend on what it has learnt. Every
layer with zeros in its blocks has the form that is fastest, by timing as in a compile. Networks of `block:8x4` are in
int8, beside dense ones in float32. Dense and compiled are timed in turns in ONNX Runtime. What stands around a network
is timed too, on synthetic inputs: what makes its input of an image or of a lidar's points, and what makes boxes, lanes
or labels of its output. Rows go to `benchmarks/results/tasks_latency.json` as they come, and a second run goes on with
what is missing or out of date.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import Rows, vectors
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).parent / "convergence"))
sys.path.insert(1, str(Path(__file__).parents[1] / "examples"))
import lanes
import pointpillars
import segmentation
import yolov3
from common.boxed_images import letterbox, to_tensor
from common.darknet import Darknet
from scenes import LidarScenes

import slrc
from slrc.backends import get_backend, parse_target
from slrc.ir.program import Program
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.jobs import Formed, to_be_timed
from slrc.measuring.timing import time_pair
from slrc.pipeline import baseline, lower, structure
from slrc.sparsity.masks import Masks
from slrc.verify import outputs_of

PRUNED = (("block:8x1", 0.75), ("channel", 0.5), ("channel", 0.75), ("block:8x4", 0.75))
CAMVID, CAMVID_CLASSES = (180, 240), 11
PHOTO = (640, 480)
DETECTED = 100
"""Boxes that are found in an image, before those that better ones hide are dropped."""
RUNS = 5
TARGET = parse_target("ort")
IN_INT8 = {"block:8x4": parse_target("ort+int8")}
"""Patterns whose networks are compiled for another target than the dense ones beside them."""


@dataclass(frozen=True)
class Network:
    """A network, the inputs of a call, and what stands before it and after it."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    before: Callable[[], object]
    after: Callable[[list[Tensor]], Callable[[], object]]
    """Returns what is to be timed, given what the network returned."""
    front: Callable[[nn.Module], nn.Module] | None = None
    """Returns the part of a network that is timed by itself, on the same inputs."""


def photo(size: tuple[int, int] = PHOTO) -> Image.Image:
    """Return an image of noise, of a width and height."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def segmenter(title: str, name: str) -> Network:
    """Return a network of `examples/segmentation.py`."""
    image = photo(CAMVID[::-1])
    return Network(
        f"{title}, {CAMVID[0]}×{CAMVID[1]}",
        lambda: segmentation.NETWORKS[name](CAMVID_CLASSES),
        lambda: (segmentation.stacked([image]).contiguous(),),
        lambda: segmentation.stacked([image]),
        lambda outputs: lambda: outputs[0].argmax(1),
    )


def detector(title: str, name: str, size: int = 416) -> Network:
    """Return a network of `examples/yolov3.py`; so many boxes are found as are usual in an image."""
    image, (rows, anchors) = photo(), yolov3.NETWORKS[name]

    def boxes(heads: list[Tensor]) -> Callable[[], object]:
        found = []
        for head in heads:
            values = yolov3.unpack(torch.full_like(head, -10.0)).clone()
            values.flatten(0, 3)[:: max(1, values[..., 0].numel() * len(heads) // DETECTED), 4:6] = 2.0
            found.append(values.permute(0, 1, 4, 2, 3).reshape(head.shape))
        return lambda: yolov3.find(found, anchors, size)

    return Network(
        f"{title}, {size}×{size}",
        lambda: Darknet(rows),
        lambda: (to_tensor(letterbox(image, size)[0])[None].contiguous(),),
        lambda: to_tensor(letterbox(image, size)[0]),
        boxes,
    )


def lane_finder() -> Network:
    """Return the network of `examples/lanes.py`."""
    image, size = photo((1280, 720)), (lanes.HEIGHT, lanes.WIDTH)
    return Network(
        f"Ultra-Fast-Lane-Detection, {size[0]}×{size[1]}",
        lanes.LaneNet,
        lambda: (lanes.normalize(image, size)[None],),
        lambda: lanes.normalize(image, size),
        lambda outputs: lambda: lanes.decode(outputs[0]),
    )


class Canvas(nn.Module):
    """PointPillars up to the canvas: the network on pillars, and where they stand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        """As `PointPillars.canvas`."""
        return self.model.canvas(features, cells)  # type: ignore[operator]


def lidar_network() -> Network:
    """Return the network of `examples/pointpillars.py`; so many boxes are found as are usual in a frame."""
    grid = pointpillars.Grid()
    points, anchors = LidarScenes(grid, 1, 0)[0].points, pointpillars.make_anchors(grid)

    def boxes(heads: list[Tensor]) -> Callable[[], object]:
        scores = torch.full_like(heads[0], -10.0)
        scores.view(-1)[:: scores.numel() // DETECTED] = 2.0
        return lambda: pointpillars.decode_frame((scores, heads[1], heads[2]), anchors)

    def inputs() -> tuple[Tensor, ...]:
        features, cells = pointpillars.make_pillars(points, grid)
        return features[None], cells[None]

    return Network(
        "PointPillars, 496×432",
        lambda: pointpillars.PointPillars(grid),
        inputs,
        lambda: pointpillars.make_pillars(points, grid),
        boxes,
        Canvas,
    )


NETWORKS: dict[str, Callable[[], Network]] = {
    "unet": lambda: segmenter("U-Net-16", "unet"),
    "lraspp": lambda: segmenter("LR-ASPP", "lraspp"),
    "deeplab": lambda: segmenter("DeepLab v3", "deeplab"),
    "yolov3_tiny": lambda: detector("YOLOv3-tiny", "yolov3_tiny"),
    "yolov3": lambda: detector("YOLOv3", "yolov3"),
    "lanes": lane_finder,
    "pointpillars": lidar_network,
}


def key(name: str, pattern: str, sparsity: float, on: str) -> str:
    """Return the name of a row, measured on a processor with such `vectors`."""
    return f"{name} {pattern} {sparsity:g} {on}"


def captured(network: Network, name: str, part: Callable[[nn.Module], nn.Module] = lambda model: model) -> Program:
    """Return the program of a network or of a part of it, with random weights and statistics."""
    torch.manual_seed(0)
    model = part(network.make())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return slrc.capture(slrc.Workload(model.eval(), network.inputs(), name=name))


def measure_row(name: str, pattern: str, sparsity: float) -> dict[str, Any]:
    """Prune, emit and time one network, and what stands around it."""
    network = NETWORKS[name]()
    program = captured(network, name)
    # The first layer of PointPillars is the one on points, of which the width of the pillars follows.
    plan = slrc.plan(program, pattern, sparsity, keep_ends=name != "pointpillars")
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    target = IN_INT8.get(pattern, TARGET)
    forms = choose_forms(slim, target, threads=1).forms if pattern.startswith("block") else {}
    dense, formed = baseline(program), to_be_timed(Formed(slim, forms), target)
    with tempfile.TemporaryDirectory() as place:
        lowered = lower(dense, TARGET, Path(place) / "dense"), lower(formed, target, Path(place) / "compiled")
        found = time_pair(*lowered, slim.flat_inputs(), 1)
        outputs = get_backend(target).load(lowered[1].folder, threads=1)(*slim.flat_inputs())
        if network.front:
            front = lower(baseline(captured(network, name, network.front)), TARGET, Path(place) / "front")
            runner = get_backend(TARGET).load(front.folder, threads=1)
            front_ms = median_ms(lambda: runner(*slim.flat_inputs()))
    expected = outputs_of(slim.module(), slim.example_inputs)
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, outputs, strict=True))
    return {
        "title": network.title,
        "speedup": found.speedup,
        "spread": found.speedup_spread,
        "dense_ms": found.dense_ms.p50,
        "compiled_ms": found.compiled_ms.p50,
        "before_ms": median_ms(network.before),
        "after_ms": median_ms(network.after(list(outputs))),
        **({"front_ms": front_ms} if network.front else {}),
        "macs_dense": dense.macs,
        "macs_compiled": formed.macs,
        "parameters_left": formed.num_parameters / dense.num_parameters,
        "forms": dict(Counter(str(form) for form in forms.values())),
        "max_rel_error": error,
    }


def median_ms(call: Callable[[], object]) -> float:
    """Return the median time of some calls, after one that does not count."""
    call()
    took = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--pattern", nargs="+", default=[pattern for pattern, _ in PRUNED])
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(__file__, args.results)
    for pattern, sparsity in PRUNED:
        for name in args.networks if pattern in args.pattern else ():
            row_key = key(name, pattern, sparsity, vectors())
            if args.again or not rows.has(row_key):
                rows.add(row_key, measure_row(name, pattern, sparsity))
            row = rows[row_key]
            around = f"before {row['before_ms']:.1f} ms, after {row['after_ms']:.1f} ms"
            print(
                f"{name:13} {pattern:10} {sparsity:4.0%} {row['dense_ms']:8.2f} ms {row['compiled_ms']:8.2f} ms "
                f"{row['speedup']:5.2f}x, {around}, error {row['max_rel_error']:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
