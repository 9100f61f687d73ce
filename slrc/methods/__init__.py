"""Methods that train a model so that it can be pruned: one interface, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from torch import nn

from slrc.methods.admm import ADMM, ADMMSettings
from slrc.methods.base import Iteration, Method, MethodState
from slrc.methods.magnitude import Magnitude
from slrc.methods.slr import SLR, SLRSettings
from slrc.plans import Plan


class MethodName(StrEnum):
    """The methods by their name on the command line."""

    SLR = "slr"
    ADMM = "admm"
    MAGNITUDE = "magnitude"


def make_method(
    name: MethodName,
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    *,
    slr: SLRSettings | None = None,
    admm: ADMMSettings | None = None,
) -> Method:
    """Return a method that constrains `parameters` (by qualified name) as `plan` says."""
    if name is MethodName.SLR:
        return SLR(parameters, plan, slr)
    if name is MethodName.ADMM:
        return ADMM(parameters, plan, admm)
    return Magnitude(parameters, plan)


__all__ = [
    "ADMM",
    "SLR",
    "ADMMSettings",
    "Iteration",
    "Magnitude",
    "Method",
    "MethodName",
    "MethodState",
    "SLRSettings",
    "make_method",
]
