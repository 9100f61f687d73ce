"""What a latency table says between its measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrc.errors import OutputError
from slrc.measuring.latency_table import LatencyTable, SegmentLatency, WholeLatency, nearest_budget


def table(noise: float = 0.0) -> LatencyTable:
    """Two segments of 1 ms per 100 multiply-accumulates and a runtime that adds half a millisecond to the whole."""
    macs = (400, 100, 25)
    one = SegmentLatency(name="a", macs=macs, ms=(4.0, 1.0, 0.25 + noise))
    two = SegmentLatency(name="b", macs=macs, ms=(4.0, 1.0, 0.25))
    whole = tuple(WholeLatency(segments_ms=s, ms=s + 0.5) for s in (8.0, 2.0, 0.5 + noise))
    return LatencyTable(target="ort", threads=1, machine="here", segments=(one, two), whole=whole)


def test_measured_points_are_reproduced() -> None:
    assert table().share(8.0) == 1.0
    assert table().share(2.0) == pytest.approx(2.5 / 8.5)
    assert table().segment_ms(0, 100) == 1.0
    assert table().segment_ms(1, 250) == pytest.approx(2.5)


def test_below_the_least_measured_width_the_whole_shrinks_with_its_segments() -> None:
    assert table().share(0.25) == pytest.approx(table().share(0.5) / 2)


def test_a_measurement_of_the_whole_corrects_the_table() -> None:
    corrected = table().with_whole(4.0, 0.7)
    assert corrected.share(4.0) == pytest.approx(0.7)
    assert corrected.share(8.0) == 1.0
    assert table().share(4.0) < 0.7


@settings(deadline=None, derandomize=True)
@given(a=st.floats(0, 10), b=st.floats(0, 10), noise=st.floats(0, 5))
def test_less_work_never_takes_longer(a: float, b: float, noise: float) -> None:
    low, high = sorted((a, b))
    noisy = table(noise)
    assert noisy.share(low) <= noisy.share(high) + 1e-9
    assert noisy.segment_ms(0, low * 50) <= noisy.segment_ms(0, high * 50) + 1e-9


@settings(deadline=None, derandomize=True)
@given(share=st.floats(0.01, 0.99))
def test_the_budget_is_the_greatest_sum_that_meets_the_share(share: float) -> None:
    ms = table().budget_ms(share)
    assert table().share(ms) <= share + 1e-6
    assert table().share(ms + 1e-3) > share


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table().save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table()


@pytest.mark.parametrize("text", ["", "{}", '{"target": 1}'])
def test_a_damaged_table_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(OutputError, match=r"table\.json"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("reached", "share", "speedup"), [(0.55, "0.57", "1.75"), (0.603, "0.63", "1.58"), (0.98, "0.99", "1.01")]
)
def test_what_to_ask_for_leaves_room_for_other_times(reached: float, share: str, speedup: str) -> None:
    said = nearest_budget(reached)
    assert said == f"`--latency-budget {share}` or more, which is `--speedup {speedup}` or less"
    assert 1 / float(speedup) >= float(share)
