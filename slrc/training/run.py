"""What the parts of one training run share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor

from slrc.config import CompileConfig
from slrc.options import Precision
from slrc.progress import Reporter
from slrc.training import sharding
from slrc.training.batches import count_steps
from slrc.training.evaluation import Evaluation
from slrc.training.placement import Whole, placement_of
from slrc.training.steps import Stopwatch
from slrc.workload import Workload

ON_CPU = not torch.accelerator.is_available()
"""Told so, `accelerate` takes several processes on a CPU for a distributed run; it does not by itself."""
MIXED_PRECISION = {Precision.FP32: "no", Precision.BF16: "bf16", Precision.FP16: "fp16"}


@dataclass(frozen=True)
class Run:
    """The user's workload and options, and what talks to devices and other processes."""

    workload: Workload
    config: CompileConfig
    reporter: Reporter
    accelerator: Accelerator
    placement: Whole
    evaluation: Evaluation
    stopwatch: Stopwatch

    @staticmethod
    def of(workload: Workload, config: CompileConfig, reporter: Reporter) -> Run:
        """Return a new run, in the processes that were launched."""
        AcceleratorState._reset_state()  # else the first run's precision holds for the whole process
        with sharding.left_to_us():
            accelerator = Accelerator(
                cpu=ON_CPU,
                mixed_precision=MIXED_PRECISION[config.precision],
                dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
            )
        evaluation, stopwatch = Evaluation(workload, config, accelerator), Stopwatch(accelerator.device)
        return Run(workload, config, reporter, accelerator, placement_of(accelerator), evaluation, stopwatch)

    @cached_property
    def epoch_steps(self) -> int:
        """Steps of an epoch in each process."""
        assert self.workload.train_batches is not None
        return count_steps(self.workload.train_batches, self.accelerator.num_processes, self.config.seed)

    def mean_of_processes(self, value: float) -> float:
        """Return the mean of what the processes have."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return float(reduced)
