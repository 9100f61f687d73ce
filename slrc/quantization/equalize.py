"""Exact rewrites of weights and biases after which a program loses less by rounding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slrc.forms.quantization import WEIGHT_HIGHEST
from slrc.forms.quantize_ops import LEAST_SCALE, fake_quantize
from slrc.ir.nodes import conv_groups, layer_weight, op_name
from slrc.ir.program import Program
from slrc.passes.graph_edits import get_tensor, layer_bias, only_user, reads
from slrc.passes.quantization.find_places import is_quantizable
from slrc.quantization.observe import Observed

HOMOGENEOUS = frozenset({"relu", "max_pool2d", "constant_pad_nd", "pad", "contiguous", "clone"})
"""Operators that a positive factor of a channel passes through, on its way from one layer to the next."""
FARTHEST = 100.0


def equalized(program: Program, seen: Mapping[str, Observed]) -> dict[str, Tensor]:
    """Return weights and biases, by name, with which channels between two layers have magnitudes alike.

    Where nothing but a ReLU, a maximum or a pad stands between two layers, channel c of the first is divided by a
    factor and what reads it multiplied: the program computes the same (Nagel et al., arXiv 1906.04721). Weights
    of the first have a scale for each output, so that the factor follows from the values, as in SmoothQuant
    (arXiv 2211.10438): √(greatest value / greatest weight that reads it), and the greatest value alone where the
    second is depthwise.
    """
    module, changed = program.graph_module, dict[str, Tensor]()
    for first, value, second in _pairs(module):
        if (found := seen.get(value.name)) is None or found.extremes is None:
            continue
        own, next_weight = (str(layer_weight(n)) for n in (first, second))
        weight = changed.get(next_weight, get_tensor(module, next_weight))
        by_channel = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
        depthwise = conv_groups(second) > 1
        readers = torch.ones(len(weight)) if depthwise else by_channel.amax(0)
        if len(found.extremes) != len(readers):
            continue
        values = found.extremes.clamp_min(LEAST_SCALE)
        factor = values if depthwise else (values / readers.clamp_min(LEAST_SCALE)).sqrt()
        alive = (found.extremes > 0) & (readers > 0)
        typical = factor[alive].log().mean().exp() if bool(alive.any()) else torch.tensor(1.0)
        factor = torch.where(alive, factor / typical, 1.0).clamp(1 / FARTHEST, FARTHEST)
        _divide(module, changed, first, own, factor)
        along = (-1, *[1] * (weight.dim() - 1)) if depthwise else (1, -1, *[1] * (weight.dim() - 2))
        changed[next_weight] = weight * factor.reshape(along)
    return changed


def _divide(module: GraphModule, changed: dict[str, Tensor], layer: Node, name: str, factor: Tensor) -> None:
    weight = changed.get(name, get_tensor(module, name))
    changed[name] = weight / factor.reshape(-1, *[1] * (weight.dim() - 1))
    if (bias := layer_bias(layer)) is not None:
        own = str(bias.target)
        changed[own] = changed.get(own, get_tensor(module, own)) / factor


def _pairs(module: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Yield a layer, what the next layer reads of it, and that layer, where a factor can be moved between them."""
    for first in module.graph.nodes:
        if not is_quantizable(first) or not _is_own(module, first):
            continue
        value: Node = first
        second = only_user(first)
        while second is not None and op_name(second) in HOMOGENEOUS:
            value, second = second, only_user(second)
        if second is None or not is_quantizable(second) or second.args[0] is not value or not _is_own(module, second):
            continue
        groups = conv_groups(second)
        depthwise = groups == get_tensor(module, str(layer_weight(second))).shape[0]
        if op_name(first) == op_name(second) and (groups == 1 or depthwise):
            yield first, value, second


def _is_own(module: GraphModule, layer: Node) -> bool:
    bias = layer_bias(layer)
    names = [str(layer_weight(layer)), *([str(bias.target)] if bias is not None else [])]
    return all(reads(module, name) == 1 for name in names)


def corrected_biases(program: Program, seen: Mapping[str, Observed], skipped: Collection[str]) -> dict[str, Tensor]:
    """Return biases, by name, that make up for what rounding weights does to the mean of each output.

    `b + Σ (w − rounded w) · mean of the input's channel`, by the means in floating point; what pads add is left out.
    """
    module, changed = program.graph_module, dict[str, Tensor]()
    for layer in module.graph.nodes:
        if not is_quantizable(layer) or layer_weight(layer) in skipped or not _is_own(module, layer):
            continue
        value, bias = layer.args[0], layer_bias(layer)
        if isinstance(value, Node) and value.name not in seen and isinstance(source := value.args[0], Node):
            value = source  # a pad
        found = seen.get(value.name) if isinstance(value, Node) else None
        if bias is None or found is None or found.means is None:
            continue
        weight = get_tensor(module, str(layer_weight(layer)))
        scale = (weight.flatten(1).abs().amax(1) / WEIGHT_HIGHEST).clamp_min(LEAST_SCALE)
        lost = weight - fake_quantize(weight, scale, 0, 0, -WEIGHT_HIGHEST, WEIGHT_HIGHEST)
        lost = lost.reshape(*weight.shape[:2], -1).sum(2)
        groups = conv_groups(layer)
        if found.means.numel() != lost.shape[1] * groups:
            continue
        means = found.means.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
        changed[str(bias.target)] = get_tensor(module, str(bias.target)) + (lost * means).sum(1)
    return changed
