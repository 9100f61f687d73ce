"""What a sweep consists of, and the folder that its workers share."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from slrc.config import CompileConfig, make_config
from slrc.errors import ConfigError, OutputError, disk_error
from slrc.machine.lock import take_lock
from slrc.sparsity.patterns import AUTO, parse_pattern

SWEEP = "sweep.json"
SWEEP_VERSION = 1


@dataclass(frozen=True)
class SweepPoint:
    """One compile of a sweep: a pattern, or `auto`, at a speed-up."""

    pattern: str
    speedup: float

    @property
    def name(self) -> str:
        """What its output folder is called, such as `block-8x1-2x`."""
        return f"{self.pattern.replace(':', '-')}-{self.speedup:g}x"

    def config(self, options: Mapping[str, Any], file: Path | None) -> CompileConfig:
        """Return the configuration of its compile."""
        return make_config({**options, "pattern": self.pattern, "speedup": self.speedup}, file)


def parse_points(patterns: str, speedups: str) -> list[SweepPoint]:
    """Return the points of every pattern at every speed-up, those of the least speed-up first.

    Args:
        patterns: such as `channel,block:8x1`.
        speedups: such as `2,3,5`.

    Raises:
        ConfigError: a speed-up is no number above 1, or there is none.
        PatternError: there is no such pattern.
    """
    texts = [text.strip() for text in patterns.split(",") if text.strip()]
    names = list(dict.fromkeys(text if text == AUTO else str(parse_pattern(text)) for text in texts))
    try:
        factors = sorted({float(text) for text in speedups.split(",") if text.strip()})
    except ValueError:
        factors = []
    if not names or not factors or factors[0] <= 1:
        raise ConfigError(
            f"a sweep needs patterns and speed-ups above 1, got `--patterns {patterns}` and `--speedups {speedups}`",
            hint="for example `--patterns channel,block:8x1 --speedups 2,3,5`",
        )
    return [SweepPoint(name, factor) for factor in factors for name in names]


def before(point: SweepPoint, points: Iterable[SweepPoint]) -> list[SweepPoint]:
    """Return the points of the same pattern that are to be slower, the nearest first: a warm start is one of them."""
    slower = [p for p in points if p.pattern == point.pattern and p.speedup < point.speedup]
    return sorted(slower, key=lambda p: p.speedup, reverse=True)


class SweepFolder:
    """The folder of a sweep: a build for each point, and what its workers share.

    Args:
        root: the folder.
        identity: the model and the options, as JSON values: another worker, or the next one, must have the same.

    Raises:
        OutputError: the folder holds something else, or a sweep of other options.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.root = root
        try:
            if root.exists() and not (root / SWEEP).exists() and _strangers(root):
                raise OutputError(
                    f"`{root}` exists and is no sweep: nothing will be written to it",
                    hint="choose another folder with `--out`",
                )
            root.mkdir(parents=True, exist_ok=True)
            with self.alone():
                self.study = self._join(json.loads(json.dumps(dict(identity))))
        except OSError as error:
            raise disk_error(root, error) from error

    def _join(self, identity: dict[str, Any]) -> str:
        """Return the name of the sweep's study; the first worker invents it."""
        path = self.root / SWEEP
        if not path.exists():
            known = {"version": SWEEP_VERSION, "study": f"slrc-{uuid.uuid4().hex[:12]}", "identity": identity}
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(known, indent=1, sort_keys=True))
            aside.replace(path)
        try:
            known = json.loads(path.read_text())
            before, study = known["identity"], str(known["study"])
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"`{path}` cannot be read", hint="choose another folder with `--out`") from None
        if differing := sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k)):
            key = differing[0]
            raise OutputError(
                f"`{self.root}` is a sweep of other options: `{key}` was {before.get(key)!r}, "
                f"now {identity.get(key)!r}",
                hint="give the same options, or another folder with `--out`; patterns may be added, and speed-ups "
                "where points do not start from one another",
            )
        return study

    def build(self, point: SweepPoint) -> Path:
        """The output folder of a point's compile."""
        return self.root / point.name

    def alone(self) -> FileLock:
        """Return a lock that one worker holds at a time."""
        return FileLock(self.root / ".lock")

    def claim(self, point: SweepPoint) -> BaseFileLock | None:
        """Take a point to work on; `None` if another worker has it. The claim ends with the process, however that ends.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = self.root / ".claims"
        try:
            folder.mkdir(exist_ok=True)
            return take_lock(folder / point.name)
        except OSError as error:
            raise disk_error(folder, error) from error

    def is_claimed(self, point: SweepPoint) -> bool:
        """Whether a worker that is alive has the point."""
        claim = self.claim(point)
        if claim is not None:
            claim.release()
        return claim is None


def _strangers(root: Path) -> Sequence[Path]:
    return [path for path in root.iterdir() if path.name != ".lock"]


def identity_of(model: str, config: CompileConfig, points: Sequence[SweepPoint], warm_start: bool) -> dict[str, Any]:
    """Return what all workers of a sweep must agree on; speed-ups too, where points start from one another."""
    chain = sorted({p.speedup for p in points}) if warm_start else None
    return {"model": model, "warm_start": chain, **config.model_dump(mode="json", exclude={"pattern", "speedup"})}
