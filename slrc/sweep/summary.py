"""What a sweep found so far, as data: every point beside the dense network, and which one to take."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from slrc.errors import OutputError
from slrc.reporting.pareto import Point, point_of, recommend, with_dominated
from slrc.reporting.report import Report
from slrc.sweep.points import SweepFolder, SweepPoint

SUMMARY_SCHEMA_VERSION: Final = 1
SUMMARY = "summary.json"
DENSE, DENSE_INT8 = "dense", "dense-int8"


class State(StrEnum):
    """How far a point is."""

    DONE = "done"
    AT_WORK = "at work"
    WAITING = "waiting"
    FAILED = "failed"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Figures(_Data):
    """A network's metric, milliseconds and size; `None` for what was not measured."""

    metric: float | None = None
    ms: float | None = None
    size_bytes: int | None = None


class Row(_Data):
    """One point; figures are `None` until it is done. `why` says why it failed.

    `epochs` are those of training, whatever the method; one that was not whole counts. `start` is the point whose
    trained weights it started from; empty for the dense weights.
    """

    name: str
    pattern: str
    speedup_asked: float
    state: State
    why: str = ""
    start: str = ""
    method: str = ""
    epochs: int | None = None
    metric: float | None = None
    ms: float | None = None
    speedup: float | None = None
    speedup_spread: tuple[float, float] | None = None
    size_bytes: int | None = None
    sparsity: float | None = None
    is_dominated: bool = False


class Summary(_Data):
    """A sweep: what is common to its points, the points, and the recommendation.

    `dense` is in float32. On an int8 target the points are in int8, and `dense_int8` is what is there without pruning.
    """

    schema_version: Literal[1] = SUMMARY_SCHEMA_VERSION
    model: str
    target: str
    threads: int | None
    metric: str
    dense: Figures
    dense_int8: Figures | None
    rows: tuple[Row, ...]
    recommended: str | None
    recommendation: str

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return all(row.state in (State.DONE, State.FAILED) for row in self.rows)

    @property
    def points(self) -> list[Point]:
        """The dense networks, then the points in order, as they are drawn."""
        found = [Point(name=DENSE, metric=self.dense.metric, ms=self.dense.ms, is_dense=True)]
        if (dense := self.dense_int8) is not None:
            found.append(Point(name=DENSE_INT8, kind=DENSE_INT8, metric=dense.metric, ms=dense.ms))
        found += [Point(name=r.name, kind=r.pattern, metric=r.metric, ms=r.ms, speedup=r.speedup) for r in self.rows]
        return with_dominated(found, self.metric)

    def save(self, folder: Path) -> None:
        """Write `summary.json`, whole or not at all."""
        aside = folder / f"{SUMMARY}.partial"
        aside.write_text(self.model_dump_json(indent=1) + "\n")
        aside.replace(folder / SUMMARY)


def summarise(
    model: str,
    target: str,
    folder: SweepFolder,
    points: Sequence[SweepPoint],
    failures: Mapping[str, str],
    accepted: float,
) -> Summary:
    """Read what the points' compiles have reported.

    The dense networks' milliseconds are the median over the points' reports, each of which timed them anew. A point's
    are those of the dense network that it was timed in turns with, by that median, over its speed-up: how fast the
    machine happened to be at the time of a point does not move it among the others.

    Args:
        model: its name.
        target: the first one.
        folder: of the sweep.
        points: all of them.
        failures: why points failed, by their names.
        accepted: the share of the dense metric that a recommended network may lose.
    """
    reports = {p.name: report for p in points if (report := _report(folder.build(p))) is not None}
    metric = next((r.accuracy.metric for r in reports.values() if r.accuracy), "")
    timed = [r.latency[0] for r in reports.values() if r.latency]
    dense = _dense_corner(reports.values(), "float32") or _dense(reports.values())
    dense_int8 = _dense_corner(reports.values(), "int8")
    timed_with = (dense_int8 or dense).ms
    found = Summary(
        model=model,
        target=target,
        threads=timed[0].threads if timed else None,
        metric=metric,
        dense=dense,
        dense_int8=dense_int8,
        rows=tuple(_row(p, folder, reports.get(p.name), failures.get(p.name, ""), timed_with) for p in points),
        recommended=None,
        recommendation="",
    )
    dominated = {p.name for p in found.points if p.is_dominated}
    over = "the dense network" if found.dense_int8 is None else "the dense network in int8"
    name, why = recommend(found.points, metric or "accuracy", accepted, over)
    rows = tuple(row.model_copy(update={"is_dominated": row.name in dominated}) for row in found.rows)
    return found.model_copy(update={"rows": rows, "recommended": name, "recommendation": why})


def _row(point: SweepPoint, folder: SweepFolder, report: Report | None, why: str, dense_ms: float | None) -> Row:
    row = Row(name=point.name, pattern=point.pattern, speedup_asked=point.speedup, state=State.WAITING)
    if report is None:
        state = State.FAILED if why else State.AT_WORK if folder.is_claimed(point) else State.WAITING
        return row.model_copy(update={"state": state, "why": why})
    latency = report.latency[0] if report.latency else None
    return row.model_copy(
        update={
            "state": State.DONE,
            "start": Path(report.config.get("start_from") or "").name,
            "method": report.method,
            "epochs": sum(epoch.loss is not None for epoch in report.curve),
            "metric": point_of(point.name, report).metric,
            "ms": dense_ms / latency.speedup if latency and dense_ms else None,
            "speedup": latency.speedup if latency else None,
            "speedup_spread": latency.speedup_spread if latency else None,
            "size_bytes": report.size_bytes.compiled,
            "sparsity": report.sparsity.reached,
        }
    )


def _dense(reports: Iterable[Report]) -> Figures:
    """Return the dense network's figures, where the first target is not in int8."""
    found = [
        Figures(
            metric=r.accuracy.dense if r.accuracy else None,
            ms=r.latency[0].dense_ms.p50 if r.latency else None,
            size_bytes=r.size_bytes.dense,
        )
        for r in reports
    ]
    return _together(found)


def _dense_corner(reports: Iterable[Report], precision: str) -> Figures | None:
    """Return the dense network's figures in a precision, where the first target is in int8."""
    int8 = [r.targets[0].int8 for r in reports if r.targets]
    found = [
        Figures(metric=c.metric, ms=c.latency_ms.p50 if c.latency_ms else None, size_bytes=c.size_bytes)
        for result in int8
        if result is not None
        for c in result.corners
        if (c.model, c.precision) == (DENSE, precision)
    ]
    return _together(found) if found else None


def _together(found: Sequence[Figures]) -> Figures:
    """Return one network's figures out of those of several reports."""
    ms = [x.ms for x in found if x.ms is not None]
    return Figures(
        metric=next((x.metric for x in found if x.metric is not None), None),
        ms=statistics.median(ms) if ms else None,
        size_bytes=next((x.size_bytes for x in found), None),
    )


def _report(build: Path) -> Report | None:
    try:
        return Report.load(build)
    except OutputError:
        return None
