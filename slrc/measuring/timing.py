"""How programs are timed: in turns in one process. What is reported, and what forms and widths are chosen by, alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from slrc.backends import LoweredProgram, Runner, get_backend
from slrc.machine import denormals
from slrc.machine.cores import usable_cores
from slrc.machine.processor import processor
from slrc.progress import Quiet, Reporter

BLOCKS = 10
"""How many parts of a measurement tell how far it spreads."""
MOST_ROUNDS = 1000
PATIENCE = 1.0
"""The share of its seconds that every measurement takes."""
INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
)


@dataclass(frozen=True)
class Budget:
    """How long to time: seconds for all calls together, a quarter of them to warm up, and a least number of rounds.

    In a `race` only the fastest is asked for: a call that clearly is slower takes no more turns, until one is left.
    """

    seconds: float
    least_rounds: int
    race: bool = False


REPORT = Budget(6.0, 2 * BLOCKS)
"""What is reported of a model."""
WHOLE = Budget(5.0, 8)
"""A whole network at several widths."""
PART = Budget(0.6, 6)
"""A layer at several widths."""
WHOLE_RACE, PART_RACE = (Budget(budget.seconds, budget.least_rounds, race=True) for budget in (WHOLE, PART))
"""The same network, and the same layer, in several forms."""
RACE_ROUNDS = 3
"""The rounds that every call of a race takes."""
RACE_LEAD = 1.1


class Percentiles(BaseModel):
    """Milliseconds of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float
    p90: float


