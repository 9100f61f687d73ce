"""Tables of int8: how fast its kernels and whole networks are, and what rounding costs in accuracy."""

from __future__ import annotations

import itertools

from int8 import NAMES as ROUNDED
from int8 import SPARSITIES as ROUNDED_AT
from int8 import row_key
from int8_latency import NETWORKS, SPARSITIES, key
from rendering.latency import NAMES
from rendering.markdown import VECTORS, made, ranged, read, table


def int8_latency() -> str:
    """Whole networks, dense and compiled, in float32 and in int8."""
    rows, lines = read("int8_latency"), []
    for network, sparsity, on in itertools.product(NETWORKS, SPARSITIES, VECTORS):
        if (row := rows.get(key(network, sparsity, on))) is None:
            continue
        ms = [f"{row['ms'][x]:.1f}" if x in row["ms"] else "–" for x in TIMED]
        faster = ranged(*_split(row["over"]["dense-int8"]))
        lines.append([NAMES[network], f"{sparsity:.0%}", VECTORS[on], *ms, faster])
    titles = (
        *("network", "sparse", "on", "dense", "dense int8", "dense int8, its tool", "OpenVINO int8"),
        *("compiled", "compiled int8", "over dense int8"),
    )
    return table(titles, lines) + made(rows.values())


TIMED = ("dense", "dense-int8", "onnxruntime-int8", "openvino-int8", "compiled", "compiled-int8")


def _split(found: list[float]) -> tuple[float, list[float]]:
    return found[0], found[1:]


def int8_kernel_latency() -> str:
    """Layer by layer against dense int8, by instruction set and sparsity."""
    rows = read("int8_kernel_latency")
    columns = sorted({(row["instruction_set"], row["sparsity"]) for row in rows.values()})
    cells: dict[str, dict[tuple[str, float], str]] = {}
    for row in rows.values():
        text = f"{row['speedup']:.2f}×, {row['share_of_peak']:.0%}"
        cells.setdefault(row["layer"], {})[row["instruction_set"], row["sparsity"]] = text
    lines = [[f"`{layer}`", *(found.get(c, "–") for c in columns)] for layer, found in cells.items()]
    zeros = [f"{sparsity:.0%} sparse" if sparsity else "no zeros" for _, sparsity in columns]
    titles = ("layer", *(f"{name}, {share}" for (name, _), share in zip(columns, zeros, strict=True)))
    return table(titles, lines) + made(rows.values())


def int8() -> str:
    """Accuracy after rounding by calibration alone."""
    rows, lines = read("int8"), []
    for network, title in ROUNDED.items():
        for sparsity in ROUNDED_AT:
            if (row := rows.get(row_key(network, sparsity))) is None:
                continue
            pruned = f"`block:8x4` {sparsity:.0%}" if sparsity else "dense"
            figures = ("float32", "int8", "agreement_int8", "onnxruntime", "openvino")
            cells = [f"{row[f]:.1f}" if f in row else "–" for f in figures]
            lines.append([title, pruned, *cells, f"{row['seconds']:.0f} s"])
    titles = ("network", "", "float32", "int8", "agreement", "onnxruntime's tool", "in OpenVINO", "time")
    return table(titles, lines) + made(rows.values())
