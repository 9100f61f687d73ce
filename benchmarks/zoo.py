"""Channel structure on whole families of models: captured, slimmed, proven equal, exported, timed.

    python benchmarks/zoo.py                       # torchvision's classification and segmentation, 67 of timm
    python benchmarks/zoo.py torchvision:resnet18 timm:convnext_tiny --sparsity 0.5
    python benchmarks/zoo.py --no-latency          # what can be told on a busy machine

Weights are random: nothing is learned here, the question is whether the structure holds. Each model runs in a process
of its own, so that a bad one ends nothing; rows are written as they come to `benchmarks/results/zoo.json`, and a second
run goes on with what is missing. Where the package `torch-pruning` is installed it runs beside with its defaults. The
whole list takes about two hours on two cores, half of that without latency.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "zoo.json"
TIMEOUT_S = 900
LEVELS = (0.3, 0.5, 0.7)
TIMM = Path(__file__).with_name("zoo_timm.txt")
"""One model of each family of timm."""


def default_models() -> list[str]:
    """Return all classification and segmentation models of torchvision and one of each family of timm."""
    import torchvision

    modules = (torchvision.models, torchvision.models.segmentation)
    names = [n for module in modules for n in torchvision.models.list_models(module=module)]
    return [f"torchvision:{n}" for n in names] + [f"timm:{n}" for n in TIMM.read_text().split()]


def make(name: str) -> tuple[Any, tuple[Any, ...]]:
    """Return a model with random weights, scales and statistics, and an input for it."""
    import torch

    source, _, model_name = name.partition(":")
    if source == "timm":
        import timm

        model, config = timm.create_model(model_name), timm.get_pretrained_cfg(model_name)
        size = config.input_size[-1] if config else 224
    else:
        import torchvision

        is_segmentation = model_name in torchvision.models.list_models(module=torchvision.models.segmentation)
        backbone = {"weights_backbone": None} if is_segmentation else {}
        model, size = torchvision.models.get_model(model_name, weights=None, **backbone), 224
        size = 299 if model_name == "inception_v3" else size
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif not parameter.any():
                parameter.normal_(0, 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), (torch.randn(1, 3, size, size),)


def measure_model(name: str, levels: list[float], latency: bool) -> dict[str, Any]:
    """Return one row: the analysis, and for each level what was left and how exact it is."""
    from slrc.passes.label_indices import label_indices
    from slrc.program import capture

    model, inputs = make(name)
    started = time.perf_counter()
    program = capture(model, inputs, name)
    captured = time.perf_counter()
    labels = label_indices(program)
    row: dict[str, Any] = {
        "capture_s": captured - started,
        "analysis_s": time.perf_counter() - captured,
        "operators": sum(1 for _ in program.nodes),
        "groups": len(labels.groups),
        "unruled": dict(labels.unruled),
        "parameters": program.num_parameters,
        "macs": program.macs,
        "dynamic_batch": program.batch_is_dynamic,
        "levels": {str(level): measure_level(program, level, latency) for level in levels},
    }
    return row


def measure_level(program: Any, level: float, latency: bool) -> dict[str, Any]:
    """Prune by magnitude in one shot; compare masked, slim and ONNX Runtime; time the latter."""
    import slrc
    from slrc.backends import get_backend, parse_target
    from slrc.compilation import flat_inputs
    from slrc.passes.apply_masks import ApplyMasks
    from slrc.pipeline import DENSE, STRUCTURE, run_passes
    from slrc.plans import Masks
    from slrc.timing import measure
    from slrc.verify import compare, outputs_of

    plan = slrc.plan(program, "channel", level)
    masks = Masks.project(plan, program.tensors)
    masked = ApplyMasks()(program, plan, masks).program
    slim = run_passes(STRUCTURE, masked, plan, masks)
    reference, outputs = (outputs_of(p.module(), p.example_inputs) for p in (masked, slim))
    touched = {s.tensor for c in plan for s in c.members + c.followers}
    result: dict[str, Any] = {
        "prunable_share": sum(program.tensors[t].numel() for t in touched) / program.num_parameters,
        "reached": plan.sparsity,
        "parameters": slim.num_parameters,
        "macs": slim.macs,
        "slim_error": compare("slim", reference, outputs, float("inf")).max_rel_error,
    }
    backend, inputs = get_backend(parse_target("ort")), flat_inputs(slim)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(slrc.lower(slim, "ort", Path(folder) / "compiled").folder)
        runner = backend.load(compiled, threads=1)
        result["ort_error"] = compare("ort", outputs, runner(*inputs), float("inf")).max_rel_error
        if latency:
            dense = run_passes(DENSE, program, plan, Masks())
            slow = backend.load(slrc.lower(dense, "ort", Path(folder) / "dense").folder, threads=1)
            timed = measure("ort", slow, runner, inputs, threads=1)
            result["dense_ms"], result["compiled_ms"] = timed.dense_ms.p50, timed.compiled_ms.p50
            result["speedup"] = timed.speedup
    return result


def measure_torch_pruning(name: str) -> dict[str, Any]:
    """Run torch-pruning with its defaults at 50 %; its result counts as correct if it equals the zeroed dense model."""
    import torch
    import torch_pruning as tp

    model, inputs = make(name)
    ends = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    started = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=ends
    )
    pruner.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        model(*inputs)
    return {"worked": True, "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


def run_alone(name: str, job: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one job in a process of its own; what goes wrong is the row."""
    command = [sys.executable, __file__, name, "--job", job, "--sparsity", *map(str, args.sparsity)]
    command += ["--no-latency"] if args.no_latency else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIMEOUT_S} s"}
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(line)
    return {"failed": f"ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}


def run_job(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Do one job in this process."""
    try:
        if args.job == "torch-pruning":
            return measure_torch_pruning(name)
        return measure_model(name, args.sparsity, not args.no_latency)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def show(name: str, row: dict[str, Any]) -> str:
    """Return one line of the table, at the middle level."""
    if "failed" in row:
        return f"{name:44} {row['failed'][:90]}"
    levels = row["levels"]
    level = levels.get("0.5") or next(iter(levels.values()))
    slim = max(x["slim_error"] for x in levels.values())
    ort = max(x["ort_error"] for x in levels.values())
    speedup = f"{level['speedup']:.2f}x" if "speedup" in level else ""
    return (
        f"{name:44} {row['groups']:4} {level['prunable_share']:5.0%} "
        f"{1 - level['parameters'] / row['parameters']:5.0%} {1 - level['macs'] / row['macs']:5.0%} "
        f"{slim:8.1e} {ort:8.1e} {row['analysis_s']:6.2f} {speedup:>7}"
    )


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="torchvision:NAME or timm:NAME; all by default")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--again", action="store_true", help="also models that have a row already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--job", choices=["slrc", "torch-pruning"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(args.models[0], args)))
        return
    beside = importlib.util.find_spec("torch_pruning") is not None
    rows: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    header = ("model", "grps", "reach", "par.", "MACs", "slim", "ort", "s", "faster")
    print(
        f"{header[0]:44} {header[1]} {header[2]:>5} {header[3]:>5} {header[4]:>5} {header[5]:>8} {header[6]:>8} ",
        end="",
    )
    print(f"{header[7]:>6} {header[8]:>7}")
    for name in args.models or default_models():
        if name not in rows or args.again:
            rows[name] = run_alone(name, "slrc", args)
            if beside:
                rows[name]["torch_pruning"] = run_alone(name, "torch-pruning", args)
            args.results.parent.mkdir(exist_ok=True)
            aside = args.results.with_suffix(".partial")
            aside.write_text(json.dumps(rows, indent=1) + "\n")
            aside.replace(args.results)
        print(show(name, rows[name]), flush=True)
    failed = sum("failed" in row for row in rows.values())
    exact = sum(
        all(x["slim_error"] <= 1e-4 and x["ort_error"] <= 1e-4 for x in row["levels"].values())
        for row in rows.values()
        if "levels" in row
    )
    print(f"\n{len(rows)} models, {exact} exact to 1e-4 at every level, {failed} failed")


if __name__ == "__main__":
    main()
