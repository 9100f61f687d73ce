"""The tables of the docs, made of the results files, so that a table and its data cannot part.

    make tables                       # or: python benchmarks/tables.py

In README.md and docs/*.md, what stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table of
that name, which a function of `rendering/` makes. A figure that was not measured yet is shown as TO-FILL. A test holds
that the docs are as this writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rendering import accuracy, coverage, engines, integers, latency
from results import ROOT

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        latency.front_page,
        latency.sparse_latency,
        latency.sparse_latency_other,
        latency.kernel_latency,
        latency.latency_budget,
        latency.doctor,
        latency.tasks_latency,
        latency.tasks_pipeline,
        latency.split_copies,
        integers.int8_latency,
        integers.int8_kernel_latency,
        integers.int8,
        engines.torch_target,
        engines.gpu_latency,
        coverage.zoo,
        coverage.detectors,
        coverage.analysis_growth,
        accuracy.channel_permutation,
        accuracy.step_cost,
        accuracy.reconstruct,
        accuracy.pareto,
        accuracy.tasks_accuracy,
        accuracy.methods,
        accuracy.methods_against,
        accuracy.methods_parts,
        accuracy.methods_budgets,
        accuracy.methods_large,
        accuracy.methods_tasks,
        accuracy.methods_inside,
        accuracy.methods_settings,
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
