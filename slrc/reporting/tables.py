"""Tables on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from slrc.backends import BACKENDS
from slrc.ir.program import Program
from slrc.measuring.timing import Latency
from slrc.passes.allocation.allocate_sparsity import what_last_layer_holds
from slrc.passes.analysis.label_indices import IndexLabels
from slrc.reporting.bench import BenchResult
from slrc.reporting.report import Report, TargetResult
from slrc.sparsity.plans import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence


def report_table(report: Report) -> Table:
    """Dense against compiled, in one table."""
    reached = f"{report.sparsity.reached:.1%}"
    table = make_table(f"{report.model}: {report.pattern} at {reached}, {report.method}", "", "dense", "compiled", "")
    if report.accuracy is not None:
        a = report.accuracy
        table.add_row(a.metric, f"{a.dense:.4f}", f"{a.final:.4f}", f"{a.final - a.dense:+.4f}")
        table.add_row("  hard-pruned, no retraining", "", f"{a.hard_pruned:.4f}", f"{a.hard_pruned - a.dense:+.4f}")
    for name, pair, scale, unit in (
        ("parameters", report.params, 1e6, "M"),
        ("multiply-accumulates", report.macs, 1e6, "M"),
        ("model file", report.size_bytes, 1e6, "MB"),
    ):
        table.add_row(
            name,
            f"{pair.dense / scale:.3f} {unit}",
            f"{pair.compiled / scale:.3f} {unit}",
            f"{pair.compiled / pair.dense - 1:+.1%}" if pair.dense else "",
        )
    add_latency(table, report.latency)
    for target in report.targets:
        _add_corners(table, target, report.accuracy.metric if report.accuracy else "metric")
        if target.forms is not None and target.forms.layers:
            kinds = Counter(x.form.kind for x in target.forms.layers)
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            table.add_row(f"layers, {target.target}", "", counts, target.forms.taken)
        if target.engine is not None:
            table.add_row(f"engine, {target.target}", str(target.engine.dense), str(target.engine.compiled), "")
        if target.not_run:
            table.add_row(f"latency, {target.target}", "not run here", "", target.not_run)
    return table


def latency_table(result: BenchResult) -> Table:
    """The table of `slrc bench`."""
    table = make_table(f"{result.model} on {result.environment['cpu']}", "", "dense", "compiled", "")
    add_latency(table, result.latency)
    for reason in result.not_run:
        table.add_row("not run here", "", "", reason)
    return table


def targets_table() -> Table:
    """Which backends can emit and run here."""
    table = make_table("", "target", "what", "emits", "runs")
    for name, make in BACKENDS.items():
        backend = make()
        state = backend.available()
        table.add_row(name, backend.summary, state.why_not_emit or "yes", state.why_not_run or "yes")
    return table


def inspect_tables(program: Program, plan: Plan, labels: IndexLabels) -> Iterator[Table]:
    """Layers, then constraints, then what pins the rest."""
    total_params, total_macs = program.num_parameters, program.macs
    yield _layers_table(program, plan)
    constraints = make_table(
        f"{plan.patterns}: {plan.sparsity:.1%} of the constrained weights",
        "group",
        "pattern",
        "units",
        "kept",
        "weights",
        "tensors",
    )
    for c in plan:
        names = [s.tensor for s in c.members]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        constraints.add_row(
            c.name, str(c.pattern), str(c.groups), str(c.keep), f"{c.num_weights(program.tensors):,}", shown
        )
    yield constraints
    if labels.unruled:
        unruled = make_table("operators without a rule: what they touch is pinned", "operator", "first met at")
        for operator, source in labels.unruled.items():
            unruled.add_row(operator, source)
        yield unruled
    touched = {s.tensor for c in plan for s in c.members + c.followers}
    params = sum(program.tensors[t].numel() for t in touched)
    macs = sum(layer.macs for w, layer in program.layers.items() if w in touched)
    summary = make_table(program.name, "", "all", "within reach", "share")
    summary.add_row("parameters", f"{total_params:,}", f"{params:,}", f"{params / total_params:.1%}")
    summary.add_row(
        "multiply-accumulates",
        f"{total_macs:,}",
        f"{macs:,}",
        f"{macs / total_macs:.1%}" if total_macs else "",
    )
    summary.add_row("groups", str(len(labels.groups)), str(len(plan.constraints)), "")
    summary.add_row("batch", "dynamic" if program.batch_is_dynamic else f"fixed at {program.batch}", "", "")
    yield summary


def _layers_table(program: Program, plan: Plan) -> Table:
    members = {s.tensor: c.name for c in plan for s in c.members}
    followers = {s.tensor for c in plan for s in c.followers}
    reasons = {x.name: x.reason for x in plan.left_out}
    table = make_table("layers", "layer", "operator", "weight", "parameters", "MACs", "prunable")
    for weight, layer in program.layers.items():
        if weight in members:
            state = "yes" if members[weight] == layer.name else f"yes, with {members[weight]}"
            if held := what_last_layer_holds(program, layer):
                state += f": {held}"
        else:
            state = f"no: {reasons.get(layer.name, 'not constrained')}"
            if weight in followers:
                state += "; its inputs shrink"
        operator = layer.op if layer.groups == 1 else f"{layer.op}, {layer.groups} groups"
        params = program.tensors[weight].numel()
        shape = "x".join(map(str, layer.shape))
        table.add_row(layer.name, operator, shape, f"{params:,}", f"{layer.macs:,}", state)
    return table


def _add_corners(table: Table, target: TargetResult, metric: str) -> None:
    """Add the four models of an int8 target: dense and compiled, in float32 and in int8."""
    if target.int8 is None:
        return
    for precision in ("float32", "int8"):
        dense, compiled = (c for c in target.int8.corners if c.precision == precision)
        figures = []
        for corner in (dense, compiled):
            ms = f", {corner.latency_ms.p50:.3f} ms" if corner.latency_ms else ""
            value = f"{corner.metric:.4f}, " if corner.metric is not None else ""
            figures.append(f"{value}{corner.size_bytes / 1e6:.3f} MB{ms}")
        table.add_row(f"{metric}, size, latency in {precision}", *figures, target.target)
    rounded = target.int8.calibration.compiled
    spared = f", {len(rounded.skipped)} in float" if rounded.skipped else ""
    trained = f", {len(target.int8.training) - 1} epochs trained" if target.int8.training else ""
    table.add_row("layers in int8", "", str(rounded.quantized_layers), f"ranges by {rounded.ranges}{spared}{trained}")


def add_latency(table: Table, latency: Sequence[Latency]) -> None:
    """Add the rows of what was measured to a table of dense against compiled."""
    for x in latency:
        threads = f"{x.threads} thread{'s' if x.threads > 1 else ''}"
        on = f" on {x.device}" if x.device else ""
        spread = f"{x.speedup:.2f}x ({x.speedup_spread[0]:.2f} to {x.speedup_spread[1]:.2f})"
        table.add_row(
            f"latency, {x.target}{on}, {threads}, batch {x.batch}",
            f"{x.dense_ms.p50:.3f} ms",
            f"{x.compiled_ms.p50:.3f} ms",
            spread,
        )
        table.add_row("  p90", f"{x.dense_ms.p90:.3f} ms", f"{x.compiled_ms.p90:.3f} ms", "")
        if x.predicted_ms is not None:
            off = f"measured {x.compiled_ms.p50 / x.predicted_ms - 1:+.1%}"
            table.add_row("  predicted", "", f"{x.predicted_ms:.3f} ms", off)
        for caveat in x.caveats:
            table.add_row("  note", "", "", caveat)


def make_table(title: str, *columns: str) -> Table:
    """Return an empty table; columns of numbers, told by their names, are aligned to the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in (
            "dense",
            "compiled",
            "units",
            "kept",
            "weights",
            "parameters",
            "MACs",
            "all",
            "within reach",
            "share",
            "ms",
        )
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table
