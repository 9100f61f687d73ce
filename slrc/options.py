"""The options of a compile: what each is called, what it may be, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from slrc.methods.settings import MethodName, MethodSettings
from slrc.sparsity.choices import Allocation, Attention, LayerNorm, Metric
from slrc.sparsity.patterns import AUTO, AnyPattern, PatternOrAuto


class Precision(StrEnum):
    """Arithmetic of the training steps; weights and checks stay in float32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class RecipeSettings(BaseModel):
    """How the weights are trained, whatever the method. A workload's own optimiser and schedule win over it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distill_weight: float = Field(default=0.7, gt=0, le=1, description="of distillation; the loss has the rest")
    temperature: float = Field(default=2.0, gt=0, description="of the logits in the distillation of a classifier")
    one_cycle: bool = Field(default=True, description="whether the learning rate rises first; else it only falls")
    warmup: float = Field(default=0.3, gt=0, lt=1, description="share of the steps in which the learning rate rises")
    peak_lr: float = Field(default=0.05, gt=0, description="highest learning rate; less where the penalty needs it")
    clip: float = Field(default=5.0, ge=0, description="most that the loss gradient's norm may be, 0 for no limit")
    average: float = Field(
        default=0.0, ge=0, lt=1, description="decay of an average of the weights over the last tenth, 0 for none"
    )


class Int8Settings(BaseModel):
    """How the scales of an int8 target are found, and trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=256, ge=1, description="of calibration; a quarter of them tell what is best")
    ranges: Literal["best", "minmax", "percentile", "mse"] = Field(default="best", description="of values")
    percentile: float = Field(default=99.99, gt=50, le=100, description="of numbers that a range holds")
    equalize: bool | None = Field(default=None, description="channels across layers; `None` for where it helps")
    correct_bias: bool | None = Field(default=None, description="for rounded weights; `None` for where it helps")
    loss: float = Field(default=0.05, gt=0, description="most that outputs may move before layers stay in float")
    qat_lr: float = Field(default=0.1, gt=0, le=1, description="learning rate of --qat-epochs over that of training")
    learn_scales: bool = Field(default=True, description="whether --qat-epochs moves scales too; SGD alone can")


def _option(default: Any, told: str, *, plans: bool = False, **limits: Any) -> Any:
    """Return a field that is an option of the command line, with its text for `--help`.

    `plans` is for options that make a plan: where a plan is given they are decided. `flags` are what a truth value is
    called, `metavar` what a value is called where the type does not say it.
    """
    cli: dict[str, Any] = {key: limits.pop(key) for key in ("flags", "metavar") if key in limits}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**made, description=told, json_schema_extra={"plans": plans, "cli": cli}, **limits)


