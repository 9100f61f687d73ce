"""Tables of other runtimes: packages of AOTInductor, and networks on a GPU."""

from __future__ import annotations

from gpu_networks import NETWORKS as GPU_NETWORKS
from rendering.markdown import TO_FILL, made, ranged, read, table
from results import Row
from torch_target import NETWORKS as TORCHVISION


def torch_target() -> str:
    """Packages of AOTInductor, half of the channels against dense."""
    rows, lines = read("torch_target"), []
    for name in TORCHVISION:
        row = rows.get(name)
        if row is None:
            lines.append([f"`{name}`", *[TO_FILL] * 5])
            continue
        megabytes = " → ".join(f"{row[size] / 1e6:.1f}" for size in ("dense_bytes", "compiled_bytes"))
        times = f"{row['dense_ms']:.1f} → {row['compiled_ms']:.1f} ms"
        cells = (f"{row['macs_left']:.0%}", times, ranged(row["speedup"], row["spread"]), f"{row['max_rel_error']:.0e}")
        lines.append([f"`{name}`", *cells, f"{megabytes} MB"])
    titles = ("network", "multiply-accumulates left", "time of a run", "speed-up (range)", "error", "package")
    return table(titles, lines) + made(rows.values())


def gpu_latency() -> str:
    """Networks on a GPU."""
    rows, lines = read("gpu_latency"), []
    if not rows:
        return "Nothing was run: no CUDA GPU was at hand.\n"
    for name, row in rows.items():
        network, label, precision, batch, runtime = name.split(", ")
        figures = [f"not run: {row['why_not']}", "–", "–"] if "why_not" in row else _on_gpu(row)
        cells = (label, precision, batch.removeprefix("batch "), f"`{runtime}`")
        lines.append([GPU_NETWORKS[network].title, *cells, *figures])
    titles = ("network", "pruned by", "precision", "batch", "runtime", "time of a run", "speed-up", "error")
    gpus = ", ".join(sorted({row["gpu"] for row in rows.values()}))
    return table(titles, lines) + made(rows.values()).replace("Measured on: ", f"Measured on: {gpus}; ")


def _on_gpu(row: Row) -> list[str]:
    times = f"{row['dense_ms']:.3f} → {row['ms']:.3f} ms"
    if "added" in row:
        return [times, f"{row['added']:+.1%}", "–"]
    return [times, f"{row['speedup']:.2f}×", f"{row['error']:.0e}" + ("" if row["right"] else ", wrong")]
