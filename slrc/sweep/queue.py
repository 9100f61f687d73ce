"""Who works on which point: an Optuna study, which workers on one or several machines share.

Every point is a trial that waits, runs, is complete or has failed. What a worker died of cannot be told to the study,
so that its trial goes on "running": it is told from one that is worked on by the point's claim in the shared folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slrc.errors import OutputError
from slrc.sweep.points import SweepFolder, SweepPoint, before
from slrc.workspace import REPORT

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

POINT, WHY = "point", "why"
JOURNAL = "journal.log"


class Claimed(NamedTuple):
    """A point that is this worker's, until `release`."""

    point: SweepPoint
    trial: Trial
    claim: Any


class Queue:
    """The points of a sweep, shared out.

    Args:
        folder: of the sweep.
        points: all of them.
        storage: the URL of a database that Optuna can use; a journal file in the folder by default.
        warm_start: whether a point has to wait until those that it could start from are built, or have failed for good.

    Raises:
        OutputError: Optuna is not installed, or its storage cannot be used.
    """

    def __init__(
        self, folder: SweepFolder, points: Sequence[SweepPoint], storage: str | None, *, warm_start: bool = False
    ) -> None:
        self._folder, self._points, self._warm_start = folder, {p.name: p for p in points}, warm_start
        self._study = _open_study(folder, storage)

    def take(self, *, retry_failed: bool = False) -> Claimed | None:
        """Return a point that nobody works on; `None` where there is none now."""
        from optuna.trial import TrialState

        with self._folder.alone():
            self._enqueue_missing(retry_failed)
            for _ in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                trial = self._study.ask()
                point = self._points.get(str(trial.user_attrs.get(POINT)))
                claim = self._folder.claim(point) if point else None
                if point is None or claim is None:  # of another worker's points, or a trial that was enqueued twice
                    self._study.tell(trial, state=TrialState.FAIL)
                    continue
                return Claimed(point, trial, claim)
        return None

    def finish(self, claimed: Claimed, ms: float, metric: float | None) -> None:
        """Say what a point reached."""
        claimed.trial.set_user_attr("metric", metric)
        self._study.tell(claimed.trial, ms)
        claimed.claim.release()

    def fail(self, claimed: Claimed, why: str) -> None:
        """Say why a point cannot be had: it is not tried again unless somebody asks for that."""
        from optuna.trial import TrialState

        claimed.trial.set_user_attr(WHY, why)
        self._study.tell(claimed.trial, state=TrialState.FAIL)
        claimed.claim.release()

    def failures(self) -> dict[str, str]:
        """Return why points have failed for good, by their names."""
        return {name: trial.user_attrs[WHY] for name, trial in self._last().items() if WHY in trial.user_attrs}

    def others_at_work(self) -> list[str]:
        """Return the names of points that other workers have."""
        return [name for name, point in self._points.items() if self._folder.is_claimed(point)]

    def _enqueue_missing(self, retry_failed: bool) -> None:
        """Let every point wait that is not built, not failed for good, not waiting, not worked on, and can start."""
        from optuna.trial import TrialState

        last = self._last()
        for name, point in self._points.items():
            slower = before(point, self._points.values()) if self._warm_start else []
            if not all(self._is_over(p, last, retry_failed) for p in slower):
                continue
            trial = last.get(name)
            if trial is not None:
                if trial.state is TrialState.WAITING or (trial.state is TrialState.COMPLETE and self._is_built(point)):
                    continue
                if trial.state is TrialState.RUNNING:
                    if self._folder.is_claimed(point):
                        continue
                    self._study.tell(trial.number, state=TrialState.FAIL)  # its worker died
                elif WHY in trial.user_attrs and not retry_failed:
                    continue
            self._study.enqueue_trial({}, user_attrs={POINT: name})

    def _is_over(self, point: SweepPoint, last: Mapping[str, FrozenTrial], retry_failed: bool) -> bool:
        """Whether a point is built, or has failed and is not to be tried again."""
        has_failed = point.name in last and WHY in last[point.name].user_attrs
        return self._is_built(point) or (has_failed and not retry_failed)

    def _is_built(self, point: SweepPoint) -> bool:
        return (self._folder.build(point) / REPORT).exists()

    def _last(self) -> dict[str, FrozenTrial]:
        """Return the newest trial of every point."""
        return {str(t.user_attrs[POINT]): t for t in self._study.get_trials(deepcopy=False) if POINT in t.user_attrs}


def _open_study(folder: SweepFolder, storage: str | None) -> Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise OutputError(
            "`slrc sweep` needs Optuna, which is not installed", hint="pip install 'slrc[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with folder.alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental classes
            place = storage or JournalStorage(JournalFileBackend(str(folder.root / JOURNAL)))
            return optuna.create_study(
                storage=place,
                study_name=folder.study,
                sampler=optuna.samplers.RandomSampler(),
                load_if_exists=True,
            )
    except Exception as error:  # whatever a database's client raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OutputError(
            f"the sweep's storage `{storage or folder.root / JOURNAL}` cannot be used: {first}",
            hint="`--storage` takes what Optuna does, such as `postgresql://user@host/name`, with its client installed",
        ) from error
