"""Dense against pruned networks on a CUDA GPU, in PyTorch and, where they are installed, TensorRT and TensorRT-RTX.

    python benchmarks/gpu_latency.py                  # all, in eight minutes
    python benchmarks/gpu_latency.py --dry-run        # tiny networks on the CPU: whether it works, in seconds

Random weights, pruned by magnitude in one shot: how fast a network is does not depend on what it has learnt. Each
network is timed dense, with half and a quarter of its channels, and with 2:4 weights, in turns, in three precisions and
at two batch sizes. In PyTorch a network is one CUDA graph of its operators; 2:4 weights are PyTorch's semi-structured
tensors, which there are for linear layers in half precision. Then what `slrc compile` would write is timed: packages of
AOTInductor, then engines. Each must return what the eager network does with its masks applied, in float32. Last, a
training step with and without SLR. What there is no time for is left out, and said. Rows go to
`benchmarks/results/gpu_latency.json`, but those of a dry run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_networks import CLASSES, NETWORKS
from results import Row, Rows
from torch import Tensor, nn

import slrc
from slrc.backends import get_backend, parse_target
from slrc.ir.program import Program
from slrc.measuring.timing import Budget, time_in_turns
from slrc.pipeline import baseline, lower
from slrc.training.batch_norm import recalibrate_batch_norm
from slrc.user_code import reason_of
from slrc.verify import outputs_of

DENSE, PAIRS = "dense", "2:4"
PATTERNS = {DENSE: None, "channel 50%": ("channel", 0.5), "channel 75%": ("channel", 0.75), PAIRS: ("2:4", None)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Of the largest value. What is off by more is shown as wrong."""
EMITTED = (DENSE, "channel 50%", PAIRS)
"""What is emitted for the targets, whose compilers take long."""
FOR_A_PACKAGE_S = 90
"""How long a package or an engine may take to build: with less time left none is begun."""
UPDATES = 10


@dataclass
class Run:
    """Where and how long to measure, and the rows so far."""

    dry: bool
    deadline: float
    store: Callable[[str, Row], object]
    rows: dict[str, Row] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where networks run."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def batches(self) -> tuple[int, int]:
        """Of the networks' inputs."""
        return (1, 2) if self.dry else (1, 64)

    @property
    def budget(self) -> Budget:
        """Of the networks that are timed in turns."""
        return Budget(0.0, 3) if self.dry else Budget(1.0, 10)

    @property
    def targets(self) -> tuple[str, ...]:
        """What networks are emitted for; a dry run compiles no package, which takes long."""
        return ("ort",) if self.dry else ("torch:cuda+fp16", "tensorrt:fp16", "tensorrt-rtx:fp16")

    @property
    def seconds_left(self) -> float:
        """Until the end."""
        return self.deadline - time.monotonic()

    def add(self, key: str, row: Row) -> None:
        """Keep a row."""
        self.rows[key] = row
        self.store(key, row)


@dataclass(frozen=True)
class Variant:
    """A network pruned by a pattern: the slim program, and the eager network with its masks applied."""

    program: Program
    masked: nn.Module
    constrained: frozenset[str]
    """The weights with zeros, by name."""


def variants_of(name: str, run: Run) -> dict[str, Variant]:
    """Return a network dense and pruned by each pattern."""
    found, (dense, pixels) = {}, made(name, run)
    for label, pattern in PATTERNS.items():
        model = copy.deepcopy(dense).eval().requires_grad_(False)
        program = slrc.capture(slrc.Workload(model=model, example_inputs=(torch.randn(1, 3, pixels, pixels),)))
        if pattern is None:
            found[label] = Variant(baseline(program), model, frozenset())
            continue
        plan = slrc.plan(program, *pattern)
        masks = slrc.Masks.project(plan, program.tensors)
        masks.apply_(dict(model.named_parameters(remove_duplicate=False)))
        found[label] = Variant(slrc.structure(program, plan, masks), model, frozenset(masks.tensors))
    return found


def made(name: str, run: Run) -> tuple[nn.Module, int]:
    """Return a network and the side of its input. Its batch norms have the statistics of random images.

    Else values shrink from layer to layer until nothing of them reaches the outputs that are compared.
    """
    network = NETWORKS[name]
    make, pixels = (network.tiny, network.tiny_pixels) if run.dry else (network.make, network.pixels)
    torch.manual_seed(0)
    model = make().to(run.device)
    random = torch.randn(8, 3, pixels, pixels, device=run.device)
    recalibrate_batch_norm(model, lambda module, x: module(x), [random], 1)
    return model.cpu(), pixels


