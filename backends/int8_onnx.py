"""The ONNX form of int8 layers with packed blocks: nodes of the domain `ai.slrc`, and what they mean.

    BlockSparseQConv, BlockSparseQGemm    x uint8 ─▶ y uint8
    …_leakyrelu                           with a LeakyReLU in front of the rounding
    …_residual                            with a uint8 residual as the last input
    …_float                               y float32
    MaxPoolBytes                          x uint8 ─▶ y uint8, as MaxPool; behind them, in their layout

    sum[o]  = bias[o] + Σ weight[o, …] · (x[…] − x_zero_point)         int32; a padded x is x_zero_point
    real[o] = float(sum[o]) · scale[o]                                 float32, rounded once
    real    = real + float(residual − residual_zero_point) · residual_scale
    real    = real < 0 ? real · slope : real
    y       = saturate(round_half_to_even(real) + y_zero_point)        or `real` itself

So `scale` is x's scale times the weight's, for uint8 divided by y's scale, and `residual_scale` is the residual's, also
divided by it. An activation that cuts off (ReLU, ReLU6) is the range of y, and no operator: with y_zero_point 0, the
saturation at 0 is ReLU.

`slrc.backends.pack_integers` makes nodes of the layers of a model that rounds; `attach_functions` of
`slrc.backends.packed_onnx` then gives the model what they mean, for a runtime without the kernels. Both compute the
same bits, where the runtime's own integer products are exact (on x86-64 without VNNI ONNX Runtime's saturate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slrc.backends.packed_weight_onnx import PLACES

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from slrc.forms.packed_int8 import PackedInt8

DOMAIN = "ai.slrc"
QCONV, QGEMM, QPOOL = INT8_OPS = "BlockSparseQConv", "BlockSparseQGemm", "MaxPoolBytes"
"""What operators' names begin with; the last one is a max pool of integers, in the layout of the layers."""
RESIDUAL = 6
"""Which input the residual is, where there is one."""


@dataclass(frozen=True)
class Window:
    """A convolution's window. `pads` are top, left, bottom and right."""

    strides: Sequence[int] = (1, 1)
    pads: Sequence[int] = (0, 0, 0, 0)
    dilations: Sequence[int] = (1, 1)
    group: int = 1


@dataclass(frozen=True)
class Residual:
    """What is added: the name of a uint8 value, its scale (over that of a uint8 output), its zero point."""

    value: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Int8Layer:
    """One layer, as this module's description says.

    `weight_shape` is `(out, in/groups, kh, kw)` with a window, `(out, in)` without one. `bias` is int32 `(out,)`,
    `scale` float32 `(out,)`. Without a `y_zero_point` the output is float32.
    """

    packed: PackedInt8
    weight_shape: Sequence[int]
    bias: Tensor
    scale: Tensor
    x_zero_point: int
    y_zero_point: int | None
    window: Window | None = None
    residual: Residual | None = None
    slope: float | None = None
    """Of a LeakyReLU between the sum and its rounding."""

    @property
    def op_type(self) -> str:
        """The node's, which says what its function is."""
        parts = [QGEMM if self.window is None else QCONV]
        parts += ["leakyrelu"] if self.slope is not None else []
        parts += ["residual"] if self.residual is not None else []
        return "_".join(parts + (["float"] if self.y_zero_point is None else []))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The node's constant inputs, in order, behind x."""
        return {**vars(self.packed), "bias": self.bias, "scale": self.scale}

    @property
    def attributes(self) -> dict[str, Any]:
        """The node's: integers, floats, and lists of integers."""
        found: dict[str, Any] = {
            "block": int(self.packed.values.shape[1]),
            "weight_shape": list(self.weight_shape),
            "x_zero_point": self.x_zero_point,
        }
        if self.y_zero_point is not None:
            found["y_zero_point"] = self.y_zero_point
        if self.residual is not None:
            found |= {"residual_scale": self.residual.scale, "residual_zero_point": self.residual.zero_point}
        if self.slope is not None:
            found["slope"] = self.slope
        if self.window is not None:
            window = vars(self.window)
            found |= {key: value if isinstance(value, int) else list(value) for key, value in window.items()}
        return found


def node_of(layer: Int8Layer, x: str, y: str, name: str) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """Return the node that computes the value `y` of the value `x`, and its initializers, named after `name`."""
    from onnx import helper, numpy_helper

    initializers = [numpy_helper.from_array(t.detach().numpy(), f"{name}.{part}") for part, t in layer.tensors.items()]
    inputs = [x, *(i.name for i in initializers), *([layer.residual.value] if layer.residual else [])]
    return helper.make_node(layer.op_type, inputs, [y], name=name, domain=DOMAIN, **layer.attributes), initializers


