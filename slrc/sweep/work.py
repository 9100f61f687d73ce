"""`sweep`: one worker, which takes points until none is left. Any number of them share a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from slrc import api
from slrc.config import CompileConfig
from slrc.errors import OutputError, SlrcError, disk_error
from slrc.load_workload import load_workload
from slrc.methods.settings import MethodName
from slrc.progress import Quiet, Reporter
from slrc.reporting.pareto import ACCEPTED, point_of
from slrc.reporting.report import Report
from slrc.sweep.page import write_sweep_page
from slrc.sweep.points import SweepFolder, SweepPoint, before, identity_of
from slrc.sweep.queue import Claimed, Queue
from slrc.sweep.summary import Summary, summarise
from slrc.training.checkpoints import DISK_ERRORS
from slrc.user_code import first_line
from slrc.workload import Workload
from slrc.workspace import REPORT, RUN

POLL_SECONDS = 5.0
"""How often a worker without a point looks whether another one died."""
DENSE = "dense.safetensors"


def sweep(
    model: str | Workload,
    out: str | Path,
    points: Sequence[SweepPoint],
    *,
    options: Mapping[str, Any] | None = None,
    config_file: Path | None = None,
    storage: str | None = None,
    accepted: float = ACCEPTED,
    retry_failed: bool = False,
    warm_start: bool = False,
    reporter: Reporter | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Summary:
    """Compile every point in a folder of its own below `out`, from one dense start, and report them together.

    The same call goes on with an interrupted sweep, and joins one that other processes are at work on. It returns when
    no point is left.

    Args:
        model: a workload, or what the command line takes for MODEL.
        out: the folder that the workers share.
        points: what to compile. See `parse_points`.
        options: fields of `CompileConfig` for all of them, but for pattern and speed-up.
        config_file: a TOML file with options; those given here win.
        storage: the URL of a database for Optuna; a journal file in `out` by default.
        accepted: the share of the dense metric that a recommended network may lose.
        retry_failed: try points again that failed for a reason that was told.
        warm_start: start each point from the trained weights of the one of its pattern with the next smaller speed-up,
            or, where that has failed, of the one before. It waits for that one.
        reporter: where progress goes.
        sleep: waits for other workers.

    Raises:
        SlrcError: the options, the folder, the storage or the workload cannot be used. What goes wrong with a point
            alone is told in the summary.
    """
    configs = {p.name: p.config(options or {}, config_file) for p in points}
    name, first = _first(model, configs)
    if warm_start:
        first.check_can_start("--warm-start", MethodName.RECONSTRUCT)  # the default for a speed
    folder = SweepFolder(Path(out), identity_of(name, first, points, warm_start))
    worker = _Worker(model, folder, points, configs, storage, accepted, warm_start, reporter or Quiet())
    return worker.run(retry_failed, sleep)


def _first(model: str | Workload, configs: Mapping[str, CompileConfig]) -> tuple[str, CompileConfig]:
    return model if isinstance(model, str) else model.name, next(iter(configs.values()))


class _Worker:
    def __init__(
        self,
        model: str | Workload,
        folder: SweepFolder,
        points: Sequence[SweepPoint],
        configs: Mapping[str, CompileConfig],
        storage: str | None,
        accepted: float,
        warm_start: bool,
        reporter: Reporter,
    ) -> None:
        self.folder, self.points, self.configs, self.warm_start = folder, points, configs, warm_start
        self.accepted, self.reporter = accepted, reporter
        # Before the workload, which may train a dense network.
        self.queue = Queue(folder, points, storage, warm_start=warm_start)
        first = configs[points[0].name]
        self.target = first.target[0]
        set_seed(first.seed)
        self.workload = load_workload(model) if isinstance(model, str) else model
        self.dense = self._keep_dense()

    def run(self, retry_failed: bool, sleep: Callable[[float], object]) -> Summary:
        told: list[str] = []
        while True:
            claimed = self.queue.take(retry_failed=retry_failed)
            retry_failed = False
            if claimed is not None:
                self._work(claimed)
                self._report()
            elif others := self.queue.others_at_work():
                if others != told:
                    self.reporter.note(f"waiting for other workers, who have {', '.join(others)}")
                told = others
                sleep(POLL_SECONDS)
            else:
                return self._report()

    def _work(self, claimed: Claimed) -> None:
        """Compile a point, unless it is done; a run of it that was cut off is gone on with."""
        point, out = claimed.point, self.folder.build(claimed.point)
        self.reporter.note(f"point {point.name}")
        try:
            report = Report.load(out) if (out / REPORT).exists() else self._compile(point, out)
        except Exception as error:  # a bug as well: the other points go on
            why = error.message if isinstance(error, SlrcError) else first_line(error)
            self.reporter.note(f"point {point.name} failed: {why}")
            self.queue.fail(claimed, why)
            return
        place = point_of(point.name, report)
        self.queue.finish(claimed, float("inf") if place.ms is None else place.ms, place.metric)

    def _compile(self, point: SweepPoint, out: Path) -> Report:
        self.workload.model.load_state_dict(self.dense, strict=False)
        unfinished = (out.parent / f"{out.name}.work" / RUN).exists()
        config = self.configs[point.name]
        slower = [p for p in before(point, self.points) if (self.folder.build(p) / REPORT).exists()]
        if self.warm_start and slower:
            self.reporter.note(f"training starts from {slower[0].name}")
            config = config.model_copy(update={"start_from": self.folder.build(slower[0])})
        return api.compile(self.workload, out, config=config, resume=unfinished, reporter=self.reporter)

    def _report(self) -> Summary:
        """Write what is there so far, so that it can be looked at while others are at work."""
        with self.folder.alone():
            found = summarise(
                self.workload.name, self.target, self.folder, self.points, self.queue.failures(), self.accepted
            )
            try:
                found.save(self.folder.root)
                write_sweep_page(found, self.folder.root / "report.html")
            except OSError as error:
                raise disk_error(self.folder.root, error) from error
        return found

    def _keep_dense(self) -> dict[str, Tensor]:
        """Return the weights that all points start from: those of the first worker."""
        path = self.folder.root / DENSE
        state = {n: t.detach().cpu().clone() for n, t in _tensors(self.workload).items()}
        try:
            with self.folder.alone():
                if not path.exists():
                    aside = path.with_suffix(".partial")
                    save_file({n: t.contiguous() for n, t in state.items()}, aside)
                    aside.replace(path)
            kept = load_file(path)
        except DISK_ERRORS as error:
            raise disk_error(path, error) from error
        if {n: t.shape for n, t in kept.items()} != {n: t.shape for n, t in state.items()}:
            raise OutputError(
                f"the model is not the one that the sweep in `{self.folder.root}` started with",
                hint="choose another folder with `--out`",
            )
        return kept


def _tensors(workload: Workload) -> dict[str, Tensor]:
    return {n: t for n, t in workload.model.state_dict().items() if isinstance(t, Tensor)}
