"""Decide what is constrained and how much of it is kept: from a program to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatch

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from slrc.errors import ConfigError, PatternError, PlanError
from slrc.ir.nodes import WEIGHTED, layer_weight, op_name
from slrc.ir.program import Layer, Program
from slrc.passes.allocation.order_channels import order_channels, takes_order
from slrc.passes.analysis.label_indices import ChannelGroup, IndexLabels, label_indices
from slrc.sparsity.choices import Allocation, Attention, LayerNorm
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.patterns import AnyPattern, Block, Unstructured
from slrc.sparsity.plans import LatencyForecast, LeftOut, Plan
from slrc.sparsity.slices import Slice

WidthChooser = Callable[
    [Program, IndexLabels, Sequence[Constraint], Sequence[int]], tuple[NDArray[np.int64], LatencyForecast]
]
"""Chooses how many units of each coupled group to keep, in steps of so many, and says what latency to expect."""
MOST_REASONS = 6
"""How many layers an error names where nothing can be pruned."""
MOST = 0.5
"""A last layer with more than this share of the parameters or multiply-accumulates is pruned like others."""


def allocate_sparsity(
    program: Program,
    pattern: AnyPattern,
    sparsity: float | None = None,
    *,
    allocation: Allocation = Allocation.UNIFORM,
    skip: Sequence[str] = (),
    keep_ends: bool = True,
    round_to: int = 1,
    attention: Attention = Attention.HEADS,
    layer_norm: LayerNorm = LayerNorm.KEEP,
    permute: bool = False,
    alternatives: Sequence[AnyPattern] = (),
    choose_widths: WidthChooser | None = None,
) -> Plan:
    """Return a plan that prunes `sparsity` of the constrained weights, to within one group.

    Args:
        program: the captured model.
        pattern: what may survive together.
        sparsity: the share of the constrained weights to prune, in [0, 1); `None` for the pattern's own, else 0.5.
        allocation: how the share is spread over layers.
        skip: glob patterns of layer names to leave alone.
        keep_ends: leave the first layer and the final classifier alone, but for a last layer that holds more than half
            of the model's parameters or multiply-accumulates: what is not small is worth pruning.
        round_to: kept widths of coupled groups are rounded up to a multiple of this: odd widths run slower.
        attention: whether whole heads or the width of every head is pruned.
        layer_norm: whether what layer and RMS norms normalise over may be pruned.
        permute: whether outputs may be reordered, so that alike ones fall into one block. See `order_channels`.
        alternatives: patterns on single weights for the layers that cannot take `pattern`.
        choose_widths: for `channel`: chooses the widths instead of `sparsity`.

    Raises:
        PatternError: the pattern prescribes another sparsity.
        ConfigError: the sparsity is outside [0, 1).
        PlanError: nothing can be constrained, or a `skip` matches nothing.
    """
    asked = _asked_sparsity(pattern, sparsity)
    _check_skips(program, skip)
    permute = permute and takes_order(pattern)
    labels = label_indices(program, attention, layer_norm) if pattern.coupled or permute else None
    if labels is not None and pattern.coupled:
        candidates, left_out = _coupled_constraints(program, labels, pattern, skip, keep_ends)
    else:
        candidates, left_out = _layer_constraints(program, (pattern, *alternatives), skip, keep_ends)
    if not candidates:
        raise PlanError(
            f"nothing in {program.name} can be pruned by {pattern}: {_reasons(left_out)}",
            hint="try another pattern, or `--prune-ends` where only the first layer and the classifier are left",
        )
    weights = np.array([c.num_weights(program.tensors) for c in candidates], dtype=np.int64)
    groups = np.array([c.groups for c in candidates], dtype=np.int64)
    forecast = None
    if choose_widths is not None:
        keep, forecast = _for_latency(program, labels, pattern, candidates, round_to, choose_widths)
    elif pattern.fixed_sparsity is not None:
        keep = np.array([c.keep for c in candidates])
    elif allocation is Allocation.GLOBAL:
        keep = _global(program, candidates, weights, groups, asked)
    else:
        keep = _uniform(weights, groups, asked)
    if pattern.coupled and forecast is None:
        keep = _round_up(program, candidates, keep, round_to)
    constraints = [c.model_copy(update={"keep": int(k)}) for c, k in zip(candidates, keep, strict=True)]
    if labels is not None and permute:
        constraints = order_channels(program, labels, constraints)
    reached = 1.0 - float((weights * keep / groups).sum() / weights.sum())
    return Plan(
        sparsity_asked=asked if forecast is None else reached,
        sparsity=reached,
        latency=forecast,
        attention=attention,
        layer_norm=layer_norm,
        shortfall=""
        if forecast
        else _explain(asked, reached, weights, groups, keep, round_to if pattern.coupled else 1),
        constraints=tuple(constraints),
        left_out=tuple(left_out),
    )


def _asked_sparsity(pattern: AnyPattern, sparsity: float | None) -> float:
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be in [0, 1), got {sparsity:g}", hint="the share of weights to prune: 0.75")
    fixed = pattern.fixed_sparsity
    if fixed is None:
        return 0.5 if sparsity is None else sparsity
    if sparsity is not None and abs(sparsity - fixed) > 1e-9:
        raise PatternError(
            f"pattern {pattern} prunes {fixed:.0%} of the weights, but sparsity {sparsity:g} was asked",
            hint="leave `--sparsity` out, or choose N and M for the sparsity that you want",
        )
    return fixed


def _check_skips(program: Program, skip: Sequence[str]) -> None:
    names = [layer.name for layer in program.layers.values()]
    for glob in skip:
        if not any(_matches(name, glob) for name in names):
            raise PlanError(
                f"`--skip {glob}` matches no layer of {program.name}",
                hint=f"layers are named like `{names[len(names) // 2]}`; see `slrc inspect`" if names else None,
            )


def _matches(name: str, glob: str) -> bool:
    return fnmatch(name, glob) or fnmatch(name, f"{glob}.*")


def _end_of(program: Program, layer: Layer) -> str:
    if layer.is_first:
        return "the first layer"
    return "the final classifier" if layer.is_last and not what_last_layer_holds(program, layer) else ""


def what_last_layer_holds(program: Program, layer: Layer) -> str:
    """Return what of a model a last layer has the most of, for which it is pruned like others, or an empty string."""
    if not layer.is_last or layer.is_first:
        return ""
    weights, macs = math.prod(layer.shape) / program.num_parameters, layer.macs / max(1, program.macs)
    if weights > MOST:
        return f"a last layer with {weights:.0%} of the parameters"
    return f"a last layer with {macs:.0%} of the multiply-accumulates" if macs > MOST else ""


def _layer_constraints(
    program: Program, patterns: Sequence[AnyPattern], skip: Sequence[str], keep_ends: bool
) -> tuple[list[Constraint], list[LeftOut]]:
    """Return a constraint for each layer, by the first of the patterns that it can take."""
    chosen, left_out = [], []
    for weight, layer in program.layers.items():
        if any(_matches(layer.name, glob) for glob in skip):
            reason: str | None = "skipped by the user"
        elif keep_ends and (end := _end_of(program, layer)):
            reason = f"{end} is left alone by default"
        else:
            reasons = [why_not_pruned(layer, p) for p in patterns]
            reason = None if None in reasons else reasons[0]
        if reason is not None:
            left_out.append(LeftOut(name=layer.name, reason=reason))
            continue
        pattern = patterns[reasons.index(None)]
        member = Slice(tensor=weight, dim=layer.output_dim)
        one = Constraint(name=layer.name, pattern=pattern, groups=1, keep=1, members=(member,))
        groups = one.energies(program.tensors).shape[1]
        keep = groups if pattern.fixed_sparsity is None else round(groups * (1 - pattern.fixed_sparsity))
        chosen.append(one.model_copy(update={"groups": groups, "keep": keep}))
    return chosen, left_out + _computed(program)


def why_not_pruned(layer: Layer, pattern: AnyPattern) -> str | None:
    """Return why a layer cannot take a pattern on single weights, or `None` if it can."""
    if layer.is_transposed and not isinstance(pattern, Unstructured):
        if not isinstance(pattern, Block):
            return f"transposed convolutions do not take {pattern}"
        if layer.groups > 1:
            return f"transposed convolutions in groups do not take {pattern}"
    return pattern.why_not(layer.outputs_first_shape, layer.groups)


def _coupled_constraints(
    program: Program, labels: IndexLabels, pattern: AnyPattern, skip: Sequence[str], keep_ends: bool
) -> tuple[list[Constraint], list[LeftOut]]:
    chosen, left_out = [], []
    for group in labels.groups:
        producers = _producers(program, group)
        skipped = [p.name for p in producers if any(_matches(p.name, glob) for glob in skip)]
        if skipped:
            reason: str | None = f"`{skipped[0]}` is skipped by the user"
        elif keep_ends and producers and all(p.is_first or p.is_depthwise for p in producers):
            reason = "the first layer is left alone by default"
        elif group.units < 2:
            reason = "it has one channel only"
        else:
            reason = None
        if reason is not None:
            left_out.append(LeftOut(name=group.name, reason=reason))
            continue
        chosen.append(
            Constraint(
                name=group.name,
                pattern=pattern,
                groups=group.units,
                keep=group.units,
                members=group.members,
                followers=group.followers,
            )
        )
    left_out += [LeftOut(name=p.layer, reason=p.reason) for p in labels.pinned]
    return chosen, left_out + _computed(program)


def _computed(program: Program) -> list[LeftOut]:
    """Return the layers whose weight is not a parameter but made of some, as by a weight norm."""
    made = [(n, n.args[1]) for n in program.nodes if op_name(n) in WEIGHTED and layer_weight(n) is None]
    return [
        LeftOut(name=node.name, reason=f"its weight is computed, by {op_name(weight)}")
        for node, weight in made
        if isinstance(weight, Node)
    ]


def _reasons(left_out: Sequence[LeftOut]) -> str:
    """Return why layers are left out, those at the ends last."""
    told = sorted(left_out, key=lambda x: "by default" in x.reason)
    shown = [f"{x.name}: {x.reason}" for x in told[:MOST_REASONS]]
    if len(told) > MOST_REASONS:
        shown.append(f"and {len(told) - MOST_REASONS} more")
    return "; ".join(shown) or "it has no layers with weights"


def _producers(program: Program, group: ChannelGroup) -> list[Layer]:
    return [program.layers[s.tensor] for s in group.members if s.tensor in program.layers]


def _uniform(weights: np.ndarray, groups: np.ndarray, sparsity: float) -> np.ndarray:
    """Round each layer's share down, then give what is missing to the largest remainders."""
    exact = sparsity * groups
    removed = np.minimum(np.floor(exact + 1e-9).astype(np.int64), groups - 1)
    steps = weights / groups
    missing = sparsity * weights.sum() - (removed * steps).sum()
    for i in np.argsort(-(exact - removed), kind="stable"):
        if missing >= steps[i] / 2 and removed[i] < groups[i] - 1:
            removed[i] += 1
            missing -= steps[i]
    return groups - removed


