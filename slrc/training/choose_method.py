"""Which method prunes where none is asked for."""

from __future__ import annotations

from slrc.config import CompileConfig
from slrc.errors import WorkloadError
from slrc.methods.settings import MethodName
from slrc.sparsity.plans import Plan
from slrc.workload import Workload


def choose_method(config: CompileConfig, workload: Workload, plan: Plan | None) -> MethodName:
    """Return the method asked for; without a wish what suits the data and the plan: see the option's text.

    Before there is a plan, one for a latency is expected where a latency is asked for.

    Raises:
        WorkloadError: what was asked for needs training data and there is none.
        ConfigError: training is to start from other weights, and the method refits the dense ones.
    """
    needs_data = config.method not in (None, MethodName.MAGNITUDE) and config.trains
    if workload.train_batches is None and (needs_data or config.retrain_epochs > 0):
        what = f"method `{config.method}`" if needs_data else "retraining"
        without = "reconstruct" if workload.calibration is not None else "magnitude --epochs 0"
        raise WorkloadError(
            f"{what} needs training data, and the workload has none",
            hint=f"give `Workload(train_batches=..., loss=...)`, or use `--method {without}`",
        )
    method = config.method or _default(config, workload, plan)
    if config.start_from is not None:
        config.check_can_start("--start-from", method)
    return method


def _default(config: CompileConfig, workload: Workload, plan: Plan | None) -> MethodName:
    if workload.train_batches is None:
        return MethodName.RECONSTRUCT if workload.calibration is not None else MethodName.MAGNITUDE
    if not config.trains:
        return MethodName.MAGNITUDE
    for_latency = (config.speedup or config.latency_budget) if plan is None else plan.latency
    return MethodName.GRADUAL if for_latency is None else MethodName.RECONSTRUCT
