"""From what a compile's stages found to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slrc.ir.program import Program
from slrc.measuring.timing import Latency, environment
from slrc.reporting.report import Accuracy, LayerSparsity, Pair, Report, Sparsity, TargetResult
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.training.trained import Trained
from slrc.verify import Check


def assemble(
    *,
    model: str,
    config: Mapping[str, Any],
    dense: Program,
    slim: Program,
    plan: Plan,
    trained: Trained,
    macs: int,
    accuracy: Accuracy | None,
    targets: Sequence[TargetResult],
    latency: Sequence[Latency],
    checks: Sequence[Check],
    notes: Sequence[str],
) -> Report:
    """Return the report; nothing is run.

    Args:
        model: its name.
        config: the options, as JSON values.
        dense: the program that the compiled one is compared with.
        slim: the program after all that is the same for every target.
        plan: what was constrained.
        trained: what training left.
        macs: multiply-accumulates of one sample of the compiled model on the first target.
        accuracy: the leading metric; `None` if none was measured.
        targets: what was emitted; the first one's size counts as the model's.
        latency: of those that ran here.
        checks: all that was compared.
        notes: what was said on the way.
    """
    return Report(
        model=model,
        pattern=plan.patterns,
        method=trained.method,
        sparsity=Sparsity(asked=plan.sparsity_asked, reached=plan.sparsity),
        accuracy=accuracy,
        params=Pair(dense=dense.num_parameters, compiled=_surviving(slim, trained.masks)),
        macs=Pair(dense=dense.macs, compiled=macs),
        size_bytes=targets[0].size_bytes,
        latency=tuple(latency),
        checks=tuple(checks),
        history=trained.history,
        curve=trained.curve,
        training=trained.cost,
        layers=tuple(
            LayerSparsity(
                name=c.name,
                pattern=str(c.pattern),
                groups=c.groups,
                kept=c.keep,
                weights=c.num_weights(trained.tensors),
            )
            for c in plan
        ),
        targets=tuple(targets),
        notes=tuple(notes),
        config=dict(config),
        environment=environment(),
    )


def accuracy_of(metric: tuple[str, float] | None, trained: Trained, final: float | None) -> Accuracy | None:
    """Return the leading metric of the dense, the hard-pruned and the final model; `None` where one is missing."""
    if metric is None or final is None or trained.dense is None or trained.hard_pruned is None:
        return None
    return Accuracy(metric=metric[0], dense=trained.dense, hard_pruned=trained.hard_pruned, final=final)


def _surviving(slim: Program, masks: Masks) -> int:
    """Return the number of parameters that are not pruned: stored ones less those that are masked."""
    masked = sum(
        int((~mask).sum())
        for name, mask in masks.tensors.items()
        if name in slim.tensors and slim.tensors[name].shape == mask.shape
    )
    return slim.num_parameters - masked
