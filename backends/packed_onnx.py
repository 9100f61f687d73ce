"""The ONNX form of layers with packed blocks: nodes of the domain `ai.slrc`, and what they mean.

Each node comes with a model-local function of standard operators that rebuilds the dense weight and computes the same:
a runtime that knows no `ai.slrc` runs that, and folds the weight to a constant. Where the library of kernels is loaded,
the runtime calls those instead. A function stands for one activation, with or without a residual, and its name
says which: overloads would do, but TensorRT's parser takes the first function of a name for all of them.

The function of two matrix multiplications, one behind the other, has the operators of both: TensorRT's parser mixes up
the values of functions that call functions.

Pools and upsampling behind packed layers are nodes of the domain too: for a pool of its own, ONNX Runtime would bring
what the kernels write into another layout and back, and its bilinear upsampling goes pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slrc.backends import int8_onnx
from slrc.backends.packed_weight_onnx import PLACES
from slrc.forms import packed_ops  # noqa: F401, registers the operators
from slrc.forms.activations import ACTIVATIONS

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from slrc.forms.packed_weight import PackedWeight

DOMAIN = "ai.slrc"
VERSION = 1
CONV, GEMM, MLP = "BlockSparseConv", "BlockSparseGemm", "BlockSparseMlp"
POOL, UPSAMPLE = "MaxPool2x2", "UpsampleBilinear2x"
FIRST, LAST, SHUFFLE = "ChannelsFirst", "ChannelsLast", "DepthToSpace"

_WEIGHT = f"""
    {PLACES}
    width = ReduceProd (tail)
    blocks_shape = Concat <axis = 0> (block_rows, width, block)
    empty = ConstantOfShape (blocks_shape)
    blocks = ScatterND (empty, where, values)
    rows_last = Transpose <perm = [0, 2, 1]> (blocks)
    by_group = Concat <axis = 0> (groups, minus_one, width)
    filled = Reshape (rows_last, by_group)
    per_group = Div (outputs, groups)
    kept = Slice (filled, zero, per_group, one)
    weight = Reshape (kept, shape)
"""

_CONV = """
    group_count = Constant <value_int: int = @group> ()
    flat = Constant <value_ints = [-1]> ()
    groups = Reshape (group_count, flat)
    {weight}
    product = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
                   (x, weight, bias)
"""

_GEMM = """
    groups = Constant <value_ints = [1]> ()
    {weight}
    turned = Transpose <perm = [1, 0]> (weight)
    unbiased = MatMul (x, turned)
    product = Add (unbiased, bias)
"""

_PLANES = {
    POOL: "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
    UPSAMPLE: """
    scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
    y = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (x, , scales)
""",
    FIRST: "y = Transpose <perm = [0, 3, 1, 2]> (x)",
    LAST: "y = Transpose <perm = [0, 2, 3, 1]> (x)",
    SHUFFLE: "y = DepthToSpace <blocksize: int = @blocksize> (x)",
}
"""What the nodes that have no weight mean."""
_WEIGHT_OPERANDS = ("values", "columns", "row_pointers", "bias")
_OPERANDS = {
    CONV: ("x", *_WEIGHT_OPERANDS),
    GEMM: ("x", *_WEIGHT_OPERANDS),
    MLP: ("x", *_WEIGHT_OPERANDS, *(f"down_{name}" for name in _WEIGHT_OPERANDS)),
    **dict.fromkeys(_PLANES, ("x",)),
}
"""The inputs of each node; the residual of layers may follow."""
_INTS, _INT, _FLOAT, _TEXT = "INTS", "INT", "FLOAT", "STRING"
_OWN = {"block": _INT, "weight_shape": _INTS, "activation": _TEXT, "slope": _FLOAT}
_ATTRIBUTES = {
    GEMM: _OWN,
    CONV: _OWN | {"strides": _INTS, "pads": _INTS, "dilations": _INTS, "group": _INT},
    MLP: _OWN | {"down_block": _INT, "down_weight_shape": _INTS},
    **{op_type: {} for op_type in _PLANES},
    SHUFFLE: {"blocksize": _INT},
}
"""The attributes of each node and their types."""


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what `torch.onnx.export` is to make of the packed operators."""
    return {
        torch.ops.slrc.block_sparse_conv.default: _translate_conv,
        torch.ops.slrc.block_sparse_gemm.default: _translate_gemm,
        torch.ops.slrc.block_sparse_mlp.default: _translate_mlp,
        torch.ops.slrc.max_pool2x2.default: lambda x: _op(POOL)(x),
        torch.ops.slrc.upsample_bilinear2x.default: lambda x: _op(UPSAMPLE)(x),
        torch.ops.slrc.channels_first.default: lambda x: _op(FIRST)(x),
        torch.ops.slrc.channels_last.default: lambda x: _op(LAST)(x),
        torch.ops.slrc.depth_to_space.default: lambda x, block: _op(SHUFFLE)(x, blocksize=block),
    }


