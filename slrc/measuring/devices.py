"""Where programs are timed: this machine, another one that is reached from here, or none at all.

Whatever is chosen by time asks a `Device`. Where it cannot run a target, or where that takes too long to emit
(`why_not_choose`), forms are chosen by the cost model, and a latency budget cannot be met.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from slrc.backends import LoweredProgram, Target, get_backend
from slrc.backends.engine_summary import EngineSummary
from slrc.machine.cores import usable_cores
from slrc.measuring.timing import Budget, Latency, Percentiles, environment, medians, time_in_turns, time_with
from slrc.progress import Reporter
from slrc.user_code import reason_of
from slrc.verify import Check


class Timing(NamedTuple):
    """The milliseconds of a program; infinite where it cannot be made or run on the target, with the reason."""

    ms: float
    why_not: str = ""


class Candidate(NamedTuple):
    """An artifact's folder, and the flattened inputs that it is timed on."""

    folder: Path
    inputs: Sequence[Tensor]


class Measured(NamedTuple):
    """What two artifacts take, how their outputs compared where they were run anew for it, and engines made of them."""

    latency: Latency
    checks: tuple[Check, ...] = ()
    engines: tuple[EngineSummary | None, EngineSummary | None] = (None, None)
    """Of dense and compiled, where they were built for it."""
    others: Mapping[str, Percentiles] = {}
    """What was timed beside the two, by name."""


class Device(ABC):
    """A machine that programs are timed on."""

    name: str
    """What its user calls it; empty for this machine."""

    @property
    @abstractmethod
    def cores(self) -> int:
        """The number of threads that a runtime has there by default."""

    @abstractmethod
    def conditions(self) -> Mapping[str, Any]:
        """Return what a time depends on besides the program, as JSON values; `cpu` is the processor's name."""

    @abstractmethod
    def why_not_run(self, target: Target) -> str:
        """Return why a target does not run there; empty if it does."""

    def why_not_choose(self, target: Target) -> str:
        """Return why nothing is chosen by time there: a target does not run, or takes too long to emit."""
        return self.why_not_run(target) or get_backend(target).why_not_timed(target)

    def resolve(self, target: Target) -> Target:
        """Return the target that is meant, where one does not say for which processor."""
        return target

    @abstractmethod
    def times(self, target: Target, candidates: Sequence[Candidate], threads: int, budget: Budget) -> Sequence[Timing]:
        """Return what every artifact takes, all timed in turns."""

    @abstractmethod
    def latency(
        self,
        dense: LoweredProgram,
        compiled: LoweredProgram,
        inputs: Sequence[Tensor],
        threads: int | None,
        forms: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
        others: Mapping[str, LoweredProgram] | None = None,
    ) -> Measured:
        """Time two artifacts of a target in turns, as it is reported; others, of the same backend, in the same turns.

        Where outputs differ, an error names the layer and its form, of those in `forms` by the name of the weight.
        """


class LocalDevice(Device):
    """This machine."""

    name = ""

    @property
    def cores(self) -> int:
        """All cores that this process may use."""
        return usable_cores()

    def conditions(self) -> Mapping[str, Any]:
        """Return the processor, its instruction sets, the GPU, and the runtimes' versions."""
        found = environment()
        versions = {n: v for n, v in found["versions"].items() if n.startswith(("slrc", "onnxruntime", "tensorrt"))}
        return {**{k: found[k] for k in ("cpu", "instruction_sets", "gpu")}, **versions}

    def why_not_run(self, target: Target) -> str:
        """Return what the target's backend says of this machine."""
        return get_backend(target).available(target).why_not_run

    def times(self, target: Target, candidates: Sequence[Candidate], threads: int, budget: Budget) -> Sequence[Timing]:
        """Load all and time them in this process."""
        calls = [_prepare(target, candidate, threads) for candidate in candidates]
        running = [call for call in calls if callable(call)]
        took = iter(medians(time_in_turns(running, budget)))
        return [Timing(next(took)) if callable(call) else Timing(math.inf, call) for call in calls]

    def latency(
        self,
        dense: LoweredProgram,
        compiled: LoweredProgram,
        inputs: Sequence[Tensor],
        threads: int | None,
        forms: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
        others: Mapping[str, LoweredProgram] | None = None,
    ) -> Measured:
        """Load all and time them in this process."""
        latency, beside = time_with(dense, compiled, others or {}, inputs, threads, reporter)
        return Measured(latency, others=beside)


@cache
def local_device() -> LocalDevice:
    """Return this machine."""
    return LocalDevice()


def _prepare(target: Target, candidate: Candidate, threads: int) -> Callable[[], Any] | str:
    """Return a call that runs an artifact, after its first run; or why there is none."""
    try:
        call = get_backend(target).load(candidate.folder, threads=threads).prepare(*candidate.inputs)
        call()
    except Exception as error:  # whatever a runtime makes of a program
        return reason_of(error)
    return call
