"""Remove pruned channels for good."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.fx import GraphModule, Node

from slrc.errors import PlanError
from slrc.ir.nodes import CONVOLUTIONS, TRANSPOSED, argument, is_transposed, op_name
from slrc.ir.program import Program
from slrc.passes.analysis.index_rules import Dims
from slrc.passes.analysis.index_rules.constants import SIZE_POSITION
from slrc.passes.analysis.index_rules.reduction import reduced_dims
from slrc.passes.analysis.index_rules.shape import squeezed_dims
from slrc.passes.analysis.label_indices import IndexLabels, label_indices
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import get_tensor, set_tensor
from slrc.passes.structure import full_width
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan

aten = torch.ops.aten


@dataclass(frozen=True)
class ShrinkChannels(Transform):
    """Remove every unit of a coupled group that its mask prunes, from all tensors that it lies in.

    1. A dimension of a parameter or buffer keeps the indices whose label survives.
    2. The size of a dimension in `view`, `expand`, `zeros` and the like becomes the number of its labels that survive;
       bounds of `slice` and sizes of `split` likewise; `squeeze` names its dimensions.
    3. A depthwise convolution has as many groups as it has inputs.
    4. Means, layer norms and RMS norms keep the statistics of the full width, in which removed indices count as zeros.

        conv (64, 32, 3, 3) ─▶ batch_norm (64) ─▶ conv (64, 64, 3, 3)        with 24 of 64 pruned
        conv (40, 32, 3, 3) ─▶ batch_norm (40) ─▶ conv (64, 40, 3, 3)
    """

    plan: Plan
    masks: Masks
    name: ClassVar[str] = "shrink-channels"

    def __call__(self, program: Program) -> PassResult:
        """Return the slim program.

        Raises:
            PlanError: a constraint names units that the program does not have.
        """
        plan, masks = self.plan, self.masks
        pruned = {c.name: c for c in plan if c.pattern.coupled and not bool(masks.surviving_units(c).all())}
        present = [c for c in pruned.values() if _is_present(program, masks, c)]
        if not present:
            return PassResult(program, False)
        labels = label_indices(program, plan.attention, plan.layer_norm)
        alive = np.ones(len(labels.roots), dtype=bool)
        for c in present:
            roots = labels.unit_roots(c.members[0], c.groups)
            alive[roots[~masks.surviving_units(c).numpy()]] = False
        survives = alive[labels.roots]
        return PassResult(*program.rewrite(lambda module: _shrink(module, labels, survives)))


def _is_present(program: Program, masks: Masks, constraint: Constraint) -> bool:
    """Whether the group's tensor still has the shape of its mask; in a program that was shrunk before it has not."""
    tensor = constraint.members[0].tensor
    if tensor not in program.tensors:
        raise PlanError(f"constraint `{constraint.name}`: the program has no tensor `{tensor}`")
    return program.tensors[tensor].shape == masks.tensors[tensor].shape


def _shrink(module: GraphModule, labels: IndexLabels, survives: NDArray[np.bool_]) -> bool:
    # Last ones first: what an operator reads is then still the node that was labelled.
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and node.name in labels.values:
            _resize_arguments(node, labels, survives)
    for name, dims in labels.tensors.items():
        tensor = get_tensor(module, name)
        for dim, dim_labels in enumerate(dims):
            if dim_labels is not None and not survives[dim_labels].all():
                kept = torch.from_numpy(np.flatnonzero(survives[dim_labels]))
                sliced = tensor.detach().index_select(dim, kept)
                tensor = nn.Parameter(sliced, requires_grad=False) if isinstance(tensor, nn.Parameter) else sliced
        set_tensor(module, name, tensor)
    return True


def _resize_arguments(node: Node, labels: IndexLabels, survives: NDArray[np.bool_]) -> None:
    resize = _RESIZE.get(op_name(node))
    if resize is None:
        return
    source = node.args[0]
    ins, outs = labels.values[source.name][0] if isinstance(source, Node) else [], labels.values[node.name]
    touched = [d for dims in (ins, *outs) for d in dims if d is not None]
    if not all(survives[d].all() for d in touched):
        resize(node, _Survivors(survives), ins, outs)


@dataclass(frozen=True)
class _Survivors:
    survives: NDArray[np.bool_]

    def count(self, labels: NDArray[np.int64]) -> int:
        return int(self.survives[labels].sum())

    def sizes(self, asked: Any, dims: Dims) -> list[Any]:
        """Sizes of a value with these labels: counted where there are labels, as asked elsewhere."""
        return [a if d is None else self.count(d) for a, d in zip(asked, dims, strict=True)]


