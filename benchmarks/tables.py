"""The tables of the docs, made of the results files, so that a table and its data cannot part.

    make tables                       # or: python benchmarks/tables.py

In README.md and docs/*.md, what stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table of
that name. A figure that was not measured yet is shown as TO-FILL. A test holds that the docs are as this writes them.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten

sys.path.insert(1, str(Path(__file__).parent / "convergence"))
sys.path.insert(1, str(Path(__file__).parent / "pareto"))
import answers
from analysis_growth import slope
from doctor import POINTS, complete, pairs, summary
from front_page import CASES
from frontier import points
from gpu_networks import NETWORKS as GPU_NETWORKS
from reconstruct import CASES as RECONSTRUCTED
from reconstruct import NAMES as RECONSTRUCTED_NAMES
from reconstruct import more, row_key
from results import FILES, ROOT, Row, file_of, rows_of
from sparse_latency import NETWORKS, SPARSITIES, key
from torch_target import NETWORKS as TORCHVISION
from zoo import EXACT

TO_FILL = "TO-FILL"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDEST = {"avx512f": ", with AVX-512", "avx2": ", with AVX2 but no AVX-512"}
NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "mobilenet_v2": "MobileNetV2 (1×1 layers)",
    "yolov3_tiny": "YOLOv3-tiny, 416 pixels",
    "swin_t": "Swin-T",
    "mixer_s16": "MLP-Mixer-S/16",
}


def read(name: str) -> dict[str, Row]:
    """Return the rows of a results file by key; none where there is no file."""
    return rows_of(next(file for file in FILES if file.name == f"{name}.json"))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def made(rows: Iterable[Row]) -> str:
    """Return a line about where rows were measured, and with which build."""
    groups = Counter(_made(row.get("made_with", {})) for row in rows)
    found = [text if len(groups) == 1 else f"{count} rows: {text}" for text, count in groups.most_common()]
    return f"\nMeasured on: {'; '.join(found) or TO_FILL}.\n"


def _made(stamp: Row) -> str:
    if not stamp:
        return "a machine and a build that were not recorded"
    versions = stamp["versions"]
    kernels = f", kernels `{stamp['kernels'][:8]}`" if stamp["kernels"] else ""
    build = f"sources `{stamp['sources'][:8]}`" if stamp["sources"] else "a build that was not recorded"
    widest = next((name for name in WIDEST if name in stamp["instruction_sets"]), "")
    return (
        f"{stamp['processor']}{WIDEST.get(widest, '')}; ONNX Runtime {versions['onnxruntime']}, "
        f"PyTorch {versions['torch']}, slrc {versions['slrc']}, {build}{kernels}"
    )


def ranged(value: float, spread: Sequence[float], unit: str = "×") -> str:
    """Return a value and its range."""
    return f"{value:.2f}{unit} ({spread[0]:.2f} to {spread[1]:.2f})"


def front_page() -> str:
    """The README's five compiles."""
    rows, lines = read("front_page"), []
    for number, case in enumerate(CASES, start=1):
        name = f"`{case.pattern}`, {case.sparsity:.0%}"
        row = rows.get(case.command)
        if row is None:
            lines.append([str(number), case.network, name, *[TO_FILL] * 4])
            continue
        accuracy = "–"
        if row["accuracy"]:
            accuracy = f"{row['accuracy']['dense']:.1%} → {row['accuracy']['final']:.1%}"
        smaller = 1 - row["params"]["compiled"] / row["params"]["dense"]
        times = f"{row['dense_ms']:.2f} → {row['compiled_ms']:.2f} ms"
        speed = ranged(row["speedup"], row["spread"])
        lines.append([str(number), case.network, name, accuracy, f"−{smaller:.1%}", times, speed])
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


def zoo() -> str:
    """Families of networks: how many are exact, and the largest error."""
    rows, lines = read("zoo"), []
    for source in ("torchvision", "timm"):
        mine = {name: row for name, row in rows.items() if name.startswith(source)}
        worst = {name: max(max(x["slim_error"], x["ort_error"]) for x in row["levels"].values())
                 for name, row in mine.items() if "levels" in row}  # fmt: skip
        failed = [f"`{name.partition(':')[2]}`" for name in mine if name not in worst]
        exact = sum(error <= EXACT for error in worst.values())
        lines.append([source, str(len(mine)), str(exact), f"{max(worst.values()):.0e}", ", ".join(failed) or "none"])
    titles = ("library", "networks run", "equal", "largest error", "could not be planned")
    return table(titles, lines) + made(rows.values())