class Options(MethodSettings):
    """The options one by one; `slrc.config.CompileConfig` says which go together, and what follows from them."""

    pattern: PatternOrAuto | None = _option(
        None,
        "what may survive: auto, unstructured, block:RxC, columns:R, channel or N:M (default: auto; with --sparsity "
        "channel)",
        plans=True,
    )
    sparsity: float | None = _option(
        None,
        "share of the constrained weights to prune, in [0, 1) (default with --pattern: 0.5)",
        plans=True,
        ge=0,
        lt=1,
    )
    allocate: Allocation = _option(
        Allocation.UNIFORM,
        "of --sparsity: uniform per layer, or global by magnitude (default: uniform)",
        plans=True,
    )
    speedup: float | None = _option(
        None,
        "how many times as fast as dense to become on the first target (default without --pattern and --sparsity: 2)",
        plans=True,
        gt=1,
    )
    latency_budget: float | None = _option(
        None,
        "the same as --speedup, as a share of the dense latency, such as 0.5",
        plans=True,
        gt=0,
        lt=1,
    )
    method: MethodName | None = _option(
        None,
        "gradual, slr, slr-tightening, admm, ac-dc, group-lasso, magnitude, or reconstruct, which needs no labels "
        "(default: gradual; with --speedup or without labels reconstruct, without data magnitude)",
    )
    epochs: int | None = _option(
        None,
        "epochs of sparse training (default: 10, or as many as 2000 steps take where that is more; 0 for a "
        "--method reconstruct that is asked for)",
        ge=0,
    )
    steps: int | None = _option(None, "steps of sparse training, in place of epochs", ge=1)
    distill: bool = _option(
        True,
        "learn from the dense network's outputs too (default: distill)",
        flags="--distill/--no-distill",
    )
    start_from: Path | None = _option(
        None,
        "the output of another compile of this model, pruned less: training starts from its weights, and still learns "
        "from the dense network (default: the dense weights)",
        metavar="FOLDER",
    )
    retrain_epochs: int = _option(0, "epochs of masked retraining afterwards (default: 0)", ge=0)
    precision: Precision = _option(Precision.FP32, "training in fp32, bf16 or fp16 (default: fp32)")
    checkpoint_minutes: float = _option(
        10.0, "within an epoch, save for --resume so often; 0 after every step (default: 10)", ge=0
    )
    target: tuple[str, ...] = _option(
        ("ort",),
        "ort, ort:aarch64, ort:stock, tensorrt-rtx:sm86, tensorrt or torch, see `targets`; with +int8 in integers; "
        "repeatable (default: ort)",
    )
    device: str | None = _option(
        None,
        "a machine that ssh reaches, user@name or a Host of your ssh configuration: forms, widths and the report are "
        "measured there (default: this machine)",
        metavar="HOST",
    )
    skip: tuple[str, ...] = _option((), "layers to leave alone; globs; repeatable", plans=True, metavar="NAME")
    keep_ends: bool = _option(
        True,
        "leave the first layer and the classifier alone, unless that is most of the model (default: keep)",
        plans=True,
        flags="--keep-ends/--prune-ends",
    )
    round_to: int | Literal["auto"] = _option(
        AUTO,
        "channel: round kept widths up to a multiple of this (default: auto, what the targets are best with: 8, or 32 "
        "for a DLA)",
        plans=True,
        metavar="N",
    )
    attention: Attention = _option(
        Attention.HEADS, "channel: prune whole heads, or the width of every head (default: heads)", plans=True
    )
    layer_norm: LayerNorm = _option(
        LayerNorm.KEEP,
        "channel: keep what layer and RMS norms normalise over, or narrow it exactly (default: keep)",
        plans=True,
    )
    permute: bool = _option(
        False,
        "block:Rx1: reorder channels so that alike outputs share blocks; the network computes the same "
        "(default: no-permute)",
        plans=True,
        flags="--permute/--no-permute",
    )
    int8_skip: tuple[str, ...] = _option(
        ("auto",),
        "int8 targets: layers to leave in float, auto for those that hurt, none, or globs; repeatable (default: auto)",
        metavar="NAME",
    )
    max_drop: float | None = _option(
        None, "int8 targets: most of the metric that rounding may lose, such as 0.01 (default: shown alone)", ge=0
    )
    qat_epochs: int = _option(0, "int8 targets: epochs of quantisation-aware training, masks held (default: 0)", ge=0)
    plan: Path | None = _option(None, "a plan to use instead of --pattern and --sparsity")
    threads: int | None = _option(None, "threads of the runtime (default: all cores; `bench`: as compiled)", ge=1)
    seed: int = _option(0, "of every random choice (default: 0)", ge=0, lt=2**32)
    recipe: RecipeSettings = RecipeSettings()
    int8: Int8Settings = Int8Settings()
    budget_metric: Metric = Metric.DIVERGENCE
    updates_per_epoch: Annotated[int, Field(ge=1)] = 2
    probe_batches: Annotated[int, Field(ge=1)] = 4
    recalibration_batches: Annotated[int, Field(ge=0)] = 20

    @field_validator("target", "skip", "int8_skip", mode="before")
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

    @field_validator("int8_skip")
    @classmethod
    def _auto_or_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or (len(value) > 1 and {"auto", "none"} & set(value)):
            raise ValueError("either `auto`, `none`, or names of layers")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("input should be a number")
        return value

    @field_validator("round_to", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value == AUTO or (str(value).isdecimal() and int(value) > 0):
            return value
        raise ValueError("expected a whole number from 1 on, or `auto`")

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_is_text(cls, value: Any) -> Any:
        if not isinstance(value, (str, AnyPattern)):
            raise ValueError("a pattern is a text such as 'channel' or 'block:8x1'")  # noqa: TRY004
        return value


def options() -> dict[str, FieldInfo]:
    """Return the fields that are options of the command line, in order."""
    return {name: field for name, field in Options.model_fields.items() if field.description}


def planning_options() -> list[str]:
    """Return the names of the options that make a plan."""
    return [name for name, field in options().items() if _extra(field)["plans"]]


def cli_words(field: FieldInfo) -> Mapping[str, str]:
    """Return the `flags` and the `metavar` of an option, where it has them."""
    return _extra(field)["cli"]


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra
