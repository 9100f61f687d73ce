"""The methods' names and settings; naming them needs no torch."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class SLRSettings(BaseModel):
    """SLR's parameters, with the paper's names and values; those after `r` are not the paper's.

    α_k = 1 − 1/(M k^p) with p = 1 − 1/k^r; M > 1 and 0 < r < 1 make the steps shrink slowly enough.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rho: float = Field(default=0.1, gt=0, description="penalty ρ at first")
    s0: float = Field(default=0.01, ge=0, description="first step size; with 0 the multipliers stay zero")
    M: float = Field(default=300.0, gt=1, description="step-size constant, above 1")
    r: float = Field(default=0.1, gt=0, lt=1, description="step-size exponent, in (0, 1)")
    rho_growth: float = Field(default=1.0, ge=1, description="by how much ρ has grown at the last update")
    follow: bool = Field(default=False, description="whether Z follows W between projections where it is not zero")
    tighten: float = Field(default=0.0, ge=0, le=1, description="share of the updates in which the sets tighten")
    hold: float = Field(default=1.0, gt=0, le=1, description="share of the updates after which masks are in force")


class TighteningSettings(SLRSettings):
    """SLR's parameters where its sets tighten and masks are in force at the end."""

    rho: float = Field(default=1.0, gt=0, description="penalty ρ at first")
    follow: bool = Field(default=True, description="whether Z follows W between projections where it is not zero")
    tighten: float = Field(default=0.5, ge=0, le=1, description="share of the updates in which the sets tighten")
    hold: float = Field(default=0.5, gt=0, le=1, description="share of the updates after which masks are in force")


class ADMMSettings(BaseModel):
    """ADMM's parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rho: float = Field(default=0.1, gt=0, description="penalty ρ, also the dual step")
    rho_growth: float = Field(default=1.0, ge=1, description="by how much ρ has grown at the last update")
    follow: bool = Field(default=False, description="whether Z follows W between projections where it is not zero")


class GradualSettings(BaseModel):
    """The schedule of gradual magnitude pruning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: float = Field(default=0.5, gt=0, le=1, description="share of the updates after which all is pruned")


class ACDCSettings(BaseModel):
    """The phases of AC/DC."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: int = Field(default=1, ge=1, description="updates that a phase lasts")
    final: float = Field(default=0.25, ge=0, lt=1, description="share of the updates that the last, sparse phase lasts")


class GroupLassoSettings(BaseModel):
    """The schedule of the shrinking."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: float = Field(default=0.75, gt=0, le=1, description="share of the updates after which the level is reached")


class ReconstructSettings(BaseModel):
    """What a refit layer by layer sees, and how finely it chooses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(default=512, ge=1, description="samples that calibrate")
    positions: int = Field(default=128, ge=1, description="of each sample's positions or tokens, how many a layer sees")
    rate: float = Field(default=0.05, gt=0, le=1, description="share of what is left that is dropped in one round")
    damping: float = Field(
        default=0.03, gt=0, description="ridge for each column of a layer per image, beside its inputs' mean square"
    )
    clipping: int = Field(default=5, ge=0, description="rounds in which targets move where a rectifier clips them")


class MethodName(StrEnum):
    """The methods by their name on the command line."""

    SLR = "slr"
    SLR_TIGHTENING = "slr-tightening"
    ADMM = "admm"
    MAGNITUDE = "magnitude"
    GRADUAL = "gradual"
    AC_DC = "ac-dc"
    GROUP_LASSO = "group-lasso"
    RECONSTRUCT = "reconstruct"


class MethodSettings(BaseModel):
    """The settings of every method, by its name with an underscore."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slr: SLRSettings = SLRSettings()
    slr_tightening: TighteningSettings = TighteningSettings()
    admm: ADMMSettings = ADMMSettings()
    gradual: GradualSettings = GradualSettings()
    ac_dc: ACDCSettings = ACDCSettings()
    group_lasso: GroupLassoSettings = GroupLassoSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