def _global(
    program: Program,
    constraints: Sequence[Constraint],
    weights: np.ndarray,
    groups: np.ndarray,
    sparsity: float,
) -> np.ndarray:
    """Remove the groups of least mean energy first, over all layers together; each keeps one at least."""
    steps = weights / groups
    density, layer = [], []
    for i, c in enumerate(constraints):
        # Removing the k-th group of every row costs the sum over rows of the k-th smallest energies.
        cost = c.energies(program.tensors).sort(dim=1).values.sum(dim=0)[:-1].double().cpu().numpy()
        density.append(cost / steps[i])
        layer.append(np.full(len(cost), i))
    order = np.argsort(np.concatenate(density), kind="stable")
    candidates = np.concatenate(layer)[order]
    total = np.cumsum([0.0, *steps[candidates]])
    count = int(np.argmin(np.abs(total - sparsity * weights.sum())))
    removed = np.bincount(candidates[:count], minlength=len(groups))
    return groups - removed


def _round_up(program: Program, constraints: Sequence[Constraint], keep: np.ndarray, multiple: int) -> np.ndarray:
    """Round the width that is kept, units times the indices of each, up to a multiple; never above the whole."""
    steps = [_step(program, c, multiple) for c in constraints]
    rounded = [math.ceil(int(kept) / step) * step for kept, step in zip(keep, steps, strict=True)]
    return np.minimum(rounded, [c.groups for c in constraints])