def _translate_conv(*arguments: Any) -> Any:
    out_channels, kernel_shape, strides, pads, dilations, group, *activation = arguments[6:]
    window = {"strides": strides, "pads": [*pads, *pads], "dilations": dilations}
    weight_shape = [out_channels, int(arguments[0].shape[1]) // group, *kernel_shape]
    return _node(CONV, arguments[:6], weight_shape, *activation, group=group, **window)


def _translate_gemm(*arguments: Any) -> Any:
    out_channels, *activation = arguments[6:]
    return _node(GEMM, arguments[:6], [out_channels, int(arguments[0].shape[-1])], *activation)


def _translate_mlp(*arguments: Any) -> Any:
    hidden_channels, out_channels, *activation = arguments[10:]
    down: dict[str, Any] = {
        "down_block": int(arguments[5].shape[1]),
        "down_weight_shape": [out_channels, hidden_channels],
    }
    return _node(MLP, arguments[:10], [hidden_channels, int(arguments[0].shape[-1])], *activation, **down)


def _node(
    name: str, operands: Sequence[Any], weight_shape: list[int], activation: str, slope: float, **others: Any
) -> Any:
    """Record a node; a residual that is missing is left out."""
    given = [x for x in operands if x is not None]
    block = int(operands[1].shape[1])
    own = dict(zip(_OWN, (block, weight_shape, activation, slope), strict=True))
    return _op(name)(*given, **own, **others)


def _op(name: str) -> Any:
    """Return a node's constructor, with the schema that the exporter asks for."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    number = "tensor(float)"
    inputs = [
        OpSchema.FormalParameter(x, "tensor(int32)" if x.endswith(("columns", "row_pointers")) else number)
        for x in _OPERANDS[name]
    ]
    optional = OpSchema.FormalParameterOption.Optional
    residual = OpSchema.FormalParameter("residual", number, param_option=optional)
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs if name in _PLANES else [*inputs, residual],
        outputs=[OpSchema.FormalParameter("y", number)],
        attributes=[OpSchema.Attribute(n, getattr(OpSchema.AttrType, kind)) for n, kind in _ATTRIBUTES[name].items()],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


def attach_functions(model: onnx_ir.Model, opset: int) -> bool:
    """Give every packed node of a model its function, in operators of an opset; return whether there is any."""
    import onnx_ir

    functions: dict[str, onnx.FunctionProto] = {}
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            if node.op_type in _PLANES:
                function = planes_function(node.op_type, opset)
            elif node.op_type.startswith(int8_onnx.INT8_OPS):
                function = int8_onnx.function_of(node.op_type, opset)
            else:
                activation = node.attributes["activation"].as_string()
                residual = len(node.inputs) > len(_OPERANDS[node.op_type])
                function = function_of(node.op_type, activation, residual, opset)
            node.op_type = function.name
            functions[function.name] = function
    for _, function in sorted(functions.items()):
        deserialized = onnx_ir.serde.deserialize_function(function)
        model.functions[deserialized.identifier()] = deserialized
    if functions:
        model.graph.opset_imports[DOMAIN] = VERSION
    return bool(functions)


def _name(op_type: str, activation: str, residual: bool) -> str:
    return "_".join([op_type, activation, *(["residual"] if residual else [])])


def planes_function(op_type: str, opset: int) -> onnx.FunctionProto:
    """Return the meaning of a node that has no weight."""
    from onnx import parser

    attributes = f" <{', '.join(_ATTRIBUTES[op_type])}>" if _ATTRIBUTES[op_type] else ""
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{op_type}{attributes} (x) => (y) {{ {_PLANES[op_type]} }}'
    )


def function_of(op_type: str, activation: str, residual: bool, opset: int) -> onnx.FunctionProto:
    """Return the meaning of one kind of node."""
    from onnx import parser

    # As many inputs as the node: TensorRT's parser asks for that.
    inputs = [*_OPERANDS[op_type], *(["residual"] if residual else [])]
    name = _name(op_type, activation, residual)
    if op_type == MLP:
        return _mlp_function(name, inputs, activation, residual, opset)
    body = (_CONV if op_type == CONV else _GEMM).format(weight=_WEIGHT)
    body += f"    sum = {'Add (product, residual)' if residual else 'Identity (product)'}\n"
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} <{', '.join(_ATTRIBUTES[op_type])}> ({', '.join(inputs)}) => (y)\n"
        f"{{{body}    {ACTIVATIONS[activation].onnx}\n}}"
    )


def _mlp_function(name: str, inputs: Sequence[str], activation: str, residual: bool, opset: int) -> onnx.FunctionProto:
    from onnx import helper

    up, down = function_of(GEMM, activation, False, opset), function_of(GEMM, "none", residual, opset)
    nodes = [
        *_renamed(up.node, "", {"y": "hidden"}),
        *_renamed(down.node, "down_", {"x": "hidden", "residual": "residual", "y": "y"}),
    ]
    return helper.make_function(
        DOMAIN, name, inputs, ["y"], nodes, [helper.make_opsetid("", opset)], list(_ATTRIBUTES[MLP])
    )


def _renamed(nodes: Iterable[onnx.NodeProto], prefix: str, names: Mapping[str, str]) -> Iterator[onnx.NodeProto]:
    """Yield copies of a function's nodes; values that `names` does not have, and attributes, get a prefix."""
    import onnx

    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(value, prefix + value) for value in node.input]
        copy.output[:] = [names.get(value, prefix + value) for value in node.output]
        for attribute in copy.attribute:
            if attribute.ref_attr_name:
                attribute.ref_attr_name = prefix + attribute.ref_attr_name
        yield copy


def replace_blocks(model: onnx.ModelProto, packed: PackedWeight) -> None:
    """Give the one packed layer of a model other blocks, of any number of rows."""
    from onnx import numpy_helper

    (node,) = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type not in _PLANES]
    tensors = (packed.values, packed.columns, packed.row_pointers)
    blocks = dict(zip(node.input[1:4], tensors, strict=True))
    for initializer in model.graph.initializer:
        if initializer.name in blocks:
            initializer.CopyFrom(numpy_helper.from_array(blocks[initializer.name].numpy(), initializer.name))
    next(a for a in node.attribute if a.name == "block").i = packed.values.shape[1]
