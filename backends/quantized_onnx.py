"""The ONNX form of programs that round as integers do: `slrc::fake_quantize` becomes integers.

A value gets a QuantizeLinear and a DequantizeLinear behind it, a weight or bias becomes an integer constant and a
DequantizeLinear: runtimes fuse those with the operators between them. Constants that operators only move are moved
beforehand, so that each is read through its DequantizeLinear alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slrc.backends.int8_onnx import DOMAIN, INT8_OPS, RESIDUAL
from slrc.forms import quantize_ops

if TYPE_CHECKING:
    import onnx
    import onnx_ir

FAKE_QUANTIZE = "FakeQuantize"
CODES = "{}_codes"
"""What the integers of a value are called, by the value's own name in the file."""


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what `torch.onnx.export` is to make of roundings: nodes that `write_integers` replaces."""
    return {torch.ops.slrc.fake_quantize.default: _translate}


def _translate(x: Any, scale: Any, zero_point: int, axis: int, lowest: int, highest: int, block: int = 0) -> Any:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    names = ("zero_point", "axis", "lowest", "highest", "block")
    schema = OpSchema(
        FAKE_QUANTIZE,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(n, "tensor(float)") for n in ("x", "scale")],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
        attributes=[OpSchema.Attribute(n, OpSchema.AttrType.INT) for n in names],
    )
    own = {"zero_point": zero_point, "axis": axis, "lowest": lowest, "highest": highest, "block": block}
    return Op(Opset(DOMAIN, 1), FAKE_QUANTIZE, schema)(x, scale, **own)


def write_integers(model: onnx_ir.Model) -> bool:
    """Replace the roundings of a model in place; return whether there were any."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    nodes = [n for n in model.graph if is_rounding(n)]
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


def is_rounding(node: onnx_ir.Node | None) -> bool:
    """Whether a node is one that `write_integers` replaces."""
    return node is not None and node.domain == DOMAIN and node.op_type == FAKE_QUANTIZE


def is_packed(node: onnx_ir.Node | None) -> bool:
    """Whether a node is a packed layer, or a pool beside one, which reads integers."""
    return node is not None and node.domain == DOMAIN and node.op_type.startswith(INT8_OPS)


def steps_of(node: onnx_ir.Node) -> Any:
    """Return the scale of a rounding as an array."""
    scale = node.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    return scale.const_value.numpy()


def codes_of(node: onnx_ir.Node) -> Any:
    """Return the integers of a constant that is rounded, as an array of their type."""
    x = node.inputs[0]
    assert x is not None
    assert x.const_value is not None
    own = _limits(node)
    values, scale = (torch.from_numpy(np.array(array)) for array in (x.const_value.numpy(), steps_of(node)))
    return quantize_ops.quantize(values, scale, **own).numpy().astype(_type_of(own["lowest"], own["highest"]))


def _limits(node: onnx_ir.Node) -> dict[str, int]:
    return {name: node.attributes[name].as_int() for name in ("zero_point", "axis", "lowest", "highest")}


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, constants: dict[tuple[Any, ...], onnx_ir.Value]) -> None:
    x, scale = node.inputs
    assert x is not None
    assert scale is not None
    own = _limits(node)
    kind = _type_of(own["lowest"], own["highest"])
    steps = steps_of(node)
    # Zero points are given even where they are zero: else ONNX Runtime fuses no Gemm.
    zero = np.full(steps.shape, own["zero_point"], kind)
    if x.const_value is not None:
        codes, axis = _moved(node, codes_of(node), own["axis"])
        # Each layer has its own: ONNX Runtime fails to make weights unsigned, for AVX2, that two layers share.
        named = (("integer", codes), ("step", steps), ("zero", zero))
        read = [add_constant(model, {}, f"{x.name}_{what}", array) for what, array in named]
    else:
        axis = own["axis"]
        step = add_constant(model, constants, f"{scale.name}_step", steps)
        offset = add_constant(model, constants, f"{scale.name}_zero", zero)
        if is_packed(x.producer()):  # which returns integers
            integers = x
        else:
            down = _node("QuantizeLinear", [x, step, offset], {})
            model.graph.insert_before(node, down)
            integers = down.outputs[0]
        integers.name = CODES.format(node.outputs[0].name)
        for user, index in list(node.outputs[0].uses()):
            if is_packed(user):
                user.replace_input_with(index, integers)
        read = [integers, step, offset]
    up = _node("DequantizeLinear", read, {"axis": axis} if steps.shape else {})
    up.outputs[0].name, up.outputs[0].type = node.outputs[0].name, node.outputs[0].type
    up.outputs[0].shape = node.outputs[0].shape if x.const_value is None else None
    model.graph.insert_before(node, up)
    put_in_place(model, node.outputs[0], up.outputs[0])
    model.graph.remove(node, safe=True)


