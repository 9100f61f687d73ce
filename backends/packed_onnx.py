"""The ONNX form of layers with packed blocks: nodes of the domain `ai.slrc`, and what they mean.

Each node comes with a model-local function of standard operators that rebuilds the dense weight and computes the same:
a runtime that knows no `ai.slrc` runs that, and folds the weight to a constant. Where the library of kernels is loaded,
the runtime calls those instead. A function stands for one activation, with or without a residual: its overload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slrc import packed_ops  # noqa: F401, registers the operators

if TYPE_CHECKING:
    import onnx
    import onnx_ir

DOMAIN = "ai.slrc"
VERSION = 1
CONV, GEMM = "BlockSparseConv", "BlockSparseGemm"
IR_VERSION = 10
"""The first with overloads of functions."""

# The block row of a packed block is the number of row pointers, the first one left out, that are not above its place.
_WEIGHT = """
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    minus_one = Constant <value_ints = [-1]> ()
    first = Constant <value_int = 0> ()
    block = Shape <start = 1> (values)
    count = Shape (columns)
    width = ReduceProd (tail)
    pointers = Shape (row_pointers)
    block_rows = Sub (pointers, one)
    inner = Slice (row_pointers, one, minus_one)
    ends = Cast <to = 7> (inner)
    end_count = Shape (ends)
    steps = Expand (one, end_count)
    places = Add (count, one)
    none = Expand (zero, places)
    marks = ScatterElements <axis = 0, reduction = "add"> (none, ends, steps)
    rows_and_end = CumSum (marks, first)
    rows = Slice (rows_and_end, zero, count)
    row = Unsqueeze (rows, minus_one)
    columns_long = Cast <to = 7> (columns)
    column = Unsqueeze (columns_long, minus_one)
    where = Concat <axis = 1> (row, column)
    blocks_shape = Concat <axis = 0> (block_rows, width, block)
    empty = ConstantOfShape (blocks_shape)
    blocks = ScatterND (empty, where, values)
    rows_last = Transpose <perm = [0, 2, 1]> (blocks)
    by_group = Concat <axis = 0> (groups, minus_one, width)
    filled = Reshape (rows_last, by_group)
    per_group = Div (outputs, groups)
    kept = Slice (filled, zero, per_group, one)
    shape = Concat <axis = 0> (outputs, tail)
    weight = Reshape (kept, shape)
"""

_CONV = """
    outputs_ = Constant <value_int: int = @out_channels> ()
    groups_ = Constant <value_int: int = @group> ()
    scalar = Constant <value_ints = [1]> ()
    outputs = Reshape (outputs_, scalar)
    groups = Reshape (groups_, scalar)
    kernel = Constant <value_ints: ints = @kernel_shape> ()
    channels = Constant <value_int: int = @in_channels> ()
    inputs = Div (channels, groups)
    tail = Concat <axis = 0> (inputs, kernel)
    {weight}
    product = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
                    dilations: ints = @dilations, group: int = @group> (x, weight, bias)
"""

_GEMM = """
    outputs_ = Constant <value_int: int = @out_channels> ()
    groups = Constant <value_ints = [1]> ()
    outputs = Reshape (outputs_, groups)
    inputs = Constant <value_int: int = @in_channels> ()
    tail = Reshape (inputs, groups)
    {weight}
    turned = Transpose <perm = [1, 0]> (weight)
    unbiased = MatMul (x, turned)
    product = {bias}
"""

_ACTIVATIONS = {
    "none": "y = Identity (sum)",
    "relu": "y = Relu (sum)",
    "relu6": """low = Constant <value_float = 0.0> ()
    high = Constant <value_float = 6.0> ()
    y = Clip (sum, low, high)""",
    "silu": """gate = Sigmoid (sum)
    y = Mul (sum, gate)""",
    "gelu": "y = Gelu (sum)",
    "hardswish": "y = HardSwish (sum)",
}
_INTS, _INT, _TEXT = "INTS", "INT", "STRING"
_ATTRIBUTES = {
    GEMM: {"block": _INT, "in_channels": _INT, "out_channels": _INT, "activation": _TEXT},
    CONV: {
        **{"block": _INT, "in_channels": _INT, "out_channels": _INT, "activation": _TEXT},
        **{"kernel_shape": _INTS, "strides": _INTS, "pads": _INTS, "dilations": _INTS, "group": _INT},
    },
}
"""The attributes of each node and their types."""


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what `torch.onnx.export` is to make of the packed operators."""
    return {
        torch.ops.slrc.block_sparse_conv.default: _translate_conv,
        torch.ops.slrc.block_sparse_gemm.default: _translate_gemm,
    }


