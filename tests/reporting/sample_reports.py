"""A report to show, and a reader of the pages that show it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from slrc.measuring.timing import Latency, Percentiles
from slrc.methods.base import Iteration
from slrc.reporting.report import Accuracy, LayerSparsity, Pair, Report, Sparsity, TargetResult
from slrc.training.checkpoints import EpochRecord
from slrc.training.steps import StepCost
from slrc.verify import Check

VOID = {"meta", "link", "br", "hr", "img", "input", "area", "base", "col", "source", "wbr", "embed"}


class Page(HTMLParser):
    """Collects text, ids, addresses and unbalanced tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str | None] = []
        self.addresses: list[str | None] = []
        self.text = ""
        self.feed(page)
        self.close()
        self.faults += self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def make_report(**changes: Any) -> Report:
    """Return a report of a compile that never was, with other values for some fields."""
    fields = {
        "model": "net <b>&",
        "pattern": "channel",
        "method": "slr",
        "sparsity": Sparsity(asked=0.5, reached=0.4987),
        "accuracy": Accuracy(metric="accuracy", dense=0.91, hard_pruned=0.85, final=0.905),
        "params": Pair(dense=381_258, compiled=95_914),
        "macs": Pair(dense=16_852_224, compiled=4_231_808),
        "size_bytes": Pair(dense=1_563_630, compiled=422_219),
        "latency": (
            Latency(
                target="ort",
                threads=1,
                batch=8,
                dense_ms=Percentiles(p50=2.0, p90=2.25),
                compiled_ms=Percentiles(p50=0.8, p90=0.875),
                speedup=2.5,
                speedup_spread=(2.25, 2.75),
                runs=1000,
            ),
        ),
        "checks": (
            Check(step="eager = captured", max_abs_error=0, max_rel_error=0, tolerance=1e-4, passed=True),
            Check(step="slim <i>= ort", max_abs_error=3e-7, max_rel_error=2e-8, tolerance=1e-4, passed=True),
        ),
        "history": tuple(
            Iteration(
                k=k,
                loss=1 / k,
                lagrangian=10.0 ** (3 - k) - 0.01,
                accepted_loss=k != 2,
                accepted_projection=True,
                step_size=0.1 / k,
                residual=3 / k,
                multiplier_norm=1,
            )
            for k in range(1, 5)
        ),
        "curve": (
            EpochRecord(phase="slr", epoch=0, loss=None, metric=0.91, hard_pruned=0.1, seconds=0),
            EpochRecord(phase="slr", epoch=1, loss=0.3, metric=0.9, hard_pruned=0.8, seconds=1),
            EpochRecord(phase="retrain", epoch=1, loss=0.2, metric=0.9, hard_pruned=None, seconds=1),
        ),
        "training": StepCost(
            steps=96, step_ms=12.34, distillation=0.331, method=0.012, peak_mb=1234.5, teacher_mb=1.5, method_mb=2.25
        ),
        "layers": (LayerSparsity(name="a<script>$x$", pattern="channel", groups=32, kept=8, weights=9632),),
        "targets": (
            TargetResult(
                target="ort", folder="ort", size_bytes=Pair(dense=1_563_630, compiled=422_219), precision="float32"
            ),
        ),
        "notes": ("no rule for <op> & co: pinned",),
        "config": {"slr": {"rho": 0.125}, "skip": []},
        "environment": {"cpu": "Some <CPU>", "gpu": None},
    }
    return Report(**fields | changes)
