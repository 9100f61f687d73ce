"""Channel structure on whole families of models: captured, slimmed, proven equal, exported, timed.

    python benchmarks/zoo.py                       # torchvision's classification and segmentation, 67 of timm
    python benchmarks/zoo.py torchvision:resnet18 timm:convnext_tiny --sparsity 0.5
    python benchmarks/zoo.py timm:gmlp_s16_224@narrow   # with what layer norms normalise over
    python benchmarks/zoo.py --no-latency          # what can be told on a busy machine

Weights are random: nothing is learned here, the question is whether the structure holds. Each model runs in a process
of its own, so that a bad one ends nothing; rows are written as they come to `benchmarks/results/zoo.json`, and a second
run goes on with what is missing or out of date. Where the package `torch-pruning` is installed it runs beside with its
defaults; its result counts as correct if it equals the dense model with zeros where it pruned. The whole list takes
about two hours on two cores, half of that without latency.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import Rows

TIMEOUT_S = 900
TIMING_S = 2.0
LEVELS = (0.3, 0.5, 0.7)
TIMM = Path(__file__).with_name("zoo_timm.txt")
"""One model of each family of timm."""
NARROW = "@narrow"
"""Ends the name of a model that is planned with `--layer-norm narrow`."""
NARROWED = (
    *(f"torchvision:convnext_{size}" for size in ("tiny", "small", "base", "large")),
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "timm:convnextv2_nano",
    "timm:gmlp_s16_224",
    "timm:mixer_s32_224",
)
EXACT = 1e-4
"""The largest error relative to the largest output that counts as none."""


def default_models() -> list[str]:
    """Return torchvision's classification and segmentation models, one of each family of timm, and narrowed ones."""
    import torchvision

    modules = (torchvision.models, torchvision.models.segmentation)
    names = [n for module in modules for n in torchvision.models.list_models(module=module)]
    timm = [f"timm:{n}" for n in TIMM.read_text().split()]
    return [*(f"torchvision:{n}" for n in names), *timm, *(n + NARROW for n in NARROWED)]


def make(name: str) -> tuple[Any, tuple[Any, ...]]:
    """Return a model with random weights, scales and statistics, and an input for it."""
    import torch

    torch.manual_seed(0)
    source, _, model_name = name.removesuffix(NARROW).partition(":")
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
    from slrc.ir.program import capture
    from slrc.passes.analysis.label_indices import label_indices
    from slrc.sparsity.choices import LayerNorm

    layer_norm = LayerNorm.NARROW if name.endswith(NARROW) else LayerNorm.KEEP

    model, inputs = make(name)
    started = time.perf_counter()
    program = capture(model, inputs, name)
    captured = time.perf_counter()
    labels = label_indices(program, layer_norm=layer_norm)
    row: dict[str, Any] = {
        "capture_s": captured - started,
        "analysis_s": time.perf_counter() - captured,
        "operators": sum(1 for _ in program.nodes),
        "groups": len(labels.groups),
        "unruled": dict(labels.unruled),
        "parameters": program.num_parameters,
        "macs": program.macs,
        "dynamic_batch": program.batch_is_dynamic,
    }
    dense = load_dense(program) if latency else None
    row["levels"] = {str(level): measure_level(program, level, layer_norm, dense) for level in levels}
    return row


def load_dense(program: Any) -> Any:
    """Return the dense program in ONNX Runtime, on one thread."""
    from slrc.pipeline import baseline

    with tempfile.TemporaryDirectory() as folder:
        return load(baseline(program), Path(folder))


def load(program: Any, folder: Path) -> Any:
    """Return a program in ONNX Runtime, on one thread."""
    import slrc
    from slrc.backends import get_backend, parse_target

    return get_backend(parse_target("ort")).load(slrc.lower(program, "ort", folder).folder, threads=1)


def measure_level(program: Any, level: float, layer_norm: Any, dense: Any) -> dict[str, Any]:
    """Prune by magnitude in one shot; compare masked, slim and ONNX Runtime; time the latter and `dense` in turns."""
    import slrc
    from slrc.measuring.timing import Budget, medians, time_in_turns
    from slrc.passes.structure.apply_masks import ApplyMasks
    from slrc.pipeline import structure
    from slrc.sparsity.masks import Masks
    from slrc.verify import compare, outputs_of

    plan = slrc.plan(program, "channel", level, layer_norm=layer_norm)
    masks = Masks.project(plan, program.tensors)
    masked = ApplyMasks(masks)(program).program
    slim = structure(masked, plan, masks)
    reference, outputs = (outputs_of(p.module(), p.example_inputs) for p in (masked, slim))
    touched = {s.tensor for c in plan for s in c.members + c.followers}
    result: dict[str, Any] = {
        "prunable_share": sum(program.tensors[t].numel() for t in touched) / program.num_parameters,
        "reached": plan.sparsity,
        "parameters": slim.num_parameters,
        "macs": slim.macs,
        "slim_error": compare("slim", reference, outputs, float("inf")).max_rel_error,
    }
    inputs = slim.flat_inputs()
    with tempfile.TemporaryDirectory() as folder:
        runner = load(slim, Path(folder))
        result["ort_error"] = compare("ort", outputs, runner(*inputs), float("inf")).max_rel_error
        if dense is not None:
            ms = medians(time_in_turns([r.prepare(*inputs) for r in (dense, runner)], Budget(TIMING_S, 8)))
            result["dense_ms"], result["compiled_ms"] = ms
            result["speedup"] = ms[0] / ms[1]
    return result


