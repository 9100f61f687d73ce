"""`LatencyTable`: what each part of a program costs on a target, and what a slim program will cost there.

The table holds the measured latency of every segment, a layer or product with the operators after it, at a few widths
of the whole network, and of the whole network at the same widths and wherever else it was measured. In between, a
segment's latency follows its multiply-accumulates, and the whole follows the sum of its segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from slrc.errors import OutputError

MARGIN = 0.02
"""Of the dense latency: times that are measured anew differ by about so much."""
MOST_LAYERS = 6
"""How many layers an error names."""


def nearest_budget(reached: float) -> str:
    """Return what to ask for where no less than a share of the dense latency can be reached, as options."""
    share = min(0.99, math.ceil(round((reached + MARGIN) * 100, 6)) / 100)
    return f"`--latency-budget {share:.2f}` or more, which is `--speedup {math.floor(100 / share) / 100:.2f}` or less"


def told_layers(rows: Sequence[tuple[str, float, float]]) -> str:
    """Return what layers take dense and at their fastest, by name, those that stay slowest first, the rest as one."""
    slowest = sorted(rows, key=lambda row: row[2], reverse=True)
    said = [f"`{name}` {dense:.3f} to {least:.3f} ms" for name, dense, least in slowest[:MOST_LAYERS]]
    if others := slowest[MOST_LAYERS:]:
        said.append(f"{len(others)} more {sum(row[1] for row in others):.3f} to {sum(row[2] for row in others):.3f} ms")
    return "; ".join(said)


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SegmentLatency(_Data):
    """One segment: its multiply-accumulates and milliseconds at each of the table's widths."""

    name: str
    macs: tuple[int, ...]
    ms: tuple[float, ...]


class WholeLatency(_Data):
    """The whole network at some widths, and the sum of its segments at those."""

    segments_ms: float
    ms: float


class LatencyTable(_Data):
    """Latency on one target; the first entry of every list is the dense network."""

    target: str
    threads: int
    machine: str
    segments: tuple[SegmentLatency, ...]
    whole: tuple[WholeLatency, ...]

    def segment_ms(self, k: int, macs: float) -> float:
        """Return the latency of one segment with so many multiply-accumulates."""
        return interpolate(macs, self.segments[k].macs, self.segments[k].ms)

    def share(self, segments_ms: float) -> float:
        """Return the share of the dense latency that goes with a sum over segments."""
        sums, ms = [w.segments_ms for w in self.whole], [w.ms for w in self.whole]
        least = min(sums)
        if segments_ms < least:
            return self.share(least) * segments_ms / least
        return interpolate(segments_ms, sums, ms) / interpolate(sums[0], sums, ms)

    def budget_ms(self, share: float) -> float:
        """Return the greatest sum over segments that goes with a share of the dense latency."""
        low, high = 0.0, self.whole[0].segments_ms
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(middle) <= share else (low, middle)
        return low

    def with_whole(self, segments_ms: float, share: float) -> LatencyTable:
        """Return the table with one more measurement of the whole, given as a share of the dense latency."""
        point = WholeLatency(segments_ms=segments_ms, ms=share * self.whole[0].ms)
        return self.model_copy(update={"whole": (*self.whole, point)})

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            OutputError: the file cannot be read or does not have a table's fields.
        """
        try:
            return LatencyTable.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"latency table `{path}` cannot be read: {error}") from None
        except ValidationError as error:
            raise OutputError(f"latency table `{path}`: {error.errors()[0]['msg']}") from None


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Between the nearest of the measured points, which rise by necessity: less work never takes longer."""
    order = np.argsort(xs, kind="stable")
    rising: NDArray[np.float64] = np.maximum.accumulate(np.asarray(ys, dtype=float)[order])
    return float(np.interp(x, np.asarray(xs, dtype=float)[order], rising))
