"""The options of a compile, typed and checked once, from the command line or a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from slrc.errors import ConfigError, SlrcError
from slrc.methods import MethodName, MethodSettings
from slrc.sparsity.patterns import AnyPattern, Block, Channel
from slrc.sparsity.plans import Allocation, Attention, LayerNorm, PatternField


class Precision(StrEnum):
    """Arithmetic of the training steps; weights and checks stay in float32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


_NUMBERS = (
    "sparsity",
    "latency_budget",
    "epochs",
    "retrain_epochs",
    "updates_per_epoch",
    "probe_batches",
    "recalibration_batches",
    "threads",
    "seed",
)


PLANNING = (
    "pattern",
    "sparsity",
    "allocate",
    "latency_budget",
    "skip",
    "keep_ends",
    "round_to",
    "attention",
    "layer_norm",
    "permute",
)
"""Options that make a plan; a plan that is given has them decided."""


class CompileConfig(MethodSettings):
    """Everything that `slrc compile` can be told. Field names are the option names, with underscores."""

    pattern: PatternField = Field(default_factory=Channel)
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    allocate: Allocation = Allocation.UNIFORM
    latency_budget: float | None = Field(default=None, gt=0, lt=1)
    round_to: Annotated[int, Field(ge=1)] = 8
    attention: Attention = Attention.HEADS
    layer_norm: LayerNorm = LayerNorm.KEEP
    permute: bool = False
    method: MethodName | None = None
    epochs: Annotated[int, Field(ge=0)] = 10
    retrain_epochs: Annotated[int, Field(ge=0)] = 0
    updates_per_epoch: Annotated[int, Field(ge=1)] = 2
    probe_batches: Annotated[int, Field(ge=1)] = 4
    recalibration_batches: Annotated[int, Field(ge=0)] = 20
    precision: Precision = Precision.FP32
    target: tuple[str, ...] = ("ort",)
    plan: Path | None = None
    skip: tuple[str, ...] = ()
    keep_ends: bool = True
    threads: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("target", "skip", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one target is needed")
        if len(set(value)) < len(value):
            raise ValueError("a target is given twice")
        return value

    @model_validator(mode="after")
    def _budget_goes_with_latency(self) -> CompileConfig:
        if self.allocate is Allocation.LATENCY:
            if self.latency_budget is None:
                raise ConfigError(
                    "`--allocate latency` needs `--latency-budget`",
                    hint="the share of the dense latency to meet, for example `--latency-budget 0.5`",
                )
            if self.sparsity is not None:
                raise ConfigError(
                    "`--sparsity` and `--latency-budget` exclude each other",
                    hint="with `--allocate latency` the budget decides how much is pruned",
                )
            if not self.pattern.coupled:
                raise ConfigError(
                    f"`--allocate latency` chooses widths of channels, got `--pattern {self.pattern}`",
                    hint="use `--pattern channel`",
                )
        elif self.latency_budget is not None:
            raise ConfigError("`--latency-budget` needs `--allocate latency`", hint="add it, or leave the budget out")
        return self

    @model_validator(mode="after")
    def _plan_decides(self) -> CompileConfig:
        decided = [name for name in PLANNING if name in self.model_fields_set]
        if self.plan is not None and decided:
            raise ConfigError(
                f"`--plan` and `--{decided[0].replace('_', '-')}` exclude each other: the plan says what to prune",
                hint="leave one out, or write the plan anew with `slrc inspect --plan-out`",
            )
        return self

    @model_validator(mode="after")
    def _permute_goes_with_blocks(self) -> CompileConfig:
        if self.permute and not (isinstance(self.pattern, Block) and self.pattern.cols == 1):
            raise ConfigError(
                f"`--permute` reorders channels for blocks of one column, got `--pattern {self.pattern}`",
                hint="use `--pattern block:8x1`, or leave `--permute` out",
            )
        return self

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("input should be a number")  # noqa: TRY004
        return value

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_is_text(cls, value: Any) -> Any:
        if not isinstance(value, (str, AnyPattern)):
            raise ValueError("a pattern is a text such as 'channel' or 'block:8x1'")  # noqa: TRY004
        return value


TABLES: Mapping[str, type[BaseModel]] = {name: type(settings) for name, settings in MethodSettings()}


def make_config(options: Mapping[str, Any], file: Path | None = None) -> CompileConfig:
    """Return a configuration from a TOML file and options, of which the options win.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of range.
    """
    merged = {**(_read_toml(file) if file else {}), **options}
    try:
        return CompileConfig.model_validate(merged)
    except SlrcError:
        raise
    except ValidationError as error:
        raise _config_error(error, file, options) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file `{file}` does not exist", hint="check the path given to `--config`"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"configuration file `{file}` cannot be read: {error}") from None
    return _with_underscores(data)


def _with_underscores(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.replace("-", "_"): _with_underscores(value) if isinstance(value, dict) else value
        for key, value in table.items()
    }


def _config_error(error: ValidationError, file: Path | None, options: Mapping[str, Any]) -> ConfigError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    top = str(first["loc"][0]) if first["loc"] else ""
    option = f"--{top.replace('_', '-')}" if field == top else field
    where = f"option `{option}`" if top in options else f"`{field}` in `{file}`"
    if first["type"] == "extra_forbidden":
        table = TABLES.get(top, CompileConfig) if field != top else CompileConfig
        known = ", ".join(name.replace("_", "-") for name in table.model_fields)
        return ConfigError(f"{where}: there is no such option", hint=f"known options: {known}")
    got = first.get("input")
    hint = "the share of weights to prune, for example `--sparsity 0.75`" if top == "sparsity" else None
    said = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{where}: {said[:1].lower()}{said[1:]}, got {got!r}", hint=hint)
