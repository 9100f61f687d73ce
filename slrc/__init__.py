"""slrc: a compiler for sparse neural networks.

    slrc.compile("model.py", out="build", pattern="channel", sparsity=0.5)

is `capture`, `plan`, `train`, `structure` and `lower` in order, with the proof and the measurement. `slrc.SLR` is the
optimiser alone, for a training loop of one's own.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from slrc.machine.threads import wait_passively

if TYPE_CHECKING:
    from slrc.api import capture, compile, form, lower, plan, structure, train
    from slrc.config import CompileConfig
    from slrc.errors import SlrcError
    from slrc.ir.program import Program
    from slrc.methods.admm import ADMM
    from slrc.methods.magnitude import Magnitude
    from slrc.methods.settings import ADMMSettings, SLRSettings
    from slrc.methods.slr import SLR
    from slrc.reporting.report import Report
    from slrc.sparsity.masks import Masks
    from slrc.sparsity.plans import Plan
    from slrc.training.distillation import soft_divergence
    from slrc.workload import Workload, accuracy, cached_weights, cross_entropy

__version__ = version("slrc")
wait_passively()  # before anything imports torch

# Imported on first use: `import slrc` and `slrc --help` need not wait for torch.
_HOME = {
    "capture": "api",
    "compile": "api",
    "form": "api",
    "lower": "api",
    "plan": "api",
    "structure": "api",
    "train": "api",
    "CompileConfig": "config",
    "SlrcError": "errors",
    "ADMM": "methods.admm",
    "ADMMSettings": "methods.settings",
    "Magnitude": "methods.magnitude",
    "SLR": "methods.slr",
    "SLRSettings": "methods.settings",
    "Masks": "sparsity.masks",
    "Plan": "sparsity.plans",
    "Program": "ir.program",
    "Report": "reporting.report",
    "Workload": "workload",
    "accuracy": "workload",
    "cached_weights": "workload",
    "cross_entropy": "workload",
    "soft_divergence": "training.distillation",
}

__all__ = [
    "ADMM",
    "SLR",
    "ADMMSettings",
    "CompileConfig",
    "Magnitude",
    "Masks",
    "Plan",
    "Program",
    "Report",
    "SLRSettings",
    "SlrcError",
    "Workload",
    "accuracy",
    "cached_weights",
    "capture",
    "compile",
    "cross_entropy",
    "form",
    "lower",
    "plan",
    "soft_divergence",
    "structure",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slrc' has no attribute {name!r}")
    return getattr(import_module(f"slrc.{_HOME[name]}"), name)