def images(variant: Variant, batch: int, run: Run) -> Tensor:
    """Return random images of a network's size on the device."""
    torch.manual_seed(1)
    return torch.randn(batch, *variant.program.flat_inputs()[0].shape[1:]).to(run.device)


def error_of(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference, as a share of the largest value."""
    pairs = zip(expected, found, strict=True)
    return max(float((a.cpu() - b.cpu().float()).abs().max() / a.cpu().abs().max()) for a, b in pairs)


def expected_of(variant: Variant, x: Tensor) -> list[Tensor]:
    """Return what the eager network returns in float32."""
    expected = outputs_of(variant.masked.to(x.device), (x,))
    variant.masked.cpu()
    return expected


def semi_structured(module: nn.Module, names: frozenset[str]) -> str:
    """Store the 2:4 weights of linear layers as semi-structured tensors; return why none is, or `""`."""
    from torch.sparse import to_sparse_semi_structured

    count = 0
    for name in names:
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weight = getattr(owner, leaf)
        if weight.dim() == 2:
            setattr(owner, leaf, nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False))
            count += 1
    return "" if count else "PyTorch has no 2:4 kernel for convolutions"


def graphed(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a call that runs a module on an input and waits for it: on a GPU, as one CUDA graph."""
    if x.device.type == "cpu":
        return lambda: module(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


def prepared(variant: Variant, label: str, precision: str, x: Tensor, run: Run) -> tuple[Callable[[], object], float]:
    """Return a call that runs a variant in PyTorch, and its error.

    Raises:
        RuntimeError: PyTorch has no kernels for it.
    """
    dtype = DTYPES[precision]
    module = variant.program.module().to(run.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if label == PAIRS:
        if dtype == torch.float32 or run.dry:
            raise RuntimeError("PyTorch's 2:4 kernels are for half precision on a GPU")
        if reason := semi_structured(module, variant.constrained):
            raise RuntimeError(reason)
    given = x.to(dtype).contiguous(memory_format=torch.channels_last)
    error = error_of(expected_of(variant, x), outputs_of(module, (given,)))
    return graphed(module, given), error


@torch.no_grad()
def measure_torch(name: str, variants: dict[str, Variant], precision: str, batch: int, run: Run) -> None:
    """Time a network's variants in turns, in PyTorch."""
    x = images(variants[DENSE], batch, run)
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for label, variant in variants.items():
        try:
            calls[label], errors[label] = prepared(variant, label, precision, x, run)
        except Exception as error:  # whatever PyTorch has no kernel or no memory for: the others go on
            missing[label] = reason_of(error)
    if DENSE in calls:
        times = time_in_turns(list(calls.values()), run.budget)
        add_rows(run, name, precision, batch, "torch", dict(zip(calls, times, strict=True)), errors)
    for label, reason in missing.items():
        run.add(key(name, label, precision, batch, "torch"), {"why_not": reason})


@torch.no_grad()
def measure_target(name: str, variants: dict[str, Variant], text: str, run: Run) -> None:
    """Time what a compile writes of some variants for a target, in turns."""
    target = parse_target(text)
    backend, precision = get_backend(target), text.partition("fp16")[1] or "fp32"
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for label in EMITTED:
            if run.seconds_left < FOR_A_PACKAGE_S and not run.dry:
                run.left_out.append(f"{name} {label} on {text}")
                continue
            try:
                lowered = lower(variants[label].program, target, Path(folder) / str(len(runners)))
                runners[label] = backend.load(lowered.folder, threads=1)
            except Exception as error:  # whatever the target cannot take: the others go on
                run.add(key(name, label, precision, 0, text), {"why_not": reason_of(error)})
        for batch in run.batches:
            calls, errors = {}, {}
            for label, runner in runners.items():
                x = images(variants[label], batch, run)
                try:
                    errors[label] = error_of(expected_of(variants[label], x), runner(x))
                    calls[label] = runner.prepare(x)
                except Exception as error:  # such as a batch that an engine does not take
                    run.add(key(name, label, precision, batch, text), {"why_not": reason_of(error)})
            if DENSE in calls:
                times = time_in_turns(list(calls.values()), run.budget)
                add_rows(run, name, precision, batch, text, dict(zip(calls, times, strict=True)), errors)


def add_rows(
    run: Run,
    name: str,
    precision: str,
    batch: int,
    runtime: str,
    times: dict[str, list[float]],
    errors: dict[str, float],
) -> None:
    """Keep what was timed in turns."""
    for label, took in times.items():
        ms, dense_ms = statistics.median(took), statistics.median(times[DENSE])
        row = {"ms": ms, "dense_ms": dense_ms, "speedup": dense_ms / ms, "error": errors[label], "runs": len(took)}
        run.add(key(name, label, precision, batch, runtime), row | {"right": errors[label] <= TOLERANCES[precision]})


def key(name: str, label: str, precision: str, batch: int, runtime: str) -> str:
    """Return a row's key."""
    return f"{name}, {label}, {precision}, batch {batch or 'any'}, {runtime}"


def measure_training(run: Run) -> None:
    """Time a training step of ResNet-50 with and without SLR, in turns."""
    model, pixels = made("resnet50", run)
    x, y = torch.randn(run.batches[1], 3, pixels, pixels), torch.randint(CLASSES, run.batches[1:])
    program = slrc.capture(slrc.Workload(model=model, example_inputs=(x[:1],)))
    plan = slrc.plan(program, "channel", 0.5)
    model, x, y = model.to(run.device).train(), x.to(run.device), y.to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    slr = slrc.SLR(dict(model.named_parameters(remove_duplicate=False)), plan, updates=UPDATES)

    def loss() -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16):
            return nn.functional.cross_entropy(model(x), y)

    def probe() -> float:
        with torch.no_grad():
            return float(loss())

    def step(penalised: bool) -> None:
        loss().backward()
        if penalised:
            slr.add_penalty_gradient()
        optimizer.step()
        if penalised:
            slr.after_step()
        optimizer.zero_grad()
        if not run.dry:
            torch.cuda.synchronize()

    slr.start(probe)
    plain, with_slr = map(statistics.median, time_in_turns([lambda: step(False), lambda: step(True)], run.budget))
    row = {"ms": with_slr, "dense_ms": plain, "added": with_slr / plain - 1}
    run.add(key("resnet50", "a training step with SLR", "bf16", run.batches[1], "torch"), row)


def measure_all(names: Sequence[str], run: Run) -> None:
    """Measure what there is time for, in PyTorch first."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    variants: dict[str, dict[str, Variant]] = {}
    for name in names:
        variants[name] = variants_of(name, run)
        for batch in run.batches:
            for precision in DTYPES:
                if run.seconds_left > 0:
                    measure_torch(name, variants[name], precision, batch, run)
                else:
                    run.left_out.append(key(name, "all", precision, batch, "torch"))
    if run.seconds_left > 0:
        measure_training(run)
    for text in run.targets:
        if reason := next(filter(None, get_backend(parse_target(text)).available(parse_target(text))), ""):
            run.left_out.append(f"{text}: {reason}")
            continue
        for name in names:
            measure_target(name, variants[name], text, run)


def lines_of(run: Run) -> Iterator[str]:
    """Yield the table, and what was left out."""
    yield f"{'':66} {'dense':>10} {'':>10} {'speed-up':>8} {'error':>7}"
    for name, row in run.rows.items():
        if "why_not" in row:
            yield f"{name:66} not run: {row['why_not']}"
        elif "added" in row:
            yield f"{name:66} {row['dense_ms']:7.3f} ms {row['ms']:7.3f} ms {row['added']:+8.1%}"
        else:
            told = "" if row["right"] else "  WRONG"
            times = f"{row['dense_ms']:7.3f} ms {row['ms']:7.3f} ms {row['speedup']:7.2f}x"
            yield f"{name:66} {times} {row['error']:7.0e}{told}"
    yield from (f"left out: {text}" for text in run.left_out)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the rows; return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--dry-run", action="store_true", help="tiny networks on the CPU, in ONNX Runtime and PyTorch")
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU that torch can use: `--dry-run` shows whether the rest works")
    stored = None if args.dry_run else Rows(__file__)
    gpu = {} if args.dry_run else {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    run = Run(
        dry=args.dry_run,
        deadline=time.monotonic() + 60 * args.minutes,
        store=lambda name, row: stored and stored.add(name, row | gpu),
    )
    measure_all(args.networks, run)
    print(*lines_of(run), sep="\n", flush=True)
    return run.rows


if __name__ == "__main__":
    main()
