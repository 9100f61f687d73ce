"""Methods that train a model so that it can be pruned: one interface, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict
from torch import nn

from slrc.methods.ac_dc import ACDC, ACDCSettings
from slrc.methods.admm import ADMM, ADMMSettings
from slrc.methods.base import Iteration, Method, MethodState
from slrc.methods.gradual import Gradual, GradualSettings
from slrc.methods.group_lasso import GroupLasso, GroupLassoSettings
from slrc.methods.magnitude import Magnitude
from slrc.methods.slr import SLR, SLRSettings
from slrc.sparsity.plans import Plan


class MethodName(StrEnum):
    """The methods by their name on the command line."""

    SLR = "slr"
    ADMM = "admm"
    MAGNITUDE = "magnitude"
    GRADUAL = "gradual"
    AC_DC = "ac-dc"
    GROUP_LASSO = "group-lasso"


class MethodSettings(BaseModel):
    """The settings of every method, by its name with an underscore."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slr: SLRSettings = SLRSettings()
    admm: ADMMSettings = ADMMSettings()
    gradual: GradualSettings = GradualSettings()
    ac_dc: ACDCSettings = ACDCSettings()
    group_lasso: GroupLassoSettings = GroupLassoSettings()


def make_method(
    name: MethodName,
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    updates: int,
    settings: MethodSettings | None = None,
) -> Method:
    """Return a method that constrains `parameters` (by qualified name) as `plan` says.

    `updates` is how often `update` will be called: schedules stretch over them.
    """
    settings = settings or MethodSettings()
    match name:
        case MethodName.SLR:
            return SLR(parameters, plan, updates, settings.slr)
        case MethodName.ADMM:
            return ADMM(parameters, plan, updates, settings.admm)
        case MethodName.GRADUAL:
            return Gradual(parameters, plan, updates, settings.gradual)
        case MethodName.AC_DC:
            return ACDC(parameters, plan, updates, settings.ac_dc)
        case MethodName.GROUP_LASSO:
            return GroupLasso(parameters, plan, updates, settings.group_lasso)
        case MethodName.MAGNITUDE:
            return Magnitude(parameters, plan)


__all__ = [
    "ACDC",
    "ADMM",
    "SLR",
    "ACDCSettings",
    "ADMMSettings",
    "Gradual",
    "GradualSettings",
    "GroupLasso",
    "GroupLassoSettings",
    "Iteration",
    "Magnitude",
    "Method",
    "MethodName",
    "MethodSettings",
    "MethodState",
    "SLRSettings",
    "make_method",
]
