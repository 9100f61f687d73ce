"""Networks of one task beside each other: which are dominated, and which to take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from slrc.reporting.report import Report

LOWER_IS_BETTER = frozenset({"loss", "error", "perplexity", "ppl", "mae", "mse", "rmse", "wer", "cer", "fid", "nll"})
"""Words in the names of metrics that are to be small; all others are to be large."""
ACCEPTED = 0.01


class Point(BaseModel):
    """A network's metric and milliseconds; `None` where one was not measured. `kind` is what it is marked by.

    `speedup` is over the dense network that was timed beside it, if one was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str = ""
    metric: float | None
    ms: float | None
    speedup: float | None = None
    is_dense: bool = False
    is_dominated: bool = False


def prefers_lower(metric: str) -> bool:
    """Whether a metric of this name is to be small."""
    return not LOWER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", metric.lower()))


def point_of(name: str, report: Report) -> Point:
    """Return a compile's point, on its first target."""
    return Point(
        name=name,
        kind=report.pattern,
        metric=report.accuracy.final if report.accuracy else None,
        ms=report.latency[0].compiled_ms.p50 if report.latency else None,
        speedup=report.latency[0].speedup if report.latency else None,
    )


def with_dominated(points: Sequence[Point], metric: str) -> list[Point]:
    """Return the points, those marked than which another is at least as good in both, and better in one."""
    sign = 1.0 if prefers_lower(metric) else -1.0

    def costs(p: Point) -> tuple[float, float] | None:
        return None if p.metric is None or p.ms is None else (sign * p.metric, p.ms)

    known = [c for p in points if (c := costs(p)) is not None]
    marked = []
    for p in points:
        own = costs(p)
        beaten = own is not None and any(c[0] <= own[0] and c[1] <= own[1] and c != own for c in known)
        marked.append(p.model_copy(update={"is_dominated": beaten}))
    return marked


def recommend(
    points: Sequence[Point], metric: str, accepted: float = ACCEPTED, over: str = "the dense network"
) -> tuple[str | None, str]:
    """Return the name of the network to take, and why, in one sentence.

    It is the fastest of those that lose no more than a share of the dense network's metric; where all lose more, the
    dense one stays.

    Args:
        points: the dense one among them.
        metric: its name.
        accepted: the share that may be lost.
        over: what the points' own speed-ups are over.
    """
    dense = next((p for p in points if p.is_dense), None)
    measured = [p for p in points if not p.is_dense and p.metric is not None and p.ms is not None]
    if dense is None or dense.metric is None or dense.ms is None or not measured:
        return None, "Nothing is recommended: an accuracy and a latency are needed, of the dense network and another."
    sign = 1.0 if prefers_lower(metric) else -1.0

    def lost(p: Point) -> float:
        assert p.metric is not None
        assert dense is not None
        assert dense.metric is not None
        return sign * (p.metric - dense.metric)

    allowed = accepted * abs(dense.metric)
    good = [p for p in measured if lost(p) <= allowed and (p.ms or 0.0) < dense.ms]
    if not good:
        nearest = min(measured, key=lost)
        return None, (
            f"Stay with the dense network: none that is faster keeps within {accepted:.0%} of its {metric} of "
            f"{dense.metric:.4f}, and the nearest, {nearest.name}, reaches {nearest.metric:.4f}."
        )
    best = min(good, key=lambda p: (p.ms or 0.0, lost(p)))
    assert best.ms is not None
    faster = sum((p.ms or 0.0) < best.ms for p in measured)
    why = "nothing is faster" if not faster else "what is faster loses more than that"
    speedup, than = (best.speedup, over) if best.speedup else (dense.ms / best.ms, "the dense network")
    return best.name, (
        f"Take {best.name}: it runs {speedup:.2f} times as fast as {than}, in {best.ms:.3f} ms, "
        f"keeps within {accepted:.0%} of the dense {metric}, {best.metric:.4f} against {dense.metric:.4f}, and {why}."
    )
