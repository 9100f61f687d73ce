"""Which networks are dominated, and which one is recommended, with its reason."""

from __future__ import annotations

import pytest

from slrc.reporting.pareto import Point, prefers_lower, recommend, with_dominated
from slrc.reporting.plots import pareto_plot


def points(*places: tuple[float | None, float | None]) -> list[Point]:
    """The first one is dense; each `(metric, ms)`."""
    return [
        Point(name="dense" if i == 0 else f"p{i}", kind="ab"[i % 2], metric=metric, ms=ms, is_dense=i == 0)
        for i, (metric, ms) in enumerate(places)
    ]


def test_dominated_points_are_beaten_in_both() -> None:
    marked = with_dominated(points((0.9, 4.0), (0.89, 2.0), (0.88, 2.0), (0.89, 3.0), (0.5, 1.0), (None, 0.1)), "top1")
    assert [p.is_dominated for p in marked] == [False, False, True, True, False, False]


def test_equal_points_do_not_dominate_each_other() -> None:
    assert not any(p.is_dominated for p in with_dominated(points((0.9, 1.0), (0.9, 1.0)), "top1"))


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("perplexity", True), ("val_loss", True), ("word-error", True), ("accuracy", False), ("lossless", False)],
)
def test_some_metrics_are_to_be_small(metric: str, lower: bool) -> None:
    assert prefers_lower(metric) is lower
    better, worse = (10.0, 20.0) if lower else (20.0, 10.0)
    marked = with_dominated(points((better, 1.0), (worse, 2.0)), metric)
    assert [p.is_dominated for p in marked] == [False, True]


def test_the_fastest_that_keeps_the_metric_is_recommended() -> None:
    name, why = recommend(points((0.9, 4.0), (0.899, 2.0), (0.895, 1.6), (0.8, 1.0)), "accuracy")
    assert name == "p2"
    assert "2.50 times as fast" in why
    assert "0.8950 against 0.9000" in why
    assert "what is faster loses more than that" in why
    assert why.count(".") - sum(c.isdigit() for c in why) < 3  # one sentence
    assert recommend(points((0.9, 4.0), (0.899, 2.0)), "accuracy")[1].endswith("nothing is faster.")
    assert recommend(points((20.0, 4.0), (20.1, 2.0), (21.0, 1.0)), "perplexity")[0] == "p1"


def test_the_recommendation_says_the_speed_up_of_the_table() -> None:
    """Each point was timed beside a dense network of its own, which on a target in int8 is in int8."""
    dense, point = points((0.9, 4.0), (0.899, 2.0))
    own = point.model_copy(update={"speedup": 1.96})
    assert "it runs 1.96 times as fast as the dense network, in 2.000 ms" in recommend([dense, own], "accuracy")[1]
    rounded = recommend([dense, own], "accuracy", over="the dense network in int8")[1]
    assert "1.96 times as fast as the dense network in int8, in" in rounded
    alone = recommend([dense, point], "accuracy", over="the dense network in int8")[1]
    assert "2.00 times as fast as the dense network, in" in alone


def test_none_is_recommended_where_all_lose_too_much_or_are_slower() -> None:
    name, why = recommend(points((0.9, 4.0), (0.8, 2.0), (0.85, 3.0)), "accuracy")
    assert name is None
    assert why.startswith("Stay with the dense network")
    assert "p2, reaches 0.8500" in why
    assert recommend(points((0.9, 4.0), (0.9, 5.0)), "accuracy")[0] is None
    assert recommend(points((0.9, 4.0), (0.8, 2.0)), "accuracy", accepted=0.2)[0] == "p1"


def test_nothing_is_recommended_without_figures() -> None:
    for given in (points((None, 4.0), (0.8, 2.0)), points((0.9, 4.0), (0.9, None)), points((0.9, 4.0))):
        assert recommend(given, "accuracy") == (None, recommend(given, "accuracy")[1])
        assert "Nothing is recommended" in recommend(given, "accuracy")[1]


def test_the_plot_greys_what_is_dominated_and_numbers_all() -> None:
    marked = with_dominated(points((0.9, 4.0), (0.89, 2.0), (0.88, 3.0), (None, 1.0)), "accuracy")
    svg = pareto_plot(marked, "accuracy")
    assert svg == pareto_plot(marked, "accuracy")
    assert 'aria-label="accuracy against milliseconds of 3 networks"' in svg
    assert "var(--muted)" in svg
    for number in "012":
        assert f">{number}</text>" in svg
    assert pareto_plot(marked[:1], "accuracy") == ""