def _resize_view(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    node.update_arg(1, survivors.sizes(node.args[1], outs[0]))


def _resize_slice(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    dim = int(argument(node, 1, "dim", 0))
    labels = ins[dim]
    if labels is not None:
        start, stop, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(len(labels))
        bounds = [survivors.count(labels[:start]), survivors.count(labels[:stop])]
        node.args = (node.args[0], dim, *bounds)


def _resize_slice_scatter(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    dim = int(argument(node, 2, "dim", 0))
    labels = outs[0][dim]
    if labels is not None:
        start, stop, _ = slice(argument(node, 3, "start"), argument(node, 4, "end")).indices(len(labels))
        bounds = [survivors.count(labels[:start]), survivors.count(labels[:stop])]
        node.args = (*node.args[:2], dim, *bounds)


def _resize_repeat(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    """Copy what has no labels of its own as often as labels of the copies survive."""
    times, dims = node.args[1], outs[0]
    assert isinstance(times, (list, tuple))
    own = [None] * (len(dims) - len(ins)) + list(ins)
    counts = [*[1] * (len(dims) - len(times)), *times]
    copies = [None if labels is not None else copy for labels, copy in zip(own, dims, strict=True)]
    node.update_arg(1, survivors.sizes(counts, copies))


def _resize_constant(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    position = SIZE_POSITION[op_name(node)]
    node.update_arg(position, survivors.sizes(node.args[position], outs[0]))


def _resize_split(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    dim = int(argument(node, 2, "dim", 0))
    if ins[dim] is not None:
        # A part of one index has no labels: it stays.
        sizes = [1 if (labels := part[dim]) is None else survivors.count(labels) for part in outs]
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], sizes, dim), {}


def _resize_squeeze(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    """Name the dimensions that go: one that shrinks to a single index stays."""
    node.target, node.args, node.kwargs = aten.squeeze.dims, (node.args[0], squeezed_dims(node)), {}


def _resize_groups(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    position = 8 if op_name(node) == "convolution" else 6
    groups = int(argument(node, position, "groups", 1))
    weight = node.args[1]
    assert isinstance(weight, Node)
    shape = weight.meta["val"].shape
    is_depthwise = shape[0] == groups if is_transposed(node) else shape[1] == 1
    if groups > 1 and is_depthwise and ins[1] is not None:
        node.update_arg(position, survivors.count(ins[1]))


def _resize_group_norm(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    groups = node.args[1]
    assert isinstance(groups, int)
    if ins[1] is not None:
        node.update_arg(1, groups * survivors.count(ins[1]) // len(ins[1]))


def _resize_attention(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    """Without a scale of its own, attention takes it from the width of a head: write down what it was."""
    width = ins[-1]
    if width is not None and node.kwargs.get("scale") is None:
        node.kwargs = {**node.kwargs, "scale": len(width) ** -0.5}


def _widen_mean(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    over = [labels for d in reduced_dims(node) if (labels := ins[d]) is not None]
    kept, full = math.prod(survivors.count(labels) for labels in over), math.prod(len(labels) for labels in over)
    if kept < full:
        full_width.widen_mean(node, kept, full)


def _widen_extreme(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    over = [labels for d in reduced_dims(node) if (labels := ins[d]) is not None]
    if any(survivors.count(labels) < len(labels) for labels in over):
        full_width.widen_extreme(node, is_greatest=op_name(node) == "amax")


def _widen_norm(node: Node, survivors: _Survivors, ins: Dims, outs: list[Dims]) -> None:
    labels = ins[-1]
    if labels is not None and (kept := survivors.count(labels)) < len(labels):
        widen = full_width.widen_layer_norm if op_name(node) == "layer_norm" else full_width.widen_rms_norm
        widen(node, kept, len(labels))


_RESIZE: dict[str, Callable[[Node, _Survivors, Dims, list[Dims]], None]] = {
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "expand"], _resize_view),
    **dict.fromkeys(["repeat", "tile"], _resize_repeat),
    **dict.fromkeys(SIZE_POSITION, _resize_constant),
    "slice": _resize_slice,
    "slice_scatter": _resize_slice_scatter,
    "squeeze": _resize_squeeze,
    "group_norm": _resize_group_norm,
    "mean": _widen_mean,
    **dict.fromkeys(["amax", "amin"], _widen_extreme),
    **dict.fromkeys(["layer_norm", "rms_norm"], _widen_norm),
    "scaled_dot_product_attention": _resize_attention,
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"], _resize_split),
    **dict.fromkeys(sorted(CONVOLUTIONS | TRANSPOSED), _resize_groups),
}
