"""`Report`: what a compile reached, as data (`report.json`) that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from slrc.backends.base import FileName
from slrc.backends.engine_summary import EngineSummary
from slrc.errors import OutputError
from slrc.forms.form import FormChoice
from slrc.measuring.timing import Latency, Percentiles
from slrc.methods.base import Iteration
from slrc.quantization.choose import Calibration
from slrc.training.checkpoints import EpochRecord
from slrc.training.steps import StepCost
from slrc.verify import Check

REPORT_SCHEMA_VERSION: Final = 1
T = TypeVar("T")


class _Data(BaseModel):
    # A perplexity may be infinite for a while: as null it could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Pair(_Data, Generic[T]):
    """A figure of the dense and of the compiled model."""

    dense: T
    compiled: T


class Sparsity(_Data):
    """The share of the constrained weights that was asked for, and that was pruned."""

    asked: float
    reached: float


class Accuracy(_Data):
    """The leading metric of `evaluate`.

    `hard_pruned` is right after pruning with no retraining; `final` is the compiled model's, in its runtime where that
    can run here.
    """

    metric: str
    dense: float
    hard_pruned: float
    final: float


class LayerSparsity(_Data):
    """One constraint: how many of its groups survive, of how many weights."""

    name: str
    pattern: str
    groups: int
    kept: int
    weights: int


class Corner(_Data):
    """One of the four models of an int8 target; `None` for what was not measured."""

    model: Literal["dense", "compiled"]
    precision: Literal["float32", "int8"]
    metric: float | None
    size_bytes: int
    latency_ms: Percentiles | None


class Int8Result(_Data):
    """What rounding did: the four corners, dense and compiled, in float32 and in int8, and how each was rounded.

    `training` are the epochs of quantisation-aware training, the first before any step.
    """

    corners: tuple[Corner, ...]
    calibration: Pair[Calibration]
    training: tuple[EpochRecord, ...] = ()


class TargetResult(_Data):
    """What was emitted for a target; `not_run` says why it was not run here, `forms` how each layer is run.

    `engine` is what the dense and the compiled engine consist of, where there are engines that say it.
    """

    target: str
    folder: FileName
    size_bytes: Pair[int]
    precision: str
    not_run: str = ""
    engine: Pair[EngineSummary] | None = None
    forms: FormChoice | None = None
    int8: Int8Result | None = None


class Report(_Data):
    """Everything that a compile found, with the figures' conditions."""

    schema_version: Literal[1] = REPORT_SCHEMA_VERSION
    model: str
    pattern: str
    method: str
    sparsity: Sparsity
    accuracy: Accuracy | None
    params: Pair[int]
    macs: Pair[int]
    size_bytes: Pair[int]
    latency: tuple[Latency, ...]
    checks: tuple[Check, ...]
    history: tuple[Iteration, ...]
    curve: tuple[EpochRecord, ...]
    training: StepCost | None
    layers: tuple[LayerSparsity, ...]
    targets: tuple[TargetResult, ...]
    notes: tuple[str, ...]
    config: dict[str, Any]
    environment: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write `report.json`."""
        (Path(folder) / "report.json").write_text(self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(folder: str | Path) -> Report:
        """Read the report of an output folder.

        Raises:
            OutputError: there is none, or it has another schema version.
        """
        path = Path(folder) / "report.json"
        try:
            return Report.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise OutputError(
                f"`{folder}` has no report.json: it is not the output of a finished compile",
                hint="give the folder that `slrc compile --out` wrote",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"`{path}` cannot be read: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise OutputError(f"`{path}` cannot be read, field `{where}`: {first['msg']}") from None
