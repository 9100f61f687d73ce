"""What tables are made of: rows of the results files, cells of Markdown, and where the rows were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from results import FILES, Row, rows_of

TO_FILL = "TO-FILL"
"""For a figure that was not measured yet."""
VECTORS = {"avx2": "AVX2", "avx512": "AVX-512"}
"""What the `vectors` of keys are called."""
WIDEST = {"avx512f": ", with AVX-512", "avx2": ", with AVX2 but no AVX-512"}


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