def _translate_conv(*arguments: Any) -> Any:
    out_channels, kernel_shape, strides, pads, dilations, group, activation = arguments[6:]
    window = {"kernel_shape": kernel_shape, "strides": strides, "pads": [*pads, *pads], "dilations": dilations}
    in_channels = int(arguments[0].shape[1])
    return _node(CONV, arguments[:6], in_channels, out_channels, activation, group=group, **window)


def _translate_gemm(*arguments: Any) -> Any:
    out_channels, activation = arguments[6:]
    return _node(GEMM, arguments[:6], int(arguments[0].shape[-1]), out_channels, activation)


def _node(
    name: str, operands: Sequence[Any], in_channels: int, out_channels: int, activation: str, **window: Any
) -> Any:
    """Record a node; what is missing at the end of its operands is left out: ONNX has no name for it."""
    given = list(operands)
    while given[-1] is None:
        given.pop()
    block = int(operands[1].shape[1])
    own = {"block": block, "in_channels": in_channels, "out_channels": out_channels, "activation": activation}
    return _op(name)(*given, **own, **window)


def _op(name: str) -> Any:
    """Return a node's constructor, with the schema that the exporter asks for."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    whole, number = "tensor(int32)", "tensor(float)"
    required = {"x": number, "values": number, "columns": whole, "row_pointers": whole}
    optional = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            *(OpSchema.FormalParameter(n, kind) for n, kind in required.items()),
            *(OpSchema.FormalParameter(n, number, param_option=optional) for n in ("bias", "residual")),
        ],
        outputs=[OpSchema.FormalParameter("y", number)],
        attributes=[OpSchema.Attribute(n, getattr(OpSchema.AttrType, kind)) for n, kind in _ATTRIBUTES[name].items()],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


def attach_functions(model: onnx_ir.Model, opset: int) -> bool:
    """Give every packed node of a model its function, in operators of an opset; return whether there is any."""
    import onnx_ir

    variants = set()
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            bias, residual = (len(node.inputs) > k and node.inputs[k] is not None for k in (4, 5))
            variant = (node.op_type, node.attributes["activation"].as_string(), bias, residual)
            node.overload = _overload(*variant[1:])
            variants.add(variant)
    for variant in sorted(variants):
        function = onnx_ir.serde.deserialize_function(function_of(*variant, opset=opset))
        model.functions[function.identifier()] = function
    if variants:
        model.graph.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version, IR_VERSION)
    return bool(variants)


def _overload(activation: str, bias: bool, residual: bool) -> str:
    return "_".join([activation, *(["bias"] if bias else []), *(["residual"] if residual else [])])


def function_of(op_type: str, activation: str, bias: bool, residual: bool, opset: int) -> onnx.FunctionProto:
    """Return the meaning of one kind of node."""
    from onnx import parser

    if op_type == CONV:
        body = _CONV.format(weight=_WEIGHT)
    else:
        body = _GEMM.format(weight=_WEIGHT, bias="Add (unbiased, bias)" if bias else "Identity (unbiased)")
    body += f"    sum = {'Add (product, residual)' if residual else 'Identity (product)'}\n"
    function = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{op_type} <{', '.join(_ATTRIBUTES[op_type])}> "
        "(x, values, columns, row_pointers, bias, residual) => (y)\n"
        f"{{{body}    {_ACTIVATIONS[activation]}\n}}"
    )
    function.overload = _overload(activation, bias, residual)
    return function
