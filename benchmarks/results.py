"""The results files: what each row was made with, and which rows would have to be measured again.

    make results                      # or: python benchmarks/results.py

Each row of a results file carries `made_with`: the processor, the versions, the digest of the kernels' sources and that
of the other sources that its figures depend on. Where a digest is no longer that of the working tree, the row is out of
date: its command, run again, measures it anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from slrc.kernels.build import sources_digest
from slrc.measuring.timing import environment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
VERSIONS = ("slrc", "torch", "onnxruntime")
FORMS = ("passes/forms", "passes/structure", "slrc/forms", "backends/onnx_export.py", "backends/packed_onnx.py")
COMPILED = ("forms", "methods", "training", "measuring")
TIMING = "slrc/measuring/timing.py"
Row = dict[str, Any]


@dataclass(frozen=True)
class ResultsFile:
    """A file of measured rows."""

    name: str
    command: str
    """Makes it, from the root."""
    sources: tuple[str, ...]
    """Files and folders that its figures depend on, besides the kernels and the libraries."""
    kernels: bool = False
    """Whether its figures depend on the kernels."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        return FOLDER / self.name


FILES = (
    ResultsFile(
        "front_page.json",
        "SLRC_DATA=~/data python benchmarks/front_page.py",
        (
            *("benchmarks/front_page.py", "benchmarks/compiles.py", "examples", "passes", "backends"),
            *(f"slrc/{x}" for x in COMPILED),
        ),
        kernels=True,
    ),
    ResultsFile(
        "sparse_latency.json",
        "python benchmarks/sparse_latency.py",
        ("benchmarks/sparse_latency.py", "slrc/measuring/choose_forms.py", TIMING, *FORMS),
        kernels=True,
    ),
    ResultsFile(
        "kernel_latency.json",
        "taskset -c 1 python benchmarks/kernel_latency.py",
        ("benchmarks/kernel_latency.py",),
        kernels=True,
    ),
    ResultsFile(
        "int8_kernel_latency.json",
        "taskset -c 1 python benchmarks/int8_kernel_latency.py",
        ("benchmarks/int8_kernel_latency.py", "benchmarks/kernel_latency.py"),
        kernels=True,
    ),
    ResultsFile(
        "int8_latency.json",
        "taskset -c 1 python benchmarks/int8_latency.py --openvino",
        (
            *("benchmarks/int8_latency.py", "slrc/measuring/choose_forms.py", TIMING, *FORMS),
            *("passes/quantization", "backends/quantized_onnx.py"),
        ),
        kernels=True,
    ),
    ResultsFile(
        "split_copies.json",
        "taskset -c 1 python benchmarks/split_copies.py",
        ("benchmarks/split_copies.py", "benchmarks/kernel_latency.py"),
    ),
    ResultsFile(
        "latency_budget.json",
        "python benchmarks/latency_budget.py",
        ("benchmarks/latency_budget.py", "passes/allocation", "passes/analysis", "slrc/measuring"),
    ),
    ResultsFile(
        "doctor.json",
        "taskset -c 1 python benchmarks/doctor.py",
        ("benchmarks/doctor.py", "passes", "backends", *(f"slrc/{x}" for x in ("doctor", "forms", "measuring"))),
        kernels=True,
    ),
    ResultsFile(
        "pareto.jsonl",
        "SLRC_DATA=~/data python benchmarks/pareto/train.py TIER",
        (
            "benchmarks/pareto",
            "benchmarks/convergence/tasks.py",
            "passes",
            "backends",
            *(f"slrc/{x}" for x in COMPILED),
        ),
        kernels=True,
    ),
    ResultsFile(
        "pareto_latency.json",
        "SLRC_DATA=~/data python benchmarks/pareto/latency.py",
        ("benchmarks/pareto", "slrc/measuring/choose_forms.py", TIMING, *FORMS),
        kernels=True,
    ),
    ResultsFile(
        "pareto_int8.json",
        "SLRC_DATA=~/data python benchmarks/pareto/int8.py",
        (
            *("benchmarks/pareto/int8.py", "passes/quantization", "slrc/quantization", "backends/quantized_onnx.py"),
            *("slrc/measuring/choose_forms.py", TIMING, *FORMS),
        ),
        kernels=True,
    ),
    ResultsFile(
        "zoo.json",
        "python benchmarks/zoo.py",
        ("benchmarks/zoo.py", "benchmarks/zoo_timm.txt", "passes/analysis", "passes/structure"),
    ),
    ResultsFile(
        "detectors.json",
        "python benchmarks/detectors.py",
        (
            *("benchmarks/detectors.py", "examples/common/torchvision_detectors.py"),
            *("passes/analysis", "passes/structure", "passes/forms"),
        ),
        kernels=True,
    ),
    ResultsFile(
        "tasks_latency.json",
        "taskset -c 1 python benchmarks/tasks_latency.py",
        ("benchmarks/tasks_latency.py", "benchmarks/convergence/scenes.py", "examples", TIMING, *FORMS),
        kernels=True,
    ),
    ResultsFile(
        "tasks_accuracy.json",
        "SLRC_DATA=~/data python benchmarks/tasks_accuracy.py",
        (
            *("benchmarks/tasks_accuracy.py", "benchmarks/compiles.py", "examples", "passes", "backends"),
            *("slrc/reconstruction", *(f"slrc/{x}" for x in COMPILED)),
        ),
        kernels=True,
    ),
    ResultsFile(
        "torch_target.json",
        "taskset -c 1 python benchmarks/torch_target.py",
        ("benchmarks/torch_target.py", "backends/torch", "passes/structure", TIMING),
    ),
    ResultsFile(
        "gpu_latency.json",
        "python benchmarks/gpu_latency.py",
        ("benchmarks/gpu_latency.py", "benchmarks/gpu_networks.py", "backends/torch", "passes/structure", TIMING),
    ),
    ResultsFile(
        "analysis_growth.json",
        "python benchmarks/analysis_growth.py",
        ("benchmarks/analysis_growth.py", "passes/analysis"),
    ),
    ResultsFile(
        "channel_permutation.json",
        "SLRC_DATA=~/data python benchmarks/channel_permutation.py --accuracy",
        ("benchmarks/channel_permutation.py", "passes/allocation", "slrc/sparsity"),
    ),
    ResultsFile(
        "step_cost.json",
        "python benchmarks/step_cost.py [--fsdp]",
        ("benchmarks/step_cost.py", "slrc/methods", "slrc/sparsity", "slrc/training"),
    ),
    ResultsFile(
        "reconstruct.json",
        "SLRC_DATA=~/data python benchmarks/reconstruct.py NETWORK",
        ("benchmarks/reconstruct.py", "slrc/reconstruction", "slrc/sparsity", "passes/allocation"),
    ),
    ResultsFile(
        "int8.json",
        "SLRC_DATA=~/data python benchmarks/int8.py NETWORK",
        (
            *("benchmarks/int8.py", "benchmarks/reconstruct.py", "passes/quantization", "slrc/quantization"),
            *("slrc/forms/quantize_ops.py", "slrc/forms/quantization.py", "backends/quantized_onnx.py"),
        ),
    ),
    ResultsFile(
        "convergence.jsonl",
        "python benchmarks/convergence/run.py TIER",
        (
            *(f"benchmarks/convergence/{name}.py" for name in ("run", "tasks", "contenders", "other_tasks", "scenes")),
            *("slrc/methods", "slrc/sparsity", "slrc/training"),
        ),
    ),
)