class Latency(BaseModel):
    """Dense against compiled on one target.

    Each block of alternating runs has a ratio of its medians, dense over compiled: `speedup` is the median of those
    ratios, `speedup_spread` the least and the greatest. A machine whose pace changes from one block to the next changes
    both models' milliseconds, and no ratio.

    `predicted_ms` is what the plan expected of the compiled model, given the dense one's median; `None` where the plan
    was not made for a latency. `device` is where it was measured, empty for this machine, and `caveats` what makes the
    figures less than they seem, such as clocks that are not locked. `states` is what a device said before and after:
    clock, governor, power mode, temperature, load.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    threads: int
    batch: int
    dense_ms: Percentiles
    compiled_ms: Percentiles
    speedup: float
    speedup_spread: tuple[float, float]
    runs: int
    predicted_ms: float | None = None
    device: str = ""
    caveats: tuple[str, ...] = ()
    states: Mapping[str, Mapping[str, Any]] = {}


@denormals.taken_for_zero()
def time_in_turns(
    calls: Sequence[Callable[[], Any]], budget: Budget, what: str = "", reporter: Reporter | None = None
) -> list[list[float]]:
    """Return the milliseconds of every call in every round: in the order of the calls, then back, then again.

    Each turn is two runs, of which the second counts: a model in use finds its weights where its own last run left
    them in the caches, not where another model has driven them out. Denormal numbers are taken for zero.
    """
    if not calls:
        return []
    seconds = budget.seconds * PATIENCE
    pace = sum(_warm_up(call, seconds / 4 / len(calls)) for call in calls)
    rounds = min(max(int(seconds * 0.75 / (2 * pace)), budget.least_rounds), MOST_ROUNDS)
    times: list[list[float]] = [[] for _ in calls]
    running = list(range(len(calls)))
    with (reporter or Quiet()).task(what, rounds) as task:
        for i in range(rounds):
            for k in running if i % 2 == 0 else reversed(running):
                calls[k]()
                times[k].append(_time_ms(calls[k]))
            if budget.race and i + 1 >= RACE_ROUNDS:
                running = _in_race(running, times)
                if len(running) == 1:
                    break
            task.advance()
    return times


def _in_race(running: Sequence[int], times: Sequence[Sequence[float]]) -> list[int]:
    """Return the calls a quarter of whose runs are about as fast as the slowest quarter of the fastest call's."""
    leader = sorted(times[min(running, key=lambda k: statistics.median(times[k]))])
    behind = leader[-1 - len(leader) // 4]
    return [k for k in running if sorted(times[k])[len(times[k]) // 4] <= RACE_LEAD * behind]


def medians(times: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of each call's milliseconds."""
    return [statistics.median(one) for one in times]


def measure(
    target: str,
    dense: Runner,
    compiled: Runner,
    inputs: Sequence[Tensor],
    threads: int,
    reporter: Reporter | None = None,
    budget: Budget = REPORT,
) -> Latency:
    """Time two loaded artifacts on the same inputs, in `BLOCKS` rounds at least. See `time_in_turns`."""
    calls = (dense.prepare(*inputs), compiled.prepare(*inputs))
    slow, fast = time_in_turns(calls, budget, f"timing {target}", reporter)
    return latency_of(target, in_blocks(slow, fast), inputs, threads)


def in_blocks(slow: Sequence[float], fast: Sequence[float]) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Return the milliseconds of two calls that took `BLOCKS` turns at least, in so many blocks."""
    size = len(slow) // BLOCKS
    ends = [*range(size, BLOCKS * size, size), len(slow)]
    return [(slow[start:end], fast[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def latency_of(
    target: str,
    blocks: Sequence[tuple[Sequence[float], Sequence[float]]],
    inputs: Sequence[Tensor],
    threads: int,
    *,
    device: str = "",
    caveats: Sequence[str] = (),
    states: Mapping[str, Mapping[str, Any]] | None = None,
) -> Latency:
    """Return what the milliseconds of dense and compiled turns, in blocks, say of two artifacts."""
    slow, fast = ([ms for block in blocks for ms in block[k]] for k in (0, 1))
    ratios = [statistics.median(a) / statistics.median(b) for a, b in blocks]
    return Latency(
        target=target,
        threads=threads,
        batch=int(inputs[0].shape[0]) if inputs and inputs[0].dim() else 1,
        dense_ms=percentiles(slow),
        compiled_ms=percentiles(fast),
        speedup=statistics.median(ratios),
        speedup_spread=(min(ratios), max(ratios)),
        runs=len(slow),
        device=device,
        caveats=tuple(caveats),
        states=states or {},
    )


def time_pair(
    dense: LoweredProgram,
    compiled: LoweredProgram,
    inputs: Sequence[Tensor],
    threads: int | None,
    reporter: Reporter | None = None,
) -> Latency:
    """Load both artifacts of a target and time them in turns."""
    return time_with(dense, compiled, {}, inputs, threads, reporter)[0]


def time_with(
    dense: LoweredProgram,
    compiled: LoweredProgram,
    others: Mapping[str, LoweredProgram],
    inputs: Sequence[Tensor],
    threads: int | None,
    reporter: Reporter | None = None,
) -> tuple[Latency, dict[str, Percentiles]]:
    """Load both artifacts of a target, and others by name, and time all in turns; return what the others take too."""
    target, count = compiled.target, threads or usable_cores()
    runners = [get_backend(x.target).load(x.folder, threads=count) for x in (dense, compiled, *others.values())]
    calls = [runner.prepare(*inputs) for runner in runners]
    slow, fast, *rest = time_in_turns(calls, REPORT, f"timing {target}", reporter)
    latency = latency_of(str(target), in_blocks(slow, fast), inputs, count)
    return latency, dict(zip(others, map(percentiles, rest), strict=True))


def environment() -> dict[str, Any]:
    """Return what a figure depends on: processor, instruction sets, cores, versions."""
    here = processor()
    packages = ("slrc", "torch", "onnx", "onnxruntime", "accelerate", "numpy", "tensorrt-rtx", "tensorrt")
    return {
        "cpu": here.name,
        "instruction_sets": [f for f in INSTRUCTION_SETS if f in here.features],
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def _warm_up(call: Callable[[], Any], least_s: float) -> float:
    """Run for a while; return the seconds of a run."""
    started, runs = time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - started < least_s:
        call()
        runs += 1
    return (time.perf_counter() - started) / runs


def _time_ms(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def percentiles(times: Sequence[float]) -> Percentiles:
    """Return the percentiles of some milliseconds."""
    return Percentiles(p50=statistics.median(times), p90=statistics.quantiles(times, n=10)[-1])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
