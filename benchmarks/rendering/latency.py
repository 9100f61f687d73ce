"""Tables of how fast networks and their layers are on a CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from doctor import POINTS, complete, pairs, summary
from front_page import CASES
from rendering.markdown import TO_FILL, VECTORS, made, ranged, read, table
from results import Row
from sparse_latency import NETWORKS, SPARSITIES, key
from tasks_latency import IN_INT8, PRUNED
from tasks_latency import key as tasks_key

NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "mobilenet_v2": "MobileNetV2 (1×1 layers)",
    "yolov3_tiny": "YOLOv3-tiny, 416 pixels",
    "swin_t": "Swin-T",
    "mixer_s16": "MLP-Mixer-S/16",
}


def front_page() -> str:
    """The README's five compiles."""
    rows, lines = read("front_page"), []
    for number, case in enumerate(CASES, start=1):
        row = rows.get(case.command)
        if row is None:
            lines.append([str(number), case.network, case.how, *[TO_FILL] * 4])
            continue
        accuracy = "–"
        if row["accuracy"]:
            accuracy = f"{row['accuracy']['dense']:.1%} → {row['accuracy']['final']:.1%}"
        smaller = 1 - row["params"]["compiled"] / row["params"]["dense"]
        times = f"{row['dense_ms']:.2f} → {row['compiled_ms']:.2f} ms"
        speed = ranged(row["speedup"], row["spread"])
        lines.append([str(number), case.network, case.how, accuracy, f"−{smaller:.1%}", times, speed])
    titles = (
        "",
        "network and data",
        "pattern, sparsity",
        "accuracy",
        "parameters",
        "time of a run",
        "speed-up (range)",
    )
    commands = "".join(f"{number}. `{case.command}`\n" for number, case in enumerate(CASES, start=1))
    return table(titles, lines) + "\n" + commands + made(rows.values())


def sparse_latency() -> str:
    """Whole networks with blocks, one thread."""
    rows, lines = read("sparse_latency"), []
    for network in NETWORKS:
        found = [rows.get(key(network, "block:8x1", sparsity, 1, 1)) for sparsity in SPARSITIES]
        cells = [ranged(row["speedup"], row["spread"]) if row else TO_FILL for row in found]
        dense = next((f"{row['dense_ms']:.1f} ms" for row in found if row), TO_FILL)
        lines.append([NAMES[network], dense, *cells])
    titles = ("network", "dense", *(f"{sparsity:.0%} sparse" for sparsity in SPARSITIES))
    shown = [row for name, row in rows.items() if "block:8x1" in name and name.endswith("threads=1 batch=1")]
    return table(titles, lines) + made(shown)


def sparse_latency_other() -> str:
    """Other patterns, threads and batches than those of `sparse_latency`."""
    rows = {
        name: row
        for name, row in read("sparse_latency").items()
        if "block:8x1" not in name or not name.endswith("threads=1 batch=1")
    }
    lines = []
    for name, row in rows.items():
        network, pattern, sparsity, threads, batch = name.split()
        scaled = ["–", "–"]
        if "compiled_over_one_thread" in row:
            scaled = [ranged(v[0], v[1:]) for v in (row["compiled_over_one_thread"], row["dense_over_one_thread"])]
        count, size = threads.partition("=")[2], batch.partition("=")[2]
        speed = ranged(row["speedup"], row["spread"])
        lines.append([NAMES[network], f"`{pattern}`, {float(sparsity):.0%}", count, size, speed, *scaled])
    titles = ("network", "pattern", "threads", "batch", "speed-up", "compiled over 1 thread", "dense over 1 thread")
    return table(titles, lines) + made(rows.values())


def kernel_latency() -> str:
    """Layer by layer, blocks of eight."""
    rows = read("kernel_latency")
    cells: dict[str, dict[float, str]] = {}
    for row in rows.values():
        if row["block"] == 8 and row["batch"] == 1:
            text = f"{row['speedup']:.2f}×, {row['share_of_peak']:.0%}"
            cells.setdefault(row["layer"], {})[row["sparsity"]] = text
    lines = [[f"`{layer}`", *(found.get(s, TO_FILL) for s in SPARSITIES)] for layer, found in cells.items()]
    return table(("layer", *(f"{s:.0%} sparse" for s in SPARSITIES)), lines) + made(rows.values())


