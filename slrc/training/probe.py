"""The fixed batches on which methods take f, the workload's loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from slrc.errors import TrainingError, WorkloadError
from slrc.training.batches import seed_epoch, share_of_first
from slrc.training.run import Run
from slrc.training.steps import call_loss


class Probe:
    """The first batches, read once, from a seed of their own, so that a resumed run takes the same.

    Raises:
        WorkloadError: there are none.
    """

    def __init__(self, run: Run) -> None:
        batches, accelerator = run.workload.train_batches, run.accelerator
        assert batches is not None
        seed_epoch(batches, run.config.seed, "probe", 0)
        index, processes = accelerator.process_index, accelerator.num_processes
        first = share_of_first(batches, run.config.probe_batches, index, processes)
        self._run = run
        self._batches: list[Any] = [send_to_device(batch, accelerator.device) for batch in first]
        if not self._batches:
            raise WorkloadError(
                "`train_batches` yielded nothing", hint="check the data folder and the loader's batch size"
            )

    def loss(self, model: nn.Module, epochs: int) -> float:
        """Return f after so many epochs, in evaluation mode and without a gradient.

        Raises:
            TrainingError: it is not finite.
        """
        training = model.training
        self._run.placement.follow_first(model)
        model.eval()
        with torch.no_grad(), self._run.accelerator.autocast():
            losses = [call_loss(self._run.workload, model, batch) for batch in self._batches]
        model.train(training)
        mean = torch.stack([loss.float() for loss in losses]).mean()
        value = float(self._run.accelerator.reduce(mean, reduction="mean"))
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} on the probe batches, in evaluation mode, after {epochs} epochs",
                hint="lower the learning rate or the penalty (`rho`), or check the model's running statistics",
            )
        return value
