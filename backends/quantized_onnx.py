"""The ONNX form of programs that round as integers do: `slrc::fake_quantize` becomes integers.

A value gets a QuantizeLinear and a DequantizeLinear behind it, a weight or bias becomes an integer constant and a
DequantizeLinear: runtimes fuse those with the operators between them. Constants that operators only move are moved
beforehand, so that each is read through its DequantizeLinear alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slrc.forms import quantize_ops

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "ai.slrc"
FAKE_QUANTIZE = "FakeQuantize"
CODES = "{}_codes"
"""What the integers of a value are called, by the value's own name in the file."""


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what `torch.onnx.export` is to make of roundings: nodes that `write_integers` replaces."""
    return {torch.ops.slrc.fake_quantize.default: _translate}


def _translate(x: Any, scale: Any, zero_point: int, axis: int, lowest: int, highest: int) -> Any:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    names = ("zero_point", "axis", "lowest", "highest")
    schema = OpSchema(
        FAKE_QUANTIZE,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(n, "tensor(float)") for n in ("x", "scale")],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
        attributes=[OpSchema.Attribute(n, OpSchema.AttrType.INT) for n in names],
    )
    own = {"zero_point": zero_point, "axis": axis, "lowest": lowest, "highest": highest}
    return Op(Opset(DOMAIN, 1), FAKE_QUANTIZE, schema)(x, scale, **own)


def write_integers(model: onnx_ir.Model) -> bool:
    """Replace the roundings of a model in place; return whether there were any."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type == FAKE_QUANTIZE]
    constants: dict[tuple[Any, ...], onnx_ir.Value] = {}
    for node in nodes:
        _replace(model, node, constants)
    if nodes:
        RemoveUnusedNodesPass()(model)
        initializers = model.graph.initializers
        for name in [n for n, v in initializers.items() if not v.uses() and not v.is_graph_output()]:
            del initializers[name]
        model.graph.opset_imports.pop(DOMAIN, None)
    return bool(nodes)


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, constants: dict[tuple[Any, ...], onnx_ir.Value]) -> None:
    x, scale = node.inputs
    assert x is not None
    assert scale is not None
    own = {name: node.attributes[name].as_int() for name in ("zero_point", "axis", "lowest", "highest")}
    kind = _type_of(own["lowest"], own["highest"])
    steps = _array(scale)
    # Zero points are given even where they are zero: else ONNX Runtime fuses no Gemm.
    zero = np.full(steps.shape, own["zero_point"], kind)
    if x.const_value is not None:
        codes = _codes(_array(x), steps, own).astype(kind)
        codes, axis = _moved(node, codes, own["axis"])
        # Each layer has its own: ONNX Runtime fails to make weights unsigned, for AVX2, that two layers share.
        named = (("integer", codes), ("step", steps), ("zero", zero))
        read = [_constant(model, {}, f"{x.name}_{what}", array) for what, array in named]
    else:
        axis = own["axis"]
        step = _constant(model, constants, f"{scale.name}_step", steps)
        offset = _constant(model, constants, f"{scale.name}_zero", zero)
        down = _node("QuantizeLinear", [x, step, offset], {})
        down.outputs[0].name = CODES.format(node.outputs[0].name)
        model.graph.insert_before(node, down)
        read = [down.outputs[0], step, offset]
    up = _node("DequantizeLinear", read, {"axis": axis} if steps.shape else {})
    up.outputs[0].name, up.outputs[0].type = node.outputs[0].name, node.outputs[0].type
    up.outputs[0].shape = node.outputs[0].shape if x.const_value is None else None
    model.graph.insert_before(node, up)
    _put_in_place(model, node, up)


def _put_in_place(model: onnx_ir.Model, node: onnx_ir.Node, made: onnx_ir.Node) -> None:
    old, new = node.outputs[0], made.outputs[0]
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for index, output in enumerate(model.graph.outputs):  # a rounded value may be an output itself
        if output is old:
            model.graph.outputs[index] = new
    model.graph.remove(node, safe=True)


def _moved(node: onnx_ir.Node, codes: Any, axis: int) -> tuple[Any, int]:
    """Take in a transposition that alone reads a constant, as of a linear layer's weight: return both transposed."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Transpose":
        return codes, axis
    user = uses[0][0]
    order = list(user.attributes["perm"].as_ints())
    for reader, index in list(user.outputs[0].uses()):
        reader.replace_input_with(index, node.outputs[0])
    assert user.graph is not None
    user.graph.remove(user, safe=True)
    return np.ascontiguousarray(codes.transpose(order)), order.index(axis)


def _codes(values: Any, steps: Any, own: Mapping[str, int]) -> Any:
    scale = torch.from_numpy(np.array(steps))
    return quantize_ops.quantize(torch.from_numpy(np.array(values)), scale, **own).numpy()


def _type_of(lowest: int, highest: int) -> Any:
    if lowest >= 0:
        return np.uint8
    return np.int8 if highest < 1 << 8 else np.int32


def _array(value: onnx_ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(
    model: onnx_ir.Model, constants: dict[tuple[Any, ...], onnx_ir.Value], name: str, array: Any
) -> onnx_ir.Value:
    """Return an initializer with these numbers; an equal one is shared."""
    import onnx_ir

    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in constants:
        free = next(n for n in [name, *(f"{name}_{k}" for k in range(1, 1 << 20))] if n not in model.graph.initializers)
        value = onnx_ir.Value(name=free, const_value=onnx_ir.tensor(array, name=free))
        value.type = onnx_ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
        value.shape = onnx_ir.Shape(array.shape)
        model.graph.initializers[free] = value
        constants[key] = value
    return constants[key]


def _node(op_type: str, inputs: list[onnx_ir.Value], attributes: Mapping[str, int]) -> onnx_ir.Node:
    import onnx_ir

    return onnx_ir.Node("", op_type, inputs, [onnx_ir.AttrInt64(n, v) for n, v in attributes.items()])


def show_codes(file: Path, out: Path) -> list[str]:
    """Write a model again with the integers of all rounded values as further outputs; return their names, in order."""
    import onnx

    model = onnx.load(file)
    names = [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(model, out)
    return names
