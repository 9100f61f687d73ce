"""A compile's configuration, checked once: options from the command line, a TOML file or keywords, taken together."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from slrc.errors import ConfigError, SlrcError
from slrc.methods.settings import MethodName, MethodSettings
from slrc.options import Int8Settings, Options, RecipeSettings, planning_options
from slrc.sparsity.choices import Allocation, Metric
from slrc.sparsity.patterns import AUTO, AnyPattern, Block, Channel

USUAL_SHARE = 0.5
"""Of the dense latency, where nobody says what to prune or how much."""


class CompileConfig(Options):
    """Everything that `slrc compile` can be told: the command line, a TOML file and the API's keywords follow from it.

    A field with a text is an option of the command line, named with hyphens; the others are for the file and the API.
    """

    @model_validator(mode="after")
    def _int8_options_need_an_int8_target(self) -> CompileConfig:
        given = {"int8_skip", "max_drop", "qat_epochs"} & self.model_fields_set
        if given and not any("int8" in re.split(r"[:+]", target) for target in self.target):
            option = sorted(given)[0].replace("_", "-")
            raise ConfigError(
                f"`--{option}` is for int8 targets, got `--target {' --target '.join(self.target)}`",
                hint="use `--target ort+int8`, or leave it out",
            )
        return self

    @model_validator(mode="after")
    def _budget_decides(self) -> CompileConfig:
        if self.speedup is not None and self.latency_budget is not None:
            raise ConfigError(
                "`--speedup` and `--latency-budget` exclude each other: the one is 1 over the other",
                hint="leave one out",
            )
        if self.latency_share is None:
            if self.pattern == AUTO:
                raise ConfigError(
                    "`--pattern auto` chooses patterns by what they take, and needs to know what to reach",
                    hint="add `--speedup 2`, or name a pattern",
                )
            return self
        if self.budget_metric is Metric.ERROR and self.chosen_pattern == AUTO:
            raise ConfigError(
                '`budget-metric = "error"` weighs layers alone, while `--pattern auto` narrows channels too and has to '
                "know which of both costs less",
                hint="leave it out, or name a pattern, such as `block:8x1`",
            )
        option = "--speedup" if self.speedup is not None else "--latency-budget"
        if self.sparsity is not None:
            raise ConfigError(
                f"`--sparsity` and `{option}` exclude each other: the budget decides how much is pruned",
                hint="leave one out",
            )
        if self.allocate is not Allocation.UNIFORM:
            raise ConfigError(
                f"`--allocate {self.allocate}` and `{option}` exclude each other: the budget decides what is pruned",
                hint="leave one out",
            )
        if self.permute:
            raise ConfigError(
                f"`--permute` and `{option}` exclude each other: orders belong to one pattern",
                hint="leave one out",
            )
        if isinstance(self.pattern, AnyPattern) and self.pattern.fixed_sparsity is not None:
            raise ConfigError(
                f"`{option}` chooses how much is pruned, and `--pattern {self.pattern}` prescribes it",
                hint="use `--pattern auto`, `block:8x1`, `columns:2` or `channel`",
            )
        return self

    @model_validator(mode="after")
    def _plan_decides(self) -> CompileConfig:
        decided = [name for name in planning_options() if name in self.model_fields_set]
        if self.plan is not None and decided:
            raise ConfigError(
                f"`--plan` and `--{decided[0].replace('_', '-')}` exclude each other: the plan says what to prune",
                hint="leave one out, or write the plan anew with `slrc inspect --plan-out`",
            )
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> CompileConfig:
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(
                "`--epochs` and `--steps` exclude each other: both say how long to train", hint="leave one out"
            )
        return self

    @model_validator(mode="after")
    def _permute_goes_with_blocks(self) -> CompileConfig:
        pattern = self.chosen_pattern
        if self.permute and not (isinstance(pattern, Block) and pattern.cols == 1):
            raise ConfigError(
                f"`--permute` reorders channels for blocks of one column, got `--pattern {pattern}`",
                hint="use `--pattern block:8x1`, or leave `--permute` out",
            )
        return self

    @model_validator(mode="after")
    def _a_start_is_for_training(self) -> CompileConfig:
        if self.start_from is not None:
            self.check_can_start("--start-from")
        return self

    @property
    def latency_share(self) -> float | None:
        """The share of the dense latency to meet; `None` where a sparsity or a plan decides."""
        if self.speedup is not None:
            return 1.0 / self.speedup
        return USUAL_SHARE if self.leaves_all_open else self.latency_budget

    @property
    def leaves_all_open(self) -> bool:
        """Whether nothing says what to prune or how much."""
        said = (self.pattern, self.sparsity, self.speedup, self.latency_budget, self.plan)
        return all(x is None for x in said) and self.allocate is Allocation.UNIFORM and not self.permute

    @property
    def chosen_pattern(self) -> AnyPattern | str:
        """The pattern that is asked for, or what is usual."""
        if self.pattern is not None:
            return self.pattern
        return Channel() if self.latency_share is None else AUTO

    @property
    def width_multiple(self) -> int:
        """The multiple that kept widths are rounded up to: the one asked for, or what suits all targets."""
        if self.round_to != "auto":
            return self.round_to
        from slrc.backends import get_backend, parse_target  # not before torch is needed

        return max(get_backend(target).channel_multiple(target) for target in map(parse_target, self.target))

    @property
    def trains(self) -> bool:
        """Whether there is sparse training, given data; `reconstruct` has some only where it is asked for."""
        if self.method is MethodName.RECONSTRUCT:
            return bool(self.epochs or self.steps)
        return self.epochs != 0

    def check_can_start(self, option: str, default: MethodName | None = None) -> None:
        """Make sure that training can start from other weights than the dense ones, as `option` asks.

        `default` is the method where none is asked for, as soon as that is known.

        Raises:
            ConfigError: the method is `reconstruct`, which refits the dense weights.
        """
        if (self.method or default) is MethodName.RECONSTRUCT:
            which = "`--method reconstruct`" if self.method else "`reconstruct`, which is the default here,"
            raise ConfigError(
                f"`{option}` needs a method that trains, and {which} refits the dense weights",
                hint="add `--method gradual`",
            )


TABLES: Mapping[str, type[BaseModel]] = {
    "recipe": RecipeSettings,
    "int8": Int8Settings,
    **{name: type(settings) for name, settings in MethodSettings()},
}
HINTS = {
    "sparsity": "the share of weights to prune, for example `--sparsity 0.75`",
    "latency_budget": "the share of the dense latency to reach, for example `--latency-budget 0.5`",
    "speedup": "how many times as fast as dense to become, for example `--speedup 2`",
    "epochs": "how often to go through the training data, for example `--epochs 10`",
}
"""What an option means whose value is out of range."""


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
    where = f"option `{option}`" if top in options else f"`{field.replace('_', '-')}` in `{file}`"
    if first["type"] == "extra_forbidden":
        table = TABLES.get(top, CompileConfig) if field != top else CompileConfig
        known = ", ".join(name.replace("_", "-") for name in table.model_fields)
        return ConfigError(f"{where}: there is no such option", hint=f"known options: {known}")
    got = first.get("input")
    said = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{where}: {said[:1].lower()}{said[1:]}, got {got!r}", hint=HINTS.get(top))