def file_of(script: str) -> ResultsFile:
    """Return the results file that a script writes; they share their stem."""
    return next(file for file in FILES if Path(file.name).stem == Path(script).stem)


def made_with(file: ResultsFile) -> Row:
    """Return what a row measured now is made with: the machine, the versions, and digests of what it depends on."""
    found = environment()
    return {
        "processor": processor() or found["cpu"],
        "instruction_sets": found["instruction_sets"],
        "cores": found["cores"],
        "versions": {name: found["versions"][name] for name in VERSIONS},
        **digests(file),
    }


def digests(file: ResultsFile) -> dict[str, str | None]:
    """Return the digests of the working tree's sources that a file's figures depend on."""
    return {"kernels": sources_digest() if file.kernels else None, "sources": digest_of(file.sources)}


def digest_of(sources: tuple[str, ...]) -> str:
    """Return a name for the content of files and folders, given from the root."""
    digest = sha256()
    for source in sorted(sources):
        path = ROOT / source
        for found in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(found.relative_to(ROOT)).encode() + b"\0" + found.read_bytes())
    return digest.hexdigest()[:16]


def processor() -> str | None:
    """Return the processor's name with its family and model, which tell apart what is sold under one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    if "cpu family" not in fields:
        return None
    return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"


def vectors() -> str:
    """Return the widest vectors of this processor, as keys of rows name them that are measured on several."""
    return "avx512" if "avx512f" in environment()["instruction_sets"] else "avx2"


class Rows:
    """The rows of a results file, by key. What is added is written at once, with what it was made with."""

    def __init__(self, script: str, path: Path | None = None) -> None:
        file = file_of(script)
        self.path = path or file.path
        self.made_with = made_with(file)
        self.rows: dict[str, Row] = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}

    def __getitem__(self, key: str) -> Row:
        return self.rows[key]

    def has(self, key: str) -> bool:
        """Whether there is a row of this processor and these sources, so that it need not be measured."""
        made = self.rows.get(key, {}).get("made_with", {})
        return all(made.get(part) == self.made_with[part] for part in ("processor", "kernels", "sources"))

    def add(self, key: str, row: Row) -> Row:
        """Put a row in the file; an interruption leaves the file as it was."""
        self.rows[key] = row | {"made_with": self.made_with}
        self.path.parent.mkdir(exist_ok=True)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        aside.replace(self.path)
        return self.rows[key]


def rows_of(file: ResultsFile) -> dict[str, Row]:
    """Return a file's rows by key; none where there is no file."""
    if not file.path.exists():
        return {}
    text = file.path.read_text()
    if file.path.suffix == ".jsonl":
        return {row["row"]: row for row in map(json.loads, text.splitlines())}
    return json.loads(text)["rows"]


def state_of(row: Row, now: dict[str, str | None]) -> str:
    """Return `up to date`, or what has changed since a row was measured; `now` are the digests of the tree."""
    made = row.get("made_with", {})
    if not made.get("sources"):
        return "no build recorded"
    changed = [part for part, digest in now.items() if made.get(part) != digest]
    return f"{' and '.join(changed)} changed" if changed else "up to date"


def report() -> Iterator[str]:
    """Yield lines: each file, where its rows were made, how many are out of date and why, and its command."""
    for file in FILES:
        rows, now = rows_of(file), digests(file)
        yield f"{file.name}: {len(rows)} rows; {file.command}"
        groups = Counter(
            (
                row.get("made_with", {}).get("processor", "machine not recorded"),
                row.get("made_with", {}).get("versions", {}).get("slrc", "?"),
                state_of(row, now),
            )
            for row in rows.values()
        )
        for (machine, version, state), count in groups.most_common():
            yield f"    {count:4} {state} ({machine}; slrc {version})"


if __name__ == "__main__":
    print(*report(), sep="\n")
