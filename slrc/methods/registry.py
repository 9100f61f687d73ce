"""From a method's name to the method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from slrc.errors import ConfigError
from slrc.methods.ac_dc import ACDC
from slrc.methods.admm import ADMM
from slrc.methods.base import Method
from slrc.methods.gradual import Gradual
from slrc.methods.group_lasso import GroupLasso
from slrc.methods.magnitude import Magnitude
from slrc.methods.settings import MethodName, MethodSettings
from slrc.methods.slr import SLR
from slrc.sparsity.plans import Plan


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
        case MethodName.SLR_TIGHTENING:
            return SLR(parameters, plan, updates, settings.slr_tightening)
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
        case MethodName.RECONSTRUCT:
            raise ConfigError("method `reconstruct` does not train", hint="`slrc.train` and `slrc.compile` take it")
