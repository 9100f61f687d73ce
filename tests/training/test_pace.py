"""How fast training is, by a made-up clock."""

from __future__ import annotations

from slrc.training.checkpoints import Timer
from slrc.training.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_samples_a_second_and_the_time_that_is_left() -> None:
    clock = Clock()
    pace = Pace(1000, processes=2, now=clock)
    assert str(pace) == ""
    for _ in range(10):
        clock.seconds += 2.0
        pace.step(32)
    assert str(pace) == "32 samples/s, 0:33:00 to go"


def test_few_samples_a_second_are_told_with_a_tenth() -> None:
    clock = Clock()
    pace = Pace(3, now=clock)
    clock.seconds = 5.0
    pace.step(8)
    assert str(pace) == "1.6 samples/s, 0:00:10 to go"


def test_a_clock_that_stands_still_says_nothing() -> None:
    pace = Pace(10, now=Clock())
    pace.step(8)
    assert str(pace) == ""


def test_a_checkpoint_is_due_after_its_minutes() -> None:
    clock = Clock()
    timer = Timer(2, clock)
    clock.seconds = 119.0
    assert not timer.is_due
    clock.seconds = 120.0
    assert timer.is_due
    timer.restart()
    assert not timer.is_due
    assert Timer(0, clock).is_due