def _step(program: Program, constraint: Constraint, multiple: int) -> int:
    """Return the least number of units whose indices are a multiple of `multiple` in every layer that makes them."""
    layers = [s for s in constraint.members if s.tensor in program.layers] or list(constraint.members)
    widths = [len(s.index) if s.index is not None else program.tensors[s.tensor].shape[s.dim] for s in layers]
    return multiple // math.gcd(multiple, *(width // constraint.groups for width in widths))


def _for_latency(
    program: Program,
    labels: IndexLabels | None,
    pattern: AnyPattern,
    constraints: Sequence[Constraint],
    multiple: int,
    choose_widths: WidthChooser,
) -> tuple[np.ndarray, LatencyForecast]:
    if labels is None or not pattern.coupled:
        raise ConfigError(f"widths are chosen of `channel` groups, got pattern {pattern}", hint="use `channel`")
    steps = [_step(program, c, multiple) for c in constraints]
    return choose_widths(program, labels, constraints, steps)


def _explain(
    asked: float, reached: float, weights: np.ndarray, groups: np.ndarray, keep: np.ndarray, multiple: int
) -> str:
    one_group = float((weights / groups).max() / weights.sum())
    if abs(asked - reached) <= one_group + 1e-9:
        return ""
    at_limit = int((keep == 1).sum())
    if multiple > 1 and reached < asked:
        return (
            f"asked {asked:.1%}, reached {reached:.1%}: kept widths are rounded up to multiples of {multiple} "
            "(`--round-to 1` keeps them exact)"
        )
    return (
        f"asked {asked:.1%}, reached {reached:.1%}: {at_limit} of {len(groups)} layers or groups are down to "
        "their last group"
    )
