"""Let a program round as integers do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slrc.forms.quantization import BIAS_HIGHEST, WEIGHT_HIGHEST, Quantization, Scheme
from slrc.forms.quantize_ops import LEAST_SCALE
from slrc.ir.nodes import argument, layer_weight, op_name
from slrc.ir.program import Program
from slrc.passes.base import PassResult, Transform
from slrc.passes.graph_edits import call_before, get_tensor, insert_tensor, layer_bias, sibling
from slrc.passes.quantization.find_places import Place, clipping_of, find_places

FAKE_QUANTIZE = torch.ops.slrc.fake_quantize.default
ROUNDED = "fake_quantize"


@dataclass(frozen=True)
class InsertQuantizers(Transform):
    """Round the values and weights that a scheme rounds, see `find_places`.

    1. A value becomes `fake_quantize(value, scale, zero point)`, for those that read it rounded. Values that share a
       range share the scale.
    2. The weight of a layer is rounded in steps of its own for each output, about zero, `(out,)`.
    3. The weight of a layer in `quantization.blocks` is marked so: it is emitted as a packed layer.
    4. A ReLU or ReLU6 before a value whose integers begin at zero is dropped: the rounding clips alike.

        x ─▶ conv(w) ─▶ relu ─▶         x ─▶ fq ─▶ conv(fq(w)) ─▶ fq ─▶

    A program that holds roundings already is left alone.
    """

    scheme: Scheme
    quantization: Quantization
    name: ClassVar[str] = "insert-quantizers"

    def __call__(self, program: Program) -> PassResult:
        """Return the program that rounds."""
        return PassResult(*program.rewrite(self.edit))

    def edit(self, module: GraphModule) -> bool:
        """Round in a graph with parameters as `get_attr` nodes, in place; return whether there was anything to do."""
        if any(op_name(n) == ROUNDED for n in module.graph.nodes):
            return False
        given = self.quantization
        places = find_places(module, self.scheme, given.skipped, packed=given.blocks, round_ends=given.round_ends)
        nodes = {n.name: n for n in module.graph.nodes}
        scales: dict[str, tuple[Tensor, int]] = {}
        for place in places.values:
            scales[place.like] = self.scheme.scale_of(self.quantization.ranges[place.like])
        inputs = {name: nodes[name].args[0] for name in places.layers}
        for place in places.values:
            _round_value(module, nodes, place, *scales[place.like], self.scheme)
        for name in places.layers:
            layer = nodes[name]
            read = next((p.like for p in places.values if _feeds(p, inputs[name])), None)
            block = self.quantization.blocks.get(str(layer_weight(layer)), 0)
            _round_weight(module, layer, scales[read][0] if read in scales else None, block)
        return bool(places.layers or places.values)


def _feeds(place: Place, value: Any) -> bool:
    """Whether a rounded value is what a layer reads, be it through a pad."""
    names = {value.name} | ({value.args[0].name} if value.args and isinstance(value.args[0], Node) else set())
    return place.value in names


def _round_value(
    module: GraphModule, nodes: dict[str, Node], place: Place, scale: Tensor, zero_point: int, scheme: Scheme
) -> None:
    value = nodes[place.value]
    after = value.next
    source = value
    clips = clipping_of(value)
    if scheme.unsigned and clips and zero_point == 0 and place.readers is None:
        top = 6.0 if clips == "relu6" else float("inf")
        if float(scale) * scheme.highest <= top * (1 + 1e-6):
            source = value.args[0]  # type: ignore[assignment]
    while after.op in ("placeholder", "get_attr"):  # inputs stand first
        after = after.next
    scale_node = insert_tensor(module, after, f"{place.like}_scale", nn.Parameter(scale, requires_grad=False))
    rounded = call_before(after, FAKE_QUANTIZE, source, scale_node, zero_point, 0, scheme.lowest, scheme.highest)
    rounded.meta["val"] = value.meta["val"]
    for user in list(value.users):
        if user is not rounded and (place.readers is None or user.name in place.readers):
            user.replace_input_with(value, rounded)


def _round_weight(module: GraphModule, layer: Node, input_scale: Tensor | None, block: int) -> None:
    name = str(layer_weight(layer))
    weight = get_tensor(module, name)
    scale = weight.detach().flatten(1).abs().amax(1) / WEIGHT_HIGHEST
    bias = layer_bias(layer)
    if bias is not None and input_scale is not None:  # a bias is counted in steps of input times weight
        scale = torch.maximum(scale, get_tensor(module, str(bias.target)).detach().abs() / (input_scale * BIAS_HIGHEST))
    scale = scale.clamp_min(LEAST_SCALE)
    weight_node = layer.args[1]
    assert isinstance(weight_node, Node)
    scale_node = insert_tensor(module, layer, sibling(name, "scale"), nn.Parameter(scale, requires_grad=False))
    limits = (-WEIGHT_HIGHEST, WEIGHT_HIGHEST, *([block] if block else []))
    rounded = call_before(layer, FAKE_QUANTIZE, weight_node, scale_node, 0, 0, *limits)
    rounded.meta["val"] = weight_node.meta["val"]
    layer.replace_input_with(weight_node, rounded)


@dataclass(frozen=True)
class QuantizeBiases(Transform):
    """Round the bias of every layer that has an integer input and weight to steps of their scales' product, `(out,)`.

    `conv(fq(x, s), fq(w, t), b)` becomes `conv(fq(x, s), fq(w, t), fq(b, s·t))`: integers in an accumulator's steps.
    It is for the end: scales do not change behind it. Biases that are rounded are left alone, and those of linear
    layers on sequences, which are added to a product in floating point, unless the layer is packed.
    """

    name: ClassVar[str] = "quantize-biases"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with rounded biases."""
        return PassResult(*program.rewrite(self.edit))

    def edit(self, module: GraphModule) -> bool:
        """Round biases in a graph with parameters as `get_attr` nodes, in place; return whether there were any."""
        return _round_biases(module)


def _round_biases(module: GraphModule) -> bool:
    modified = False
    for layer in list(module.graph.nodes):
        weight = layer.args[1] if len(layer.args) > 2 else None
        bias = layer_bias(layer) if weight is not None else None
        if not isinstance(weight, Node) or op_name(weight) != ROUNDED or bias is None or bias.op != "get_attr":
            continue
        if op_name(layer) == "linear" and layer.meta["val"].dim() != 2 and not argument(weight, 6, "block", 0):
            continue
        value = layer.args[0]
        while isinstance(value, Node) and op_name(value) in ("constant_pad_nd", "pad"):
            value = value.args[0]
        if not isinstance(value, Node) or op_name(value) != ROUNDED:
            continue
        own, other = (get_tensor(module, str(argument(n, 1, "scale").target)) for n in (value, weight))
        scale = nn.Parameter((own * other).detach(), requires_grad=False)
        scale_node = insert_tensor(module, layer, sibling(str(bias.target), "scale"), scale)
        rounded = call_before(layer, FAKE_QUANTIZE, bias, scale_node, 0, 0, -BIAS_HIGHEST, BIAS_HIGHEST)
        rounded.meta["val"] = bias.meta["val"]
        layer.replace_input_with(bias, rounded)
        modified = True
    return modified
