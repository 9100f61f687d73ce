"""What the copies of a split layer cost: gathers of the kept channels before it, a concatenation after it.

    taskset -c 1 python benchmarks/split_copies.py

Layers of a ResNet as `columns:2` splits them, in stock ONNX Runtime on one thread, in turns: with gathers, with slices
in their place (what reordering the producer's channels could give), and with neither gathers nor a concatenation (the
most that any folding could give). Writes `benchmarks/results/split_copies.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from kernel_latency import SHAPES, Shape, in_turns, prepare
from onnx import TensorProto, helper, numpy_helper
from results import Rows

GROUPS = 2


def split_model(shape: Shape, keep: int, copies: str) -> Any:
    """Return the split layer, its input channels chosen by `gather`, by `slice`, or given apart (`none`)."""
    random = np.random.default_rng(0)
    nodes, tensors = [], {}
    inputs = {"x": shape.inputs} if copies != "none" else {f"part{g}": keep for g in range(GROUPS)}
    for g in range(GROUPS):
        if copies == "gather":
            chosen = np.sort(random.choice(shape.inputs, keep, replace=False))
            tensors[f"channels{g}"] = chosen.astype(np.int64)
            nodes.append(helper.make_node("Gather", ["x", f"channels{g}"], [f"part{g}"], axis=1))
        elif copies == "slice":
            begin = g * (shape.inputs - keep)
            bounds = {f"begin{g}": begin, f"end{g}": begin + keep, f"axis{g}": 1}
            tensors |= {name: np.array([value]) for name, value in bounds.items()}
            nodes.append(helper.make_node("Slice", ["x", *bounds], [f"part{g}"]))
        sizes = (shape.outputs // GROUPS, keep, shape.kernel, shape.kernel)
        tensors[f"w{g}"] = random.standard_normal(sizes).astype(np.float32)
        nodes.append(helper.make_node("Conv", [f"part{g}", f"w{g}"], [f"y{g}"], **shape.attributes))
    parts = [f"y{g}" for g in range(GROUPS)]
    if copies != "none":
        nodes.append(helper.make_node("Concat", parts, ["y"], axis=1))
        parts = ["y"]
    size = shape.size * shape.stride
    graph = helper.make_graph(
        nodes,
        "split",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, size, size]) for n, c in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in parts],
        [numpy_helper.from_array(a, n) for n, a in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each pair")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = Rows(__file__, args.out)
    print(f"{'layer':22} kept  gather ms  slice: faster  no copies: faster")
    for shape in SHAPES:
        for kept in (0.5, 0.25):
            calls = {c: prepare(split_model(shape, int(shape.inputs * kept), c)) for c in ("gather", "slice", "none")}
            gather, slices, _ = in_turns(calls["gather"], calls["slice"], args.seconds)
            again, none, _ = in_turns(calls["gather"], calls["none"], args.seconds)
            row = {"layer": str(shape), "kept": kept, "gather_ms": gather * 1e3}
            row |= {"slice_speedup": gather / slices, "no_copies_speedup": again / none}
            rows.add(f"{shape} {kept:g}", row)
            print(
                f"{shape!s:22} {kept:4.0%} {gather * 1e3:10.3f} {gather / slices:13.2f}x {again / none:17.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