def latency_budget() -> str:
    """Predicted and measured latencies."""
    rows, lines = read("latency_budget"), []
    for name, row in rows.items():
        model, budget, pattern, device = name.split()
        shares = [f"{row[part]:.1%}" for part in ("predicted", "measured", "macs", "parameters")]
        lines.append([model.partition(":")[2], f"`{pattern}`", device, f"{float(budget):.0%}", *shares])
    titles = ("network", "pattern", "where", "budget", "predicted", "measured", "multiply-accumulates", "parameters")
    return table(titles, lines) + made(rows.values())


def doctor() -> str:
    """What is foretold in under a minute, and what a compile then finds."""
    rows = read("doctor")
    models = complete(rows)
    if not models:
        return f"{TO_FILL}\n"
    lines = [
        [f"`{m}`", f"{rows[m]['seconds']:.0f} s", "{} of {}".format(*rows[m]["timed"]), *map(str, pairs(rows, m))]
        for m in models
    ]
    points = [f"`{pattern}`, {sparsity:.0%}: predicted, measured, off by" for pattern, sparsity in POINTS]
    titles = ("network", "examined in", "timed", *points)
    return f"{table(titles, lines)}\n{summary(rows)}\n{made(rows.values())}"


def tasks_latency() -> str:
    """The networks of other tasks: how much faster they are."""
    rows, lines = read("tasks_latency"), []
    for name, title in _titles(rows).items():
        for on, vectors in VECTORS.items():
            cells = [rows.get(tasks_key(name, *what, on)) for what in PRUNED]
            if any(cells):
                first = next(row for row in cells if row)
                speeds = [ranged(row["speedup"], row["spread"]) if row else "–" for row in cells]
                dense = f"{first['macs_dense'] / 1e9:.2f} G", f"{first['dense_ms']:.0f} ms"
                lines.append([title, vectors, *dense, *speeds])
    asked = [f"`{pattern}`, {share:.0%}{' in int8' if pattern in IN_INT8 else ''}" for pattern, share in PRUNED]
    titles = ("network and input", "on", "MACs", "dense", *asked)
    return table(titles, lines) + made(rows.values())


def tasks_pipeline() -> str:
    """The networks of other tasks with what stands around them."""
    rows, lines = read("tasks_latency"), []
    for (name, title), on in itertools.product(_titles(rows).items(), VECTORS):
        if (row := rows.get(tasks_key(name, *PRUNED[0], on))) is None:
            continue
        around = row["before_ms"] + row["after_ms"]
        whole = (around + row["dense_ms"]) / (around + row["compiled_ms"])
        parts = [f"{row[part]:.1f}" for part in ("before_ms", "dense_ms", "compiled_ms", "after_ms")]
        lines.append([title, VECTORS[on], *parts, f"{whole:.2f}×", f"{around / (around + row['compiled_ms']):.0%}"])
    parts = ("before", "dense", "compiled", "after")
    titles = ("network and input", "on", *(f"{part}, ms" for part in parts), "all faster by", "around it")
    return table(titles, lines)


def _titles(rows: Mapping[str, Row]) -> dict[str, str]:
    return {key.split()[0]: row["title"] for key, row in rows.items()}


def split_copies() -> str:
    """What could be gained where layers are split."""
    rows = read("split_copies")
    gains = {part: [row[part] for row in rows.values()] for part in ("slice_speedup", "no_copies_speedup")}
    lines = [
        [name, f"{math.prod(found) ** (1 / len(found)):.3f}×", f"{min(found):.2f}× to {max(found):.2f}×"]
        for name, found in zip(("slices in place of gathers", "no copies at all"), gains.values(), strict=True)
    ]
    return table((f"{len(rows)} layers", "faster by (geometric mean)", "range"), lines) + made(rows.values())
