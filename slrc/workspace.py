"""The output folder: written aside, then renamed; an interrupted run can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slrc.errors import OutputError, disk_error
from slrc.machine.lock import take_lock
from slrc.sparsity.plans import Plan
from slrc.training.checkpoints import DISK_ERRORS
from slrc.training.trained import WEIGHTS

REPORT = "report.json"
RUN = "run.json"
DEPLOYED = "device.json"
"""What `slrc deploy` brought back, in the output that it deployed."""
WRITTEN = frozenset(
    {
        *(REPORT, DEPLOYED, "report.html", "plan.json", "masks.safetensors", WEIGHTS, "inputs.safetensors"),
        *("model.pt2", "program"),
    }
)
"""What an output holds besides a folder for each target."""
LOCK = "lock"


class Workspace:
    """Everything a run writes lies in `<out>.work` until `publish` renames the result to `<out>`.

    Args:
        out: the folder that the user asked for.
        run: what identifies the run: the model and the options, as JSON values.
        resume: go on with an unfinished run.
        overwrite: throw an unfinished run away.
        restarted: the launcher started this run anew, and nobody else: it goes on, or begins if it had not.
        leads: whether this process writes; in a distributed run one does, and the others come after it.

    Raises:
        OutputError: the folder holds something else, another run is at work in it, an unfinished run is in the way, or
            there is none to resume.
    """

    def __init__(
        self,
        out: Path,
        run: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        restarted: bool = False,
        leads: bool = True,
    ) -> None:
        self.out = out.resolve()
        self.work = self.out.parent / f"{self.out.name}.work"
        self.resumed = resume or restarted
        self.leads = leads
        self._lock: BaseFileLock | None = None
        if leads:
            self._open(out, run, resume or (restarted and self._read_run() is not None), overwrite)

    def _open(self, out: Path, run: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        if self.out.exists():
            if not _is_ours(self.out):
                raise _foreign(out)
            if added := _added(self.out):
                raise OutputError(
                    f"`{out / added}` was not written by slrc, and would be lost with the old output",
                    hint="move it away, or choose another folder with `--out`",
                )
        if self.work.is_dir() and any(self.work.iterdir()) and not (self.work / LOCK).exists():
            raise _foreign(self.work)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise disk_error(self.work, error) from error
        try:
            self._begin(out, run, resume, overwrite)
        except BaseException:
            self._unlock()
            raise

    def _begin(self, out: Path, run: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        known = self._read_run()
        if known is not None and not resume and not overwrite:
            raise OutputError(
                f"an unfinished run lies in `{self.work}`",
                hint="`--resume` goes on with it, `--overwrite` starts anew",
            )
        if resume:
            self._check_same(known, run, out)
        else:
            self._clear()
            self.write_json(RUN, dict(run))

    @property
    def checkpoints(self) -> Path:
        """Where training saves its state."""
        return self.work / "checkpoints"

    @property
    def result(self) -> Path:
        """The folder that becomes the output."""
        folder = self.work / "result"
        folder.mkdir(exist_ok=True)
        return folder

    def new_result(self) -> Path:
        """Return an empty result folder."""
        shutil.rmtree(self.work / "result", ignore_errors=True)
        return self.result

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Save tensors for a resumed run, or return those that the interrupted one saved."""
        path = self.work / f"{name}.safetensors"
        if self.leads and not path.exists():
            aside = path.with_suffix(".partial")
            with self.writing():
                save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, aside)
                aside.rename(path)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"`{path}` cannot be read: {error}", hint="`--overwrite` starts anew") from error

    def keep_plan(self, make: Callable[[], Plan]) -> Plan:
        """Make the plan and save it for a resumed run, or return the one that the interrupted run went by."""
        path = self.work / "plan.json"
        if self.leads and not path.exists():
            plan, aside = make(), path.with_suffix(".partial")
            with self.writing():
                plan.save(aside)
                aside.rename(path)
        return Plan.load(path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what is raised where the disk is full into a readable error."""
        try:
            yield
        except DISK_ERRORS as error:
            raise disk_error(self.work, error) from error

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file in the work folder, whole or not at all."""
        path = self.work / name
        aside = path.with_suffix(".partial")
        with self.writing():
            aside.write_text(json.dumps(data, indent=1, sort_keys=True))
            aside.rename(path)

    def publish(self) -> None:
        """Put the result in place of an older one, and remove the work folder."""
        old = self.work / "replaced"
        try:
            if self.out.exists():
                self.out.rename(old)
            self.result.rename(self.out)
        except OSError as error:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
            raise disk_error(self.out, error) from error
        self._unlock()
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder; what was done stays for `--resume`, and nothing stays where nothing was done."""
        self._unlock()
        if self.leads and self.work.exists() and not self.checkpoints.exists():
            shutil.rmtree(self.work, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _take_lock(self) -> BaseFileLock:
        lock = take_lock(self.work / LOCK)
        if lock is None:
            raise OutputError(
                f"another slrc run is at work in `{self.work}`", hint="wait for it, or choose another `--out`"
            )
        return lock

    def _read_run(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.work / RUN).read_text())
        except (OSError, json.JSONDecodeError):
            return None

    def _check_same(self, known: dict[str, Any] | None, run: Mapping[str, Any], out: Path) -> None:
        if known is None:
            shutil.rmtree(self.work, ignore_errors=True)
            raise OutputError(
                f"there is no unfinished run of `{out}` to resume",
                hint="run without `--resume`; one that was interrupted before it began to train leaves nothing behind",
            )
        asked = json.loads(json.dumps(dict(run)))
        differing = sorted(k for k in known.keys() | asked.keys() if known.get(k) != asked.get(k))
        if differing:
            key = differing[0]
            raise OutputError(
                f"cannot resume `{out}`: `{key}` was {known.get(key)!r}, now {asked.get(key)!r}",
                hint="give the same options as before, or `--overwrite` to start anew",
            )

    def _clear(self) -> None:
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()


def _is_ours(out: Path) -> bool:
    if not out.is_dir():
        return False
    try:
        report = json.loads((out / REPORT).read_text())
    except FileNotFoundError:
        return not any(out.iterdir())
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and {"schema_version", "pattern", "sparsity", "checks"} <= report.keys()


def _added(out: Path) -> str:
    """Return the name of an entry that a compile does not write, of a folder that is one's own; empty if none."""
    try:
        report = json.loads((out / REPORT).read_text())
    except FileNotFoundError:
        return ""
    targets = report.get("targets")
    listed = targets if isinstance(targets, list) else []
    known = WRITTEN | {str(target.get("folder")) for target in listed if isinstance(target, dict)}
    return next((name for name in sorted(p.name for p in out.iterdir()) if name not in known), "")


def _foreign(folder: Path) -> OutputError:
    return OutputError(
        f"`{folder}` exists and was not written by slrc: it will not be replaced",
        hint="choose another folder with `--out`",
    )
