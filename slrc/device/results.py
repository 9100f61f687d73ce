"""What a runner found on a device, read as data: `result.json`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from slrc.backends.engine_summary import EngineSummary
from slrc.backends.tensorrt.inspect import summarise
from slrc.device.bundle import RESULT
from slrc.device.failures import printable
from slrc.errors import DeviceError
from slrc.measuring.devices import Timing

LEAST_BLOCKS = 3
"""Of fewer there is no spread to tell."""
MOST_RESULT_BYTES = 64 << 20
Real = Annotated[float, BeforeValidator(float)]
"""A number, or a text such as `inf`, which JSON has no number for."""
Text = Annotated[str, AfterValidator(printable)]


class _Data(BaseModel):
    # A later runner may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ComparedOutput(_Data):
    """An output there, and by what share of the largest value it lies from the host's."""

    model: Text
    output: Text
    error: Real
    largest: Real
    """The largest difference itself."""
    tolerance: float
    passed: bool


class Block(_Data):
    """Some turns: the milliseconds of each model's, the clocks before and after, and why it does not count."""

    ms: Mapping[str, tuple[float, ...]]
    before: Mapping[str, float] = {}
    after: Mapping[str, float] = {}
    drift: Text = ""


class TimedRun(_Data):
    """Models that were timed in turns."""

    models: tuple[str, ...]
    blocks: tuple[Block, ...]

    @property
    def kept(self) -> tuple[Block, ...]:
        """The blocks in which nothing drifted; all of them where too few would be left."""
        steady = tuple(b for b in self.blocks if not b.drift)
        return steady if len(steady) >= LEAST_BLOCKS else self.blocks

    @property
    def rejected(self) -> tuple[str, ...]:
        """Why blocks were rejected, each reason once."""
        return tuple(dict.fromkeys(b.drift for b in self.blocks if b.drift))

    def ms(self, model: str) -> list[float]:
        """Return the milliseconds of all turns of a model that count."""
        return [x for block in self.kept for x in block.ms[model]]


class FailureThere(_Data):
    """What kept a bundle from running."""

    kind: Text
    what: Text
    hint: Text = ""


class Result(_Data):
    """What a runner found. A model that cannot run has its reason in `why_not`; the others are timed without it."""

    result_version: Literal[1]
    runtime: Text
    outputs: tuple[ComparedOutput, ...]
    why_not: Mapping[Text, Text]
    runs: tuple[TimedRun, ...]
    before: Mapping[str, Any] = {}
    after: Mapping[str, Any] = {}
    failure: FailureThere | None = None
    engines: Mapping[str, Mapping[str, Any]] = {}
    """What a runtime that builds says of each model's engine, such as a line for each of its `layers`."""

    def engine(self, model: str) -> EngineSummary | None:
        """Return what a model's engine consists of, where one was built and its builder said so."""
        said = self.engines.get(model)
        if said is None:
            return None
        return summarise(*("\n".join(map(str, said.get(part, ()))) for part in ("layers", "sparsity")))

    def timing(self, run: int, model: str) -> Timing:
        """Return the median of a model's turns in a run, or why there is none."""
        if reason := self.why_not.get(model):
            return Timing(math.inf, reason)
        return Timing(statistics.median(self.runs[run].ms(model)))

    @staticmethod
    def read(folder: Path) -> Result:
        """Read the result in a folder.

        Raises:
            DeviceError: there is none, or it is not one of this version.
        """
        path = folder / RESULT
        try:
            if path.stat().st_size > MOST_RESULT_BYTES:
                raise DeviceError(f"`{RESULT}` from the device has {path.stat().st_size} bytes: it will not be read")
            result = Result.model_validate_json(path.read_text())
            named = [name for r in result.runs for b in r.blocks for name in r.models if not b.ms.get(name)]
        except (OSError, UnicodeDecodeError) as error:
            raise DeviceError(f"the device returned no {RESULT}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DeviceError(f"`{RESULT}` from the device, field `{where}`: {first['msg']}") from None
        if named:
            raise DeviceError(f"`{RESULT}` from the device has no times of `{named[0]}`")
        return result
