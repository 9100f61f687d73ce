"""Block and column sparsity end to end: dense against compiled in ONNX Runtime, layer by layer and as a whole.

    python benchmarks/sparse_latency.py                                   # all networks, three sparsities, one thread
    python benchmarks/sparse_latency.py resnet50 --pattern block:8x1 --sparsity 0.75 --threads 2 --batch 8
    python benchmarks/sparse_latency.py --plot                            # draw what was measured so far
    python benchmarks/sparse_latency.py --fit                             # the cost model of slrc/forms/cost.py

Random weights, pruned by magnitude in one shot: how fast a network is does not depend on what it has learnt. The first
layer, the classifier and depthwise layers are not pruned. The form of each layer is chosen by timing, as a compile
does; dense and compiled are then timed in turns, the same inputs, threads and precision; with more threads than one,
each also against itself on one. Rows go to `benchmarks/results/sparse_latency.json` as they come, and a second run goes
on with what is missing or out of date. All takes about two hours on two quiet cores. Where the package `deepsparse` is
found by `--deepsparse PYTHON`, another interpreter's, it is measured beside, on the masked network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Rows
from torch import Tensor, nn

import slrc
from slrc.backends import get_backend, parse_target
from slrc.forms.cost import layer_kind
from slrc.forms.form import FormChoice
from slrc.ir.program import Program, capture
from slrc.measuring.choose_forms import choose_forms
from slrc.measuring.timing import measure
from slrc.pipeline import apply_forms, baseline, structure
from slrc.sparsity.masks import Masks
from slrc.verify import outputs_of

NETWORKS = ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "yolov3_tiny", "swin_t", "mixer_s16")
SPARSITIES = (0.5, 0.75, 0.9)
PATTERNS = ("block:8x1", "columns:2")
LEAST_SPREAD = 0.1
"""Of the densities that a line is fitted through."""
DEEPSPARSE = """
import sys, time, json, numpy as np
from deepsparse import Engine
path, batch, threads, shape = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
engine = Engine(path, batch_size=batch, num_cores=threads)
x = [np.random.default_rng(0).standard_normal(shape).astype(np.float32)]
for _ in range(10): engine.run(x)
times = []
until = time.perf_counter() + 5
while time.perf_counter() < until or len(times) < 10:
    begin = time.perf_counter(); engine.run(x); times.append(time.perf_counter() - begin)
