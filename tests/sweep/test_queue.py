"""Who works on which point: workers that live, that died, and points that failed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from slrc.errors import ConfigError, OutputError, PatternError
from slrc.sweep.points import SweepFolder, SweepPoint, parse_points
from slrc.sweep.queue import Claimed, Queue

pytest.importorskip("optuna")
POINTS = parse_points("channel,block:8x1", "2")
IDENTITY = {"model": "net", "seed": 0}


def queue(
    root: Path, points: list[SweepPoint] | None = None, storage: str | None = None, warm_start: bool = False
) -> Queue:
    return Queue(SweepFolder(root, IDENTITY), points or POINTS, storage, warm_start=warm_start)


def finish(worker: Queue, claimed: Claimed | None, root: Path) -> None:
    assert claimed is not None
    build = root / claimed.point.name
    build.mkdir()
    (build / "report.json").write_text("{}")
    worker.finish(claimed, 1.0, 0.5)


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return None if request.param == "journal" else f"sqlite:///{tmp_path / 'points.db'}"


def test_two_workers_share_the_points(tmp_path: Path, storage: str | None) -> None:
    one, two = (queue(tmp_path / "sweep", storage=storage) for _ in range(2))
    first, second = one.take(), two.take()
    assert first is not None
    assert second is not None
    assert [first.point.name, second.point.name] == ["channel-2x", "block-8x1-2x"]
    assert one.take() is None
    assert two.others_at_work() == ["channel-2x", "block-8x1-2x"]
    finish(one, first, tmp_path / "sweep")
    finish(two, second, tmp_path / "sweep")
    assert one.take() is two.take() is None
    assert not one.others_at_work()


def test_the_point_of_a_worker_that_died_is_taken_up_again(tmp_path: Path) -> None:
    dead = queue(tmp_path).take()
    assert dead is not None
    other = queue(tmp_path)
    second = other.take()
    assert second is not None
    assert other.take() is None
    dead.claim.release()  # as the system does when the process ends, however it does
    again = other.take()
    assert again is not None
    assert again.point == dead.point
    assert other.take() is None
    finish(other, again, tmp_path)
    finish(other, second, tmp_path)
    assert queue(tmp_path).take() is None


def test_a_point_waits_for_what_it_starts_from(tmp_path: Path) -> None:
    points = parse_points("channel,block:8x1", "2,3,5")
    one, two = (queue(tmp_path, points, warm_start=True) for _ in range(2))

    def take(worker: Queue, name: str, **options: bool) -> Claimed:
        taken = worker.take(**options)
        assert taken is not None
        assert taken.point.name == name
        return taken

    channel, block = take(one, "channel-2x"), take(two, "block-8x1-2x")
    assert one.take() is two.take() is None
    finish(one, channel, tmp_path)
    channel = take(one, "channel-3x")
    assert one.take() is None
    two.fail(block, "out of reach")
    block = take(two, "block-8x1-3x")  # what has failed for good is not waited for
    assert one.take() is two.take() is None
    block.claim.release()  # its worker dies
    finish(one, channel, tmp_path)
    block, channel = take(one, "block-8x1-3x"), take(two, "channel-5x")
    assert one.take() is None
    two.fail(channel, "a bug")
    one.fail(block, "a bug")
    block, channel = take(one, "block-8x1-2x", retry_failed=True), take(two, "channel-5x")
    assert one.take() is two.take() is None  # it waits for what is tried again
    finish(one, block, tmp_path)
    finish(two, channel, tmp_path)
    assert take(two, "block-8x1-5x").claim.is_locked


def test_a_point_that_failed_is_tried_again_only_if_asked(tmp_path: Path) -> None:
    one = queue(tmp_path, POINTS[:1])
    taken = one.take()
    assert taken is not None
    one.fail(taken, "out of reach")
    assert one.take() is None
    assert queue(tmp_path).failures() == {"channel-2x": "out of reach"}
    again = queue(tmp_path, POINTS[:1]).take(retry_failed=True)
    assert again is not None
    assert again.point == taken.point


def test_points_may_be_added_and_only_those_asked_for_are_taken(tmp_path: Path) -> None:
    one = queue(tmp_path, POINTS[:1])
    finish(one, one.take(), tmp_path)
    more = queue(tmp_path, POINTS)
    added = more.take()
    assert added is not None
    assert added.point.name == "block-8x1-2x"
    assert more.take() is None


def test_a_build_that_was_removed_is_made_again(tmp_path: Path) -> None:
    one = queue(tmp_path, POINTS[:1])
    finish(one, one.take(), tmp_path)
    assert one.take() is None
    shutil.rmtree(tmp_path / POINTS[0].name)
    again = one.take()
    assert again is not None
    assert again.point == POINTS[0]


def test_a_storage_that_cannot_be_used_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"storage `nosuch://host` cannot be used"):
        queue(tmp_path, storage="nosuch://host")


def test_points_from_text() -> None:
    names = [p.name for p in parse_points(" block:8x1, channel,auto,channel", "3,1.5,3")]
    assert names == ["block-8x1-1.5x", "channel-1.5x", "auto-1.5x", "block-8x1-3x", "channel-3x", "auto-3x"]


@pytest.mark.parametrize(
    ("patterns", "speedups"), [("channel", "1,2"), ("channel", "fast"), ("", "2"), ("channel", "")]
)
def test_points_that_cannot_be(patterns: str, speedups: str) -> None:
    with pytest.raises(ConfigError, match="speed-ups above 1"):
        parse_points(patterns, speedups)


def test_an_unknown_pattern() -> None:
    with pytest.raises(PatternError):
        parse_points("chanel", "2")


def test_a_folder_of_something_else_or_of_other_options(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is no sweep"):
        SweepFolder(tmp_path, IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    root = tmp_path / "sweep"
    study = SweepFolder(root, IDENTITY).study
    assert SweepFolder(root, IDENTITY).study == study
    other: dict[str, Any] = {**IDENTITY, "seed": 1}
    with pytest.raises(OutputError, match="`seed` was 0, now 1"):
        SweepFolder(root, other)
    (root / "sweep.json").write_text("{")
    with pytest.raises(OutputError, match=r"sweep\.json` cannot be read"):
        SweepFolder(root, IDENTITY)
