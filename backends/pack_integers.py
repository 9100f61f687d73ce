"""Layers of a model that rounds become packed nodes, where their weights are to be stored in blocks.

It is done while roundings still are nodes, of which the layer's weight has a `block`:

    FakeQuantize ─▶ Conv(·, FakeQuantize(w, block), FakeQuantize(b)) ─▶ FakeQuantize ─▶
    FakeQuantize ─▶ BlockSparseQConv ─▶ FakeQuantize ─▶

`write_integers` then makes integers of the roundings on both sides: the node reads those of the first and returns those
of the second. An addition of a rounded value between the layer and its rounding goes into the node, and so does a
LeakyReLU. Where the result is not rounded the node returns float32. What is not so stays a layer with an integer
weight, zeros and all.

A max pool of what a packed layer returns, rounded alike on both sides, becomes a node too: runtimes are slow on bytes
in this layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slrc.backends.int8_onnx import DOMAIN, POOL_ATTRIBUTES, QPOOL, Int8Layer, Residual, Window
from slrc.backends.quantized_onnx import add_constant, codes_of, is_packed, is_rounding, put_in_place, steps_of
from slrc.forms.packed_int8 import PackedInt8
from slrc.kernels.limits import why_not_pool

if TYPE_CHECKING:
    import onnx_ir

LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class _Found:
    """A layer with what goes into its node: `last` is the operator whose result the node returns.

    `x`, `bias`, `residual` and `y` are roundings; all but `x` may be missing.
    """

    layer: onnx_ir.Node
    weight: onnx_ir.Node
    x: onnx_ir.Node
    bias: onnx_ir.Node | None
    residual: onnx_ir.Node | None
    last: onnx_ir.Node
    y: onnx_ir.Node | None
    slope: float | None


def pack_layers(model: onnx_ir.Model) -> bool:
    """Replace layers whose weights have a block, in place; return whether there were any."""
    roundings = [n for n in model.graph if is_rounding(n) and n.attributes["block"].as_int()]
    found = [f for weight in roundings for user, _ in list(weight.outputs[0].uses()) if (f := _find(weight, user))]
    for one in found:
        _replace(model, one)
    for pool in [n for n in model.graph if n.op_type == "MaxPool"]:
        if _is_behind_packed(pool):  # or behind a pool that was replaced just now
            _replace_pool(model, pool)
    return bool(found)


def _find(weight: onnx_ir.Node, user: onnx_ir.Node) -> _Found | None:
    layer = _only_reader(user) if user.op_type == "Transpose" else user
    if layer is None or layer.op_type not in LAYERS:
        return None
    x = _rounding(layer.inputs[0])
    if x is None or x.attributes["lowest"].as_int() < 0:
        return None
    last, bias = layer, layer.inputs[2] if len(layer.inputs) > 2 else None
    follower = _only_reader(last)
    if layer.op_type == "MatMul" and follower is not None and follower.op_type == "Add":
        others = [i for i in follower.inputs if i is not last.outputs[0]]
        if len(others) == 1 and (rounded := _rounding(others[0])) is not None and _is_constant(rounded):
            last, bias = follower, others[0]
            follower = _only_reader(last)
    own_bias = _rounding(bias)
    if bias is not None and own_bias is None:
        return None
    residual = None
    if follower is not None and follower.op_type == "Add":
        others = [i for i in follower.inputs if i is not last.outputs[0]]
        residual = _rounding(others[0]) if len(others) == 1 else None
        if residual is not None and (_is_constant(residual) or residual.outputs[0].shape != last.outputs[0].shape):
            residual = None
        if residual is not None:
            last = follower
            follower = _only_reader(last)
    slope = None
    if follower is not None and follower.op_type == "LeakyRelu" and is_rounding(_only_reader(follower)):
        last = follower
        slope = follower.attributes["alpha"].as_float() if "alpha" in follower.attributes else 0.01
        follower = _only_reader(last)
    y = follower if is_rounding(follower) else None
    return _Found(layer, weight, x, own_bias, residual, last, y, slope)


def _only_reader(node: onnx_ir.Node) -> onnx_ir.Node | None:
    value = node.outputs[0]
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _rounding(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if is_rounding(node) else None


def _is_constant(rounding: onnx_ir.Node) -> bool:
    source = rounding.inputs[0]
    return source is not None and source.const_value is not None


def _zero_point(rounding: onnx_ir.Node) -> int:
    return int(rounding.attributes["zero_point"].as_int())


def _described(found: _Found) -> Int8Layer:
    codes = torch.from_numpy(codes_of(found.weight))
    window = None
    if found.layer.op_type == "Conv":
        own = found.layer.attributes
        strides, pads, dilations = (list(own[name].as_ints()) for name in ("strides", "pads", "dilations"))
        window = Window(strides, pads, dilations, own["group"].as_int())
    per_step = 1.0 if found.y is None else 1.0 / _step(found.y)
    scale = steps_of(found.weight).astype(np.float64) * _step(found.x) * per_step
    bias = np.zeros(len(codes), np.int32) if found.bias is None else codes_of(found.bias)
    residual = None
    if found.residual is not None:
        name, factor = str(found.residual.outputs[0].name), float(np.float32(_step(found.residual) * per_step))
        residual = Residual(name, factor, _zero_point(found.residual))
    return Int8Layer(
        packed=PackedInt8.of(codes, found.weight.attributes["block"].as_int(), 1 if window is None else window.group),
        weight_shape=tuple(codes.shape),
        bias=torch.from_numpy(bias),
        scale=torch.from_numpy(scale.astype(np.float32)),
        x_zero_point=_zero_point(found.x),
        y_zero_point=None if found.y is None else _zero_point(found.y),
        window=window,
        residual=residual,
        slope=found.slope,
    )


def _step(rounding: onnx_ir.Node) -> float:
    return float(steps_of(rounding))


def _replace(model: onnx_ir.Model, found: _Found) -> None:
    import onnx_ir

    described = _described(found)
    source = found.weight.inputs[0]
    assert source is not None
    name = str(source.name).removesuffix(".weight")
    tensors = [add_constant(model, {}, f"{name}.{part}", t.numpy()) for part, t in described.tensors.items()]
    added = [] if found.residual is None else [found.residual.outputs[0]]
    attributes = [_attribute(key, value) for key, value in described.attributes.items()]
    node = onnx_ir.Node(
        DOMAIN, described.op_type, [found.x.outputs[0], *tensors, *added], attributes, name=found.layer.name
    )
    _take_place(model, found.last, node, onnx_ir.DataType.FLOAT if found.y is None else onnx_ir.DataType.UINT8)


def _is_behind_packed(pool: onnx_ir.Node) -> bool:
    """Whether a pool of two dimensions reads what a packed layer returns, and its result is rounded in the same way."""
    before, after = _rounding(pool.inputs[0]), _only_reader(pool)
    if before is None or not is_packed(before.inputs[0].producer()) or not is_rounding(after):  # type: ignore[union-attr]
        return False
    assert after is not None
    alike = steps_of(before) == steps_of(after) and all(
        before.attributes[name].as_int() == after.attributes[name].as_int()
        for name in ("zero_point", "lowest", "highest")
    )
    own = pool.attributes
    plain = all(not own[name].value for name in ("ceil_mode", "storage_order") if name in own)
    plain &= "auto_pad" not in own or own["auto_pad"].as_string() == "NOTSET"
    plain &= set(own["dilations"].as_ints() if "dilations" in own else ()) <= {1}
    sizes = before.inputs[0].shape  # type: ignore[union-attr]
    if not (alike and plain and sizes is not None and len(sizes) == 4):
        return False
    window, size = _window_of(pool), [d if isinstance(d, int) else 1 for d in sizes][2:]
    pads = [max(window["pads"][axis], window["pads"][axis + 2]) for axis in range(2)]
    return not why_not_pool(window["kernel_shape"], strides=window["strides"], pads=pads, input_size=size)


def _window_of(pool: onnx_ir.Node) -> dict[str, list[int]]:
    otherwise = {"strides": [1, 1], "pads": [0, 0, 0, 0]}
    own = pool.attributes
    return {name: list(own[name].as_ints() if name in own else otherwise[name]) for name in POOL_ATTRIBUTES}


def _replace_pool(model: onnx_ir.Model, pool: onnx_ir.Node) -> None:
    import onnx_ir

    attributes = [_attribute(name, values) for name, values in _window_of(pool).items()]
    node = onnx_ir.Node(DOMAIN, QPOOL, [pool.inputs[0]], attributes, name=pool.name)
    _take_place(model, pool, node, onnx_ir.DataType.UINT8)


def _take_place(model: onnx_ir.Model, last: onnx_ir.Node, node: onnx_ir.Node, kind: onnx_ir.DataType) -> None:
    """Let what reads the result of `last` read that of `node`, under the same name."""
    import onnx_ir

    old, new = last.outputs[0], node.outputs[0]
    new.name, new.type, new.shape = old.name, onnx_ir.TensorType(kind), old.shape
    model.graph.insert_before(last, node)
    put_in_place(model, old, new)
    old.name = f"{old.name}_replaced"


def _attribute(key: str, value: Any) -> onnx_ir.Attr:
    import onnx_ir

    return onnx_ir.convenience.convert_attribute(key, value)