def measure_torch_pruning(name: str) -> dict[str, Any]:
    """Run torch-pruning with its defaults at 50 %; its result counts as correct if it equals the zeroed dense model."""
    import torch
    import torch_pruning as tp

    from slrc.verify import compare, outputs_of

    model, inputs = make(name)
    dense = copy.deepcopy(model)
    ends = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    started = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=ends
    )
    pruner.step()
    seconds = time.perf_counter() - started
    outputs = outputs_of(model, inputs)
    row: dict[str, Any] = {"worked": True, "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        reference = outputs_of(zeroed_where_pruned(dense, inputs, pruner.DG.pruning_history()), inputs)
    except Exception as error:  # whatever its replay raises
        return {**row, "correct": None, "why": f"{type(error).__name__}: {error}"}
    if [t.shape for t in outputs] != [t.shape for t in reference]:
        return {**row, "correct": False, "why": "it pruned the outputs"}
    difference = compare("torch-pruning", reference, outputs, float("inf")).max_rel_error
    return {**row, "correct": difference <= EXACT, "error": difference}


def zeroed_where_pruned(dense: Any, inputs: tuple[Any, ...], history: list[Any]) -> Any:
    """Fill the dense model with zeros in every element of its parameters that a pruning took away.

    The pruning is made again on a twin whose parameters hold the places of their own elements: what is left of those is
    what was kept, whatever it was that the pruner cut.
    """
    import torch
    import torch_pruning as tp

    twin = copy.deepcopy(dense)
    graph = tp.DependencyGraph().build_dependency(twin, inputs)
    for parameter in twin.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
    graph.load_pruning_history(history)
    left = dict(twin.named_parameters())
    with torch.no_grad():
        for key, parameter in dense.named_parameters():
            kept = torch.zeros(parameter.numel(), dtype=torch.bool)
            kept[left[key].detach().long().flatten()] = True
            parameter.mul_(kept.reshape(parameter.shape))
    return dense


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


def is_whole(row: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether an earlier run left nothing of a row to do."""
    levels = row.get("levels")
    if levels is None:
        return "failed" in row
    timed = args.no_latency or all("speedup" in level for level in levels.values())
    return timed and all(str(level) in levels for level in args.sparsity)


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
    parser.add_argument("models", nargs="*", help="torchvision:NAME or timm:NAME, perhaps with @narrow; all by default")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--again", action="store_true", help="also models that have a row already")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--job", choices=["slrc", "torch-pruning"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(args.models[0], args)))
        return
    beside = importlib.util.find_spec("torch_pruning") is not None
    rows = Rows(__file__, args.results)
    header = ("model", "grps", "reach", "par.", "MACs", "slim", "ort", "s", "faster")
    print(
        f"{header[0]:44} {header[1]} {header[2]:>5} {header[3]:>5} {header[4]:>5} {header[5]:>8} {header[6]:>8} ",
        end="",
    )
    print(f"{header[7]:>6} {header[8]:>7}")
    for name in args.models or default_models():
        old, row = rows[name] if rows.has(name) and not args.again else {}, {}
        if not is_whole(old, args):
            row = run_alone(name, "slrc", args)
        if beside and not name.endswith(NARROW) and "torch_pruning" not in old:
            row["torch_pruning"] = run_alone(name, "torch-pruning", args)
        if row:
            levels = old.get("levels", {}) | row.get("levels", {})
            rows.add(name, old | row | ({"levels": levels} if levels else {}))
        print(show(name, rows[name]), flush=True)
    found = rows.rows.values()
    failed = sum("failed" in row for row in found)
    exact = sum(
        all(x["slim_error"] <= EXACT and x["ort_error"] <= EXACT for x in row["levels"].values())
        for row in found
        if "levels" in row
    )
    print(f"\n{len(found)} models, {exact} exact to 1e-4 at every level, {failed} failed")


if __name__ == "__main__":
    main()