def detectors() -> str:
    """Detectors and feature extractors: what is left, and how exact every step is."""
    rows, lines = read("detectors"), []
    for name, row in rows.items():
        cells = [f"`{name}`", f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "–"]
        for pattern in ("channel", "block:8x1"):
            found = row.get(pattern, {"failed": "ended early"})
            failed = shorten(found.get("failed", ""), 80, placeholder=" …")
            cells.append(failed or f"{found['left']:.0%}, {found['error']:.0e}")
        lines.append(cells)
    titles = ("network", "parameters", "`channel`, 50%: left, error", "`block:8x1`, 75%: left, error")
    return table(titles, lines) + made(rows.values())


def tasks_latency() -> str:
    """The networks of other tasks: how much faster they are."""
    rows, lines = read("tasks_latency"), []
    for name, title in _titles(rows).items():
        own = {key.partition(" ")[2]: row for key, row in rows.items() if key.split()[0] == name}
        cells = [own.get(x) for x in ("block:8x1 0.75", "channel 0.5", "channel 0.75")]
        first = next(row for row in cells if row)
        speeds = [ranged(row["speedup"], row["spread"]) if row else TO_FILL for row in cells]
        lines.append([title, f"{first['macs_dense'] / 1e9:.2f} G", f"{first['dense_ms']:.0f} ms", *speeds])
    titles = ("network and input", "MACs", "dense", "`block:8x1`, 75%", "`channel`, 50%", "`channel`, 75%")
    return table(titles, lines) + made(rows.values())


def tasks_pipeline() -> str:
    """The networks of other tasks with what stands around them."""
    rows, lines = read("tasks_latency"), []
    for name, title in _titles(rows).items():
        if (row := rows.get(f"{name} block:8x1 0.75")) is None:
            continue
        around = row["before_ms"] + row["after_ms"]
        whole = (around + row["dense_ms"]) / (around + row["compiled_ms"])
        parts = [f"{row[part]:.1f}" for part in ("before_ms", "dense_ms", "compiled_ms", "after_ms")]
        lines.append([title, *parts, f"{whole:.2f}×", f"{around / (around + row['compiled_ms']):.0%}"])
    titles = ("network and input", "before, ms", "dense, ms", "compiled, ms", "after, ms", "all faster by", "around it")
    return table(titles, lines)


def _titles(rows: Mapping[str, Row]) -> dict[str, str]:
    return {key.split()[0]: row["title"] for key, row in rows.items()}


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


def analysis_growth() -> str:
    """How the analysis grows."""
    rows = read("analysis_growth")
    largest = max(rows, key=lambda name: rows[name]["operators"])
    exponent = slope(list(rows.values()), "operators")[0]
    row = rows[largest]
    text = (
        f"Over {len(rows)} networks the time grows as the number of operators to the power {exponent:.2f}.\n"
        f"The largest, `{largest}`, has {row['operators']} operators and takes {row['seconds']:.2f} seconds.\n"
    )
    return text + made(rows.values())


def step_cost() -> str:
    """What the teacher and the method add to a training step."""
    rows, lines = read("step_cost"), []
    for row in rows.values():
        added = f"{row['distillation']:.0%}", f"{row['method']:.1%}"
        lines.append([row["network"], row["precision"], f"`{row['method_name']}`", f"{row['step_ms']:.0f} ms", *added])
    titles = ("network", "training", "method", "a step", "distillation adds", "the method adds")
    return table(titles, lines) + made(rows.values())


def split_copies() -> str:
    """What could be gained where layers are split."""
    rows = read("split_copies")
    gains = {part: [row[part] for row in rows.values()] for part in ("slice_speedup", "no_copies_speedup")}
    lines = [
        [name, f"{math.prod(found) ** (1 / len(found)):.3f}×", f"{min(found):.2f}× to {max(found):.2f}×"]
        for name, found in zip(("slices in place of gathers", "no copies at all"), gains.values(), strict=True)
    ]
    return table((f"{len(rows)} layers", "faster by (geometric mean)", "range"), lines) + made(rows.values())