print(json.dumps(sorted(times)[len(times) // 2] * 1e3))
"""


class YoloTiny(nn.Module):
    """YOLOv3-tiny's network, up to its two raw outputs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 128, 256, 512, 1024)
        self.down = nn.ModuleList(self._layer(a, b, 3) for a, b in itertools.pairwise(widths))
        self.neck = self._layer(1024, 256, 1)
        self.coarse = nn.Sequential(self._layer(256, 512, 3), nn.Conv2d(512, 255, 1))
        self.lift = self._layer(256, 128, 1)
        self.fine = nn.Sequential(self._layer(384, 256, 3), nn.Conv2d(256, 255, 1))

    @staticmethod
    def _layer(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(n, 3, 416, 416)` to `(n, 255, 13, 13)` and `(n, 255, 26, 26)`."""
        for k, layer in enumerate(self.down):
            x = layer(x)
            if k == 4:
                early = x
            if k < 5:
                x = nn.functional.max_pool2d(x, 2)
            elif k == 5:
                x = nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, stride=1)
        x = self.neck(x)
        lifted = nn.functional.interpolate(self.lift(x), scale_factor=2.0)
        return self.coarse(x), self.fine(torch.cat([lifted, early], dim=1))


def network(name: str, batch: int) -> Program:
    """Return a captured network with random weights."""
    torch.manual_seed(0)
    size = 416 if name == "yolov3_tiny" else 224
    if name == "yolov3_tiny":
        model: nn.Module = YoloTiny()
    elif name.startswith("mixer"):
        import timm

        model = timm.create_model("mixer_s16_224")
        nn.init.normal_(model.head.weight, std=0.02)  # zeros, which nothing could be compared with
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return capture(model.eval(), (torch.randn(batch, 3, size, size),), name)


def measure_row(name: str, pattern: str, sparsity: float, threads: int, batch: int, deepsparse: str) -> dict[str, Any]:
    """Choose, emit and time one network."""
    program = network(name, batch)
    plan = slrc.plan(program, pattern, sparsity, round_to=1)
    masks = Masks.project(plan, program.tensors)
    slim = structure(program, plan, masks)
    # Columns are split for a runtime without kernels: that is what they are for.
    target = parse_target("ort:stock" if pattern.startswith("columns") else "ort")
    choice = choose_forms(slim, target, threads=threads)
    formed = apply_forms(slim, choice.forms)
    dense = baseline(program)
    backend, runners, sizes = get_backend(target), [], []
    with tempfile.TemporaryDirectory() as folder:
        for k, one in enumerate((dense, formed)):
            lowered = slrc.lower(one, "ort", Path(folder) / str(k))
            runners.append(backend.load(lowered.folder, threads=threads))
            sizes.append(lowered.size_bytes)
        inputs = slim.flat_inputs()
        error = max(
            float((a - b).abs().max() / a.abs().max())
            for a, b in zip(outputs_of(slim.module(), slim.example_inputs), runners[1](*inputs), strict=True)
        )
        latency = measure("ort", runners[0], runners[1], inputs, threads)
        row = {
            "speedup": latency.speedup,
            "spread": latency.speedup_spread,
            "dense_ms": latency.dense_ms.p50,
            "compiled_ms": latency.compiled_ms.p50,
            "sparsity_reached": plan.sparsity,
            "macs_dense": dense.macs,
            "macs_compiled": formed.macs,
            "size_dense": sizes[0],
            "size_compiled": sizes[1],
            "max_rel_error": error,
            "taken": choice.taken,
            "whole_ms": dict(choice.whole_ms),
            "layers": layer_rows(slim, choice),
        }
        if threads > 1:
            for k, kind in enumerate(("dense", "compiled")):
                alone = measure("ort", backend.load(Path(folder) / str(k), threads=1), runners[k], inputs, threads)
                row[f"{kind}_over_one_thread"] = [alone.speedup, *alone.speedup_spread]
        if deepsparse:
            masked = slrc.lower(slim, "ort", Path(folder) / "masked")
            row["deepsparse_ms"] = time_deepsparse(deepsparse, masked.folder, batch, threads, list(inputs[0].shape))
    return row


def layer_rows(slim: Program, choice: FormChoice) -> list[dict[str, Any]]:
    """Return what is known of each layer: its kind, work, form, and the milliseconds of every form."""
    return [
        {
            "weight": x.weight,
            "kind": layer_kind(slim.tensors[x.weight], slim.layers[x.weight].groups),
            "shape": list(slim.tensors[x.weight].shape),
            "macs": slim.layers[x.weight].macs,
            "density": x.density,
            "form": str(x.form),
            "ms": dict(x.ms),
        }
        for x in choice.layers
    ]


def time_deepsparse(python: str, folder: Path, batch: int, threads: int, shape: list[int]) -> float | None:
    """Return the median milliseconds of DeepSparse on an ONNX file, or `None` if it does not run it."""
    command = [python, "-c", DEEPSPARSE, str(folder / "model.onnx"), str(batch), str(threads), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def fit(rows: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of `slrc.forms.cost.FITTED`: least squares on the layers of the rows meant for a form."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, row in rows.items():
        meant = ("split", "grouped") if "columns" in name else ("packed",)
        for layer in row["layers"]:
            best: dict[str, float] = {}
            for form, ms in layer["ms"].items():
                kind = form.partition(":")[0]
                best[kind] = min(ms, best.get(kind, ms))
            for kind, ms in best.items():
                if kind in meant:
                    points.setdefault((kind, layer["kind"]), []).append((layer["density"], ms / best["dense"]))
    for (form, kind), found in sorted(points.items()):
        density, share = np.array(found).T
        if np.ptp(density) < LEAST_SPREAD:
            yield f"    # {form}, {kind}: {share.mean():.2f} of dense, at a density of {density.mean():.2f} alone"
            continue
        slope, fixed = np.polyfit(density, share, 1)
        off = float(np.sqrt(np.mean((fixed + slope * density - share) ** 2)))
        fitted = f'(FormKind.{form.upper()}, "{kind}"): ({fixed:.2f}, {slope:.2f})'
        yield f"    {fitted},  # {len(found)} layers, off {off:.2f}"


def plot(rows: dict[str, Any], path: Path) -> None:
    """Draw speed-up against sparsity, with the limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in NETWORKS:
        for pattern, style in (("block:8x1", "-o"), ("columns:2", "--s")):
            at = [(s, rows.get(key(name, pattern, s, 1, 1))) for s in SPARSITIES]
            found = [(s, row["speedup"]) for s, row in at if row]
            if found:
                axes.plot(*zip(*found, strict=True), style, label=f"{name}, {pattern}", markersize=4, linewidth=1.2)
    limit = np.linspace(0.45, 0.905, 60)
    axes.plot(limit, 1 / (1 - limit), color="0.6", linewidth=1, label="limit 1 / (1 − sparsity)")
    axes.set(xlabel="sparsity of the pruned layers", ylabel="speed-up over dense", yscale="log")
    axes.set_yticks([1, 2, 3, 5, 10], ["1×", "2×", "3×", "5×", "10×"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def key(name: str, pattern: str, sparsity: float, threads: int, batch: int) -> str:
    """Return the name of a row."""
    return f"{name} {pattern} {sparsity:g} threads={threads} batch={batch}"


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--pattern", nargs="+", default=list(PATTERNS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--deepsparse", default="", metavar="PYTHON")
    parser.add_argument("--again", action="store_true", help="also rows that there are already")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = Rows(__file__, args.results)
    if args.plot:
        plot(rows.rows, rows.path.with_suffix(".svg"))
    if args.fit:
        print(*fit(rows.rows), sep="\n")
    if args.plot or args.fit:
        return
    print(f"{'network':14} {'pattern':10} sparse thr batch {'dense':>9} {'compiled':>9} {'faster':>7}")
    for name in args.networks:
        for pattern, sparsity, threads, batch in (
            (p, s, t, b) for p in args.pattern for s in args.sparsity for t in args.threads for b in args.batch
        ):
            row_key = key(name, pattern, sparsity, threads, batch)
            if args.again or not rows.has(row_key):
                rows.add(row_key, measure_row(name, pattern, sparsity, threads, batch, args.deepsparse))
            row = rows[row_key]
            scaled = ""
            if "compiled_over_one_thread" in row:
                most = "{:.2f}x ({:.2f} to {:.2f})"
                mine, theirs = (most.format(*row[f"{k}_over_one_thread"]) for k in ("compiled", "dense"))
                scaled = f", over one thread {mine}, dense {theirs}"
            print(
                f"{name:14} {pattern:10} {sparsity:6.0%} {threads:3} {batch:5} {row['dense_ms']:6.2f} ms "
                f"{row['compiled_ms']:6.2f} ms {row['speedup']:6.2f}x  {row['taken']}{scaled}",
                flush=True,
            )
    speedups = [row["speedup"] for row in rows.rows.values()]
    print(f"\nmedian speed-up: {statistics.median(speedups):.2f}x over {len(speedups)} rows")


if __name__ == "__main__":
    main()