# Every block at its place in (block rows, quads and positions, M, 4), then the weight's own order, without the filling.
_WEIGHT = f"""
    {PLACES}
    inputs = Slice (shape, one, two)
    kernel = Slice (shape, two, end)
    taps = ReduceProd <keepdims = 1> (kernel)
    filling = Sub (four, one)
    reached = Add (inputs, filling)
    quads = Div (reached, four)
    width = Mul (quads, taps)
    blocks_shape = Concat <axis = 0> (block_rows, width, block, four)
    empty = ConstantOfShape <value = int8[1] {{0}}> (blocks_shape)
    blocks = ScatterND (empty, where, values)
    parts_shape = Concat <axis = 0> (block_rows, quads, taps, block, four)
    parts = Reshape (blocks, parts_shape)
    turned = Transpose <perm = [0, 3, 1, 4, 2]> (parts)
    channels = Mul (quads, four)
    by_group = Concat <axis = 0> (groups, minus_one, channels, taps)
    filled = Reshape (turned, by_group)
    per_group = Div (outputs, groups)
    kept = Concat <axis = 0> (per_group, inputs)
    begins = Concat <axis = 0> (zero, zero)
    axes = Concat <axis = 0> (one, two)
    cut = Slice (filled, begins, kept, axes)
    weight = Reshape (cut, shape)
"""
_START = """
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    x_zero = Constant <value_int: int = @x_zero_point> ()
    x_zero_byte = Cast <to = 2> (x_zero)
"""
_CONV = """
    group_count = Constant <value_int: int = @group> ()
    flat = Constant <value_ints = [-1]> ()
    groups = Reshape (group_count, flat)
    {weight}
    product = ConvInteger <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations,
                           group: int = @group> (x, weight, x_zero_byte)
    by_channel = Constant <value_ints = [-1, 1, 1]> ()
    bias_there = Reshape (bias, by_channel)
    scale_there = Reshape (scale, by_channel)
"""
_GEMM = """
    groups = Constant <value_ints = [1]> ()
    {weight}
    transposed = Transpose <perm = [1, 0]> (weight)
    product = MatMulInteger (x, transposed, x_zero_byte)
    bias_there = Identity (bias)
    scale_there = Identity (scale)
"""
_SCALED = """
    sum = Add (product, bias_there)
    sum_float = Cast <to = 1> (sum)
    scaled = Mul (sum_float, scale_there)
"""
_RESIDUAL = """
    residual_float = Cast <to = 1> (residual)
    residual_zero = Constant <value_int: int = @residual_zero_point> ()
    residual_zero_float = Cast <to = 1> (residual_zero)
    residual_shifted = Sub (residual_float, residual_zero_float)
    residual_factor = Constant <value_float: float = @residual_scale> ()
    residual_real = Mul (residual_shifted, residual_factor)
    added = Add (scaled, residual_real)
"""
_QUANTIZED = """
    unit = Constant <value_float = 1.0> ()
    y_zero = Constant <value_int: int = @y_zero_point> ()
    y_zero_byte = Cast <to = 2> (y_zero)
    y = QuantizeLinear (real, unit, y_zero_byte)
"""
_ATTRIBUTES = ("block", "weight_shape", "x_zero_point")
POOL_ATTRIBUTES = ("kernel_shape", "strides", "pads")


def function_of(op_type: str, opset: int) -> onnx.FunctionProto:
    """Return the meaning of a kind of node, in operators of an opset."""
    from onnx import parser

    op, *parts = op_type.split("_")
    if op == QPOOL:
        window = ", ".join(f"{name}: ints = @{name}" for name in POOL_ATTRIBUTES)
        return parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{op} <{', '.join(POOL_ATTRIBUTES)}> (x) => (y) {{ y = MaxPool <{window}> (x) }}"
        )
    conv, leaky, residual, float_output = op == QCONV, "leakyrelu" in parts, "residual" in parts, "float" in parts
    body = _START + (_CONV if conv else _GEMM).format(weight=_WEIGHT) + _SCALED
    body += _RESIDUAL if residual else "    added = Identity (scaled)\n"
    body += "    real = LeakyRelu <alpha: float = @slope> (added)\n" if leaky else "    real = Identity (added)\n"
    body += "    y = Identity (real)\n" if float_output else _QUANTIZED
    attributes = [
        *_ATTRIBUTES,
        *([] if float_output else ["y_zero_point"]),
        *(["slope"] if leaky else []),
        *(["residual_scale", "residual_zero_point"] if residual else []),
        *(["strides", "pads", "dilations", "group"] if conv else []),
    ]
    inputs = ["x", "values", "columns", "row_pointers", "bias", "scale", *(["residual"] if residual else [])]
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{op_type} <{', '.join(attributes)}> ({', '.join(inputs)}) => (y)\n{{{body}}}"
    )