def channel_permutation() -> str:
    """What reordering channels does for blocks."""
    rows, lines = read("channel_permutation"), []
    for name, row in rows.items():
        network, pattern, sparsity = name.rsplit(maxsplit=2)
        energy = f"{row['kept_plain']:.1%} → {row['kept_permuted']:.1%}"
        accuracy = "–"
        if "accuracy_plain" in row:
            accuracy = f"{row['accuracy_plain']:.1%} → {row['accuracy_permuted']:.1%}"
        lines.append([f"`{network}`", f"`{pattern}`, {float(sparsity):.0%}", energy, accuracy])
    return table(("network", "pattern", "energy kept", "accuracy, one shot"), lines) + made(rows.values())


def methods() -> str:
    """The methods' accuracy after six epochs."""
    return answers.accuracy_table(answers.Results(compared()), "test") + made(compared("small").values())


def methods_against() -> str:
    """The default less each other method."""
    return answers.against_table(answers.Results(compared()), "small")


def methods_parts() -> str:
    """Parts of the default left out or changed."""
    return answers.parts_table(answers.Results(compared())) + made(compared("parts").values())


def methods_budgets() -> str:
    """Runs of few and of many epochs."""
    return answers.budgets_table(answers.Results(compared())) + made(compared("budgets").values())


def methods_large() -> str:
    """Larger networks."""
    rows = {**compared("middle"), **compared("large")}
    return answers.others_table(answers.Results(compared())) + made(rows.values())


def methods_inside() -> str:
    """What happens inside the methods."""
    return answers.inside_table(answers.Results(compared()))


def methods_settings() -> str:
    """What was the best for each method."""
    return answers.settings_table(compared()) + made(compared("tuning").values())


def compared(tier: str = "") -> dict[str, Row]:
    """Return the rows of the comparison, all or those of a tier."""
    rows = rows_of(file_of("convergence"))
    return {name: row for name, row in rows.items() if name.startswith(tier)}


def reconstruct() -> str:
    """Pruning without labels or training."""
    rows, lines = read("reconstruct"), []
    for network, cases in RECONSTRUCTED.items():
        for case in cases:
            if (key := row_key(network, *case)) not in rows:
                continue
            row = rows[key]
            pattern, sparsity, options = case
            name = f"{RECONSTRUCTED_NAMES[network]}, `{pattern}` {sparsity or 0.5:.0%}{more(options)}"
            figures = ("dense", "accuracy", "magnitude", "agreement")
            cells = [f"{row[f]:.1f}" if f in row else "–" for f in figures]
            peak = f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "–"
            lines.append([name, *cells, f"{row['seconds']:.0f} s", peak])
    titles = ("network, pattern", "dense", "reconstructed", "by magnitude", "agreement", "time", "peak memory")
    return table(titles, lines) + made(rows.values())


def pareto() -> str:
    """Accuracy over measured latency."""
    found, lines = list(points()), []
    for p in found:
        within = "" if p.interval is None else f" ± {p.interval:.1f}"
        asked = "–" if p.asked is None else f"{p.asked:.0%}"
        name = p.contender if p.asked is None else f"`{p.contender}`"
        accuracy = f"{p.test:.1f}{within}"
        lines.append([p.network, name, asked, f"{p.share:.1f}%", f"{p.ms:.3f}", accuracy, f"{p.test - p.dense:+.1f}"])
    titles = ("network", "pruned by", "asked", "measured", "ms", "accuracy", "beside dense")
    shown = [*rows_of(file_of("pareto_latency")).values()]
    return table(titles, lines) + made(shown)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        *(front_page, sparse_latency, sparse_latency_other, kernel_latency, latency_budget, doctor, zoo),
        *(detectors, tasks_latency, tasks_pipeline, torch_target, gpu_latency),
        *(analysis_growth, step_cost, split_copies, channel_permutation, reconstruct, pareto),
        *(methods, methods_against, methods_parts, methods_budgets, methods_large, methods_inside, methods_settings),
    )
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return MARKED.sub(replace, text)


def pages() -> Iterator[Path]:
    """Yield the pages that may hold tables."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def main() -> None:
    """Write the tables."""
    for page in pages():
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
