"""When time is over, work is interrupted: whatever it catches, and leaving all as it was. Time is told by hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from slrc.doctor import deadline as deadlines
from slrc.doctor.deadline import Deadline, Overtime

HOUR = 3600.0


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture(autouse=True)
def leaves_signals_alone() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_left_and_spent(hand: Hand) -> None:
    deadline = Deadline(10.0, hand)
    hand.time = 4.0
    assert (deadline.left, deadline.spent) == (6.0, 4.0)
    assert deadline.within(2.0).left == 2.0
    assert deadline.within(100.0).left == 6.0


def test_a_pause_does_not_count(hand: Hand) -> None:
    deadline = Deadline(10.0, hand)
    hand.time = 1.0
    with suppress(KeyError), deadline.paused():
        hand.time = 31.0
        raise KeyError
    assert (deadline.left, deadline.spent) == (9.0, 1.0)


def enforce(deadline: Deadline, work: Callable[[], None]) -> None:
    with deadline.enforced():
        work()


def test_work_is_interrupted_whatever_it_catches(hand: Hand) -> None:
    def work() -> None:
        while True:
            with suppress(Exception):
                hand.time = HOUR

    with pytest.raises(Overtime):
        enforce(Deadline(0.01, hand), work)


def test_work_that_catches_all_is_interrupted_again(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "AGAIN", 0.01)
    caught = []

    def work() -> None:
        hand.time = HOUR
        try:
            while True:
                pass
        except BaseException:
            caught.append(1)
        while True:
            pass

    with pytest.raises(Overtime):
        enforce(Deadline(0.01, hand), work)
    assert caught == [1]


def test_work_in_time_is_not_interrupted(hand: Hand) -> None:
    with Deadline(0.01, hand).enforced():
        looks = threading.Event()
        assert not looks.wait(0.1)  # the signal comes, and finds that there is time


def test_nothing_is_interrupted_off_the_main_thread(hand: Hand) -> None:
    done = []

    def work() -> None:
        with Deadline(0.0, hand).enforced():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