def put_in_place(model: onnx_ir.Model, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Let all that reads a value read another one, be it an output of the model."""
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for index, output in enumerate(model.graph.outputs):
        if output is old:
            model.graph.outputs[index] = new


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


def _type_of(lowest: int, highest: int) -> Any:
    if lowest >= 0:
        return np.uint8
    return np.int8 if highest < 1 << 8 else np.int32


def add_constant(
    model: onnx_ir.Model, constants: dict[tuple[Any, ...], onnx_ir.Value], name: str, array: Any
) -> onnx_ir.Value:
    """Return an initializer with these numbers; an equal one is shared."""
    import onnx_ir

    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in constants:
        names = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(1)))
        free = next(n for n in names if n not in model.graph.initializers)
        value = onnx_ir.Value(name=free, const_value=onnx_ir.tensor(array, name=free))
        value.type = onnx_ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
        value.shape = onnx_ir.Shape(array.shape)
        model.graph.initializers[free] = value
        constants[key] = value
    return constants[key]


def _node(op_type: str, inputs: list[onnx_ir.Value], attributes: Mapping[str, int]) -> onnx_ir.Node:
    import onnx_ir

    return onnx_ir.Node("", op_type, inputs, [onnx_ir.AttrInt64(n, v) for n, v in attributes.items()])


@dataclass(frozen=True)
class Shown:
    """What a model returns that shows what it computes, by name.

    `outputs` are all that it returns, in order, of which the first `own` are those of the model as it was. `codes` are
    the integers of rounded values. `packed` are results of packed layers, each with the integers that the layer reads.
    """

    outputs: tuple[str, ...]
    own: int
    codes: tuple[str, ...]
    packed: Mapping[str, tuple[str, ...]]


def show_codes(file: Path, out: Path) -> Shown:
    """Write a model again with the integers of all rounded values, and results of packed layers, as further outputs."""
    import onnx

    model = onnx.load(file)
    packed = {n.output[0]: (n.input[0], *n.input[RESIDUAL:]) for n in _packed_layers(model)}
    own = [o.name for o in model.graph.output]
    made = {name: n for n in model.graph.node for name in n.output}
    names = [name for name in made if name.endswith(CODES.format(""))]
    further = [name for name in dict.fromkeys([*names, *packed]) if name not in own]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in further)
    onnx.save(model, out)
    return Shown((*own, *further), len(own), tuple(names), packed)


def write_packed_alone(file: Path, out: Path) -> tuple[str, ...]:
    """Write the packed layers of a model as one of their own, which returns what each computes, in order.

    It takes the integers that they read: their names are returned, in order.
    """
    import onnx

    model = onnx.load(file)
    graph, nodes = model.graph, list(_packed_layers(model))
    reads = dict.fromkeys(name for n in nodes for name in (n.input[0], *n.input[RESIDUAL:]))
    given = {name: f"{name}_read" for name in reads}  # what one layer computes another may read
    for node in nodes:
        node.input[:] = [given.get(name, name) for name in node.input]
    used = {name for n in nodes for name in n.input}
    alone = onnx.helper.make_graph(
        nodes,
        graph.name,
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in given.values()],
        [onnx.ValueInfoProto(name=n.output[0]) for n in nodes],
        [i for i in graph.initializer if i.name in used],
    )
    graph.CopyFrom(alone)
    onnx.save(model, out)
    return tuple(reads)


def _packed_layers(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (n for n in model.graph.node if n.domain == DOMAIN and n.op_type.startswith(INT8_OPS))
