"""The metric of a model between its epochs, and the statistics of batch norms that it needs for that."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slrc.config import CompileConfig
from slrc.errors import WorkloadError
from slrc.training.batch_norm import adopt_statistics, recalibrate_batch_norm
from slrc.training.batches import Dealt, seed_epoch
from slrc.training.sharding import copy_state, follow_first, is_sharded, shard
from slrc.training.steps import call_loss
from slrc.workload import Workload, evaluating, mean, read


class Evaluation:
    """Measures models by the workload's `evaluate`, in float32, and takes statistics on the same batches each time.

    Args:
        workload: has the data and the metric.
        config: has the seed and the number of batches for statistics.
        accelerator: on whose device batches go.
    """

    def __init__(self, workload: Workload, config: CompileConfig, accelerator: Accelerator) -> None:
        self._workload, self._accelerator = workload, accelerator
        self._seed, self._count = config.seed, config.recalibration_batches

    def metric(self, model: nn.Module) -> float | None:
        """Return the leading metric, the same in all processes; `None` where the workload has none.

        Processes share `eval_batches` out, and take over the first one's buffers for that: after a step, batch norm's
        statistics are of a process's own samples. Those whose models are shared out run them equally often, since they
        gather weights together: what stands in for a batch that is missing does not count.
        """
        batches, processes = self._workload.eval_batches, self._accelerator.num_processes
        if batches is None or processes == 1:
            measured = self._workload.measure(model)
            return None if measured is None else measured[1]
        follow_first(model)
        seed_epoch(batches, self._seed, "evaluate", 0)  # a shuffled order has to be that of all
        dealt = Dealt(batches, self._accelerator.process_index, processes, even=is_sharded(model))
        with evaluating(model):
            own = [self._workload.measure_batch(model, batch) for batch in dealt]
        return mean(gather_object(own[: len(own) - dealt.has_stand_in]))[1]

    def twin(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model without the wrapper that casts to the training precision; sharded if that is."""
        if is_sharded(model):
            sharded = shard(twin_of(self._workload.model), self._accelerator)
            copy_state(model, sharded)
            return sharded
        return twin_of(model)

    def recalibrate(self, model: nn.Module) -> None:
        """Take batch norm's statistics anew. See `recalibrate_batch_norm`."""
        self._take(recalibrate_batch_norm, model)

    def adopt_statistics(self, model: nn.Module) -> None:
        """Take batch norm's statistics anew, and compute the same. See `adopt_statistics`."""
        self._take(adopt_statistics, model)

    def _take(self, take: Callable[..., None], model: nn.Module) -> None:
        batches = self._workload.train_batches
        if batches is None or not self._count:
            return
        seed_epoch(batches, self._seed, "recalibrate", 0)
        on_device = (send_to_device(batch, self._accelerator.device) for batch in read(batches))
        take(model, lambda model, batch: call_loss(self._workload, model, batch), on_device, self._count)


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of a whole model without the wrapper that casts to the training precision."""
    # A tensor with a gradient that `forward` kept, such as an auxiliary loss, cannot be copied as it is.
    held = [t for m in model.modules() for t in pytree.tree_leaves(vars(m)) if isinstance(t, Tensor)]
    twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})
    unwrap(twin)
    return twin


def check_finite(metric: float | None, of: str) -> None:
    """Raise a `WorkloadError` for a metric that is not finite, `of` what."""
    if metric is not None and not math.isfinite(metric):
        raise WorkloadError(
            f"`evaluate` returned {metric}{of}",
            hint="its leading metric must be finite: look for a division by zero, or a loss that overflows",
        )


def unwrap(model: nn.Module) -> None:
    """Undo what accelerate does to `forward` for mixed precision; its own undoing strips the user's decorators too."""
    model.__dict__.pop("_is_accelerate_prepared", None)  # else a second run would train in the first one's precision
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original
