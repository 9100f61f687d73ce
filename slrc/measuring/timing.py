"""Latency, dense against compiled, in turns in one process."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
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

WARM_UP_S = 0.5
BUDGET_S = 6.0
BLOCKS = 10
PER_BLOCK = (2, 100)
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


class Percentiles(BaseModel):
    """Milliseconds of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float
    p90: float


class Latency(BaseModel):
    """Dense against compiled on one target.

    `speedup` is the ratio of the medians; `speedup_spread` the least and greatest ratio over blocks of alternating
    runs. `predicted_ms` is what the plan expected of the compiled model, given the dense one's median; `None` where the
    plan was not made for a latency.
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


@denormals.taken_for_zero()
def measure(
    target: str,
    dense: Runner,
    compiled: Runner,
    inputs: Sequence[Tensor],
    threads: int,
    reporter: Reporter | None = None,
) -> Latency:
    """Time two loaded artifacts on the same inputs: warm-up, then A B, B A, A B … in ten blocks.

    Each turn is two runs, of which the second counts: a model in use finds its weights where its own last run left
    them in the caches, not where the other model has driven them out. Denormal numbers are taken for zero.
    """
    calls = (dense.prepare(*inputs), compiled.prepare(*inputs))
    pace = max(_warm_up(call) for call in calls)
    runs = min(max(int(BUDGET_S / BLOCKS / (4 * pace)), PER_BLOCK[0]), PER_BLOCK[1])
    times: tuple[list[float], list[float]] = ([], [])
    ratios = []
    with (reporter or Quiet()).task(f"timing {target}", BLOCKS) as task:
        for _ in range(BLOCKS):
            block: tuple[list[float], list[float]] = ([], [])
            for i in range(runs):
                for which in (0, 1) if i % 2 else (1, 0):
                    calls[which]()
                    block[which].append(_time_ms(calls[which]))
            ratios.append(statistics.median(block[0]) / statistics.median(block[1]))
            times[0].extend(block[0])
            times[1].extend(block[1])
            task.advance(f"{ratios[-1]:.2f}x")
    slow, fast = _percentiles(times[0]), _percentiles(times[1])
    return Latency(
        target=target,
        threads=threads,
        batch=int(inputs[0].shape[0]) if inputs and inputs[0].dim() else 1,
        dense_ms=slow,
        compiled_ms=fast,
        speedup=slow.p50 / fast.p50,
        speedup_spread=(min(ratios), max(ratios)),
        runs=BLOCKS * runs,
    )


def time_pair(
    dense: LoweredProgram,
    compiled: LoweredProgram,
    inputs: Sequence[Tensor],
    threads: int | None,
    reporter: Reporter | None = None,
) -> Latency:
    """Load both artifacts of a target and time them in turns."""
    backend = get_backend(compiled.target)
    count = threads or usable_cores()
    runners = [backend.load(p.folder, threads=count) for p in (dense, compiled)]
    return measure(str(compiled.target), runners[0], runners[1], inputs, count, reporter)


@denormals.taken_for_zero()
def time_in_turns(calls: Sequence[Callable[[], Any]], budget_s: float) -> list[float]:
    """Return the milliseconds of each call: the lower quartile of runs in turns, which other work disturbs least."""
    pace = sum(_warm_up(call, budget_s / 4 / len(calls)) for call in calls)
    rounds = min(max(int(budget_s / pace), 8), 2000)
    times = [[_time_ms(call) for call in calls] for _ in range(rounds)]
    return [statistics.quantiles(one, n=4)[0] for one in zip(*times, strict=True)]


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


def _warm_up(call: Callable[[], Any], least_s: float = WARM_UP_S) -> float:
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


def _percentiles(times: list[float]) -> Percentiles:
    return Percentiles(p50=statistics.median(times), p90=statistics.quantiles(times, n=10)[-1])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
