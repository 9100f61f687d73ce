"""Turn layers with zero blocks into packed ones, for the block-sparse kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slrc.forms import packed_ops  # noqa: F401, registers the operators
from slrc.forms.activations import activation_of
from slrc.forms.form import FormKind, Forms
from slrc.forms.packed_weight import PackedWeight
from slrc.ir.nodes import argument, conv_groups, conv_window, layer_weight, node_shape, op_name, pair
from slrc.ir.program import Program
from slrc.kernels.limits import why_not, why_not_int8
from slrc.passes.base import PassResult, Transform
from slrc.passes.forms.concatenations import cut_concatenation, parts_of
from slrc.passes.forms.projections import cut_projections
from slrc.passes.forms.unroll_transposed import axes_of, interleave, is_unrolled, unroll_weight, why_not_unrolled
from slrc.passes.graph_edits import call_before, get_tensor, insert_tensor, layer_bias, only_user, sibling


@dataclass(frozen=True)
class PackBlocks(Transform):
    """Replace each layer whose form is `packed:M` by one operator with packed blocks of M outputs × 1 column.

    1. `conv2d(x, w, b)` becomes `slrc::block_sparse_conv(x, values, columns, row_pointers, b, …)`, `linear` becomes
       `slrc::block_sparse_gemm`: only blocks with a weight that is not zero are stored.
    2. An addition of a value of the same shape, and then ReLU, LeakyReLU, ReLU6, SiLU, GELU or HardSwish,
       if nothing else reads what comes before, go into the operator.
    3. A layer whose weight or bias is computed, whose padding is no number, or that the kernels do not take (see
       `why_not_packed`), is left alone.
    4. A packed `linear` of what another one alone computes becomes one operator with it, `slrc::block_sparse_mlp`,
       unless the first one adds a residual or the second one has an activation.
    5. Queries, keys and values that one `linear` computes become a packed `linear` each (see `cut_projections`).
    6. A 2×2 `max_pool2d` of what a packed convolution computes becomes `slrc::max_pool2x2`, in the same layout.
    7. Bilinear upsampling of it to twice the size becomes `slrc::upsample_bilinear2x`, likewise.
    8. `conv_transpose2d` becomes a packed convolution that computes the phases of its stride, and what puts their
       pixels between each other (see `unroll_transposed`): with a kernel as large as the stride, a 1×1 convolution and
       a pixel shuffle. An activation goes into the operator, an addition does not.
    9. `permute(0, 3, 1, 2)` that packed convolutions alone read becomes `slrc::channels_first`, and
       `permute(0, 2, 3, 1)` of what one computes `slrc::channels_last`.
    10. A packed `conv2d` of a `cat` that nothing else reads becomes one of each part (see `cut_concatenation`), where
       that copies less; each adds what the one before has computed.

        conv2d ─▶ add(·, shortcut) ─▶ relu          block_sparse_conv(…, residual=shortcut, activation="relu")
    """

    forms: Forms = field(default_factory=dict)
    name: ClassVar[str] = "pack-blocks"

    def __call__(self, program: Program) -> PassResult:
        """Return the program with its packed layers."""
        return PassResult(*program.rewrite(self._pack_all))

    def _pack_all(self, module: GraphModule) -> bool:
        layers = [
            node for node in module.graph.nodes if self._rows(node) and not why_not_packed(node, self._rows(node))
        ]
        for layer in layers:
            rows = self._rows(layer)
            for part in _cut(module, layer, rows):
                _pack(module, part, rows)
        module.graph.eliminate_dead_code()  # so that a layer's users are those that count
        for node in list(module.graph.nodes):
            if op_name(node) == "block_sparse_gemm" and _is_mlp(node.args[0], node):
                _join(node.args[0], node)
            if own := _own_of_planes(node):
                taken = call_before(node, own, node.args[0])
                taken.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(taken)
        return bool(layers)

    def _rows(self, node: Node) -> int:
        form = self.forms.get(layer_weight(node) or "")
        return form.size if form is not None and form.kind is FormKind.PACKED else 0


def _cut(module: GraphModule, layer: Node, rows: int) -> list[Node]:
    """Return the layers that are to be packed in the place of one."""
    parts = parts_of(layer)
    outputs, _, *kernel = node_shape(layer.args[1])  # type: ignore[arg-type]
    if not parts or any(why_not([outputs, node_shape(p)[1], *kernel], rows, **_window_of(layer)) for p in parts):
        return cut_projections(module, layer, rows)
    last, residual = _sum(layer)
    return cut_concatenation(module, layer, parts, last, residual)


def why_not_packed(layer: Node, rows: int) -> str:
    """Return why a layer cannot be packed in blocks of `rows` outputs, or `""` if it can."""
    bias = layer_bias(layer)
    if bias is not None and bias.op != "get_attr":
        return "its bias is computed"
    x, weight = layer.args[:2]
    shape = node_shape(weight)  # type: ignore[arg-type]
    if op_name(layer) == "linear":
        return why_not(shape, rows)
    sizes = node_shape(x)  # type: ignore[arg-type]
    if is_unrolled(layer):
        if reason := why_not_unrolled(layer, rows):
            return reason
        axes = axes_of(layer)
        phases = axes[0].stride * axes[1].stride
        unrolled = [phases * shape[1], shape[0], *(axis.taps for axis in axes)]
        return why_not(unrolled, rows, pads=[axis.pads for axis in axes], input_size=sizes[2:])
    return _why_no_window(layer) or why_not(shape, rows, **_window_of(layer))


def why_not_packed_int8(layer: Node, rows: int) -> str:
    """Return why a convolution or linear layer that runs in int8 cannot be packed so, or `""` if it can."""
    shape = node_shape(layer.args[1])  # type: ignore[arg-type]
    if op_name(layer) == "linear":
        return why_not_int8(shape, rows)
    if op_name(layer.args[0]) in ("constant_pad_nd", "pad"):  # type: ignore[arg-type]
        return "what it reads is padded by an operator of its own"
    return _why_no_window(layer) or why_not_int8(shape, rows, **_window_of(layer))


def _why_no_window(layer: Node) -> str:
    if op_name(layer) != "conv2d" or len(node_shape(layer.args[0])) != 4:  # type: ignore[arg-type]
        return "it is no convolution of a batch of images"
    padding = argument(layer, 4, "padding", 0)
    return f"its padding is `{padding}`" if isinstance(padding, str) else ""


def _window_of(layer: Node) -> dict[str, Any]:
    strides, pads, dilations = conv_window(layer)
    size = node_shape(layer.args[0])[2:]  # type: ignore[arg-type]
    return {
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
        "groups": conv_groups(layer),
        "input_size": size,
    }


def _own_of_planes(node: Node) -> Any:
    """Return the operator of slrc for what stands at a packed convolution's input or output, if there is one."""
    if op_name(node) == "permute" and _dims(node) == (0, 3, 1, 2) and node.users:
        is_read = all(op_name(user) == "block_sparse_conv" for user in node.users)
        return torch.ops.slrc.channels_first.default if is_read else None
    if not node.args or not isinstance(node.args[0], Node) or op_name(node.args[0]) != "block_sparse_conv":
        return None
    if op_name(node) == "permute" and _dims(node) == (0, 2, 3, 1):
        return torch.ops.slrc.channels_last.default
    if op_name(node) == "max_pool2d" and _is_plain_pool(node):
        return torch.ops.slrc.max_pool2x2.default
    if op_name(node) == "upsample_bilinear2d" and _is_doubling(node):
        return torch.ops.slrc.upsample_bilinear2x.default
    return None


def _dims(permute: Node) -> tuple[int, ...]:
    dims = list[int](permute.args[1])  # type: ignore[arg-type]
    return tuple(dim % len(dims) for dim in dims)


def _is_doubling(node: Node) -> bool:
    *_, height, width = node_shape(node.args[0])  # type: ignore[arg-type]
    scales = [y for x in node.args[3:] if x is not None for y in (x if isinstance(x, list | tuple) else [x])]
    is_double = node_shape(node)[2:] == [2 * height, 2 * width] and all(scale == 2 for scale in scales)
    return is_double and not argument(node, 2, "align_corners", False)


def _is_plain_pool(node: Node) -> bool:
    if argument(node, 5, "ceil_mode", False):
        return False
    kernel = argument(node, 1, "kernel_size", None)
    stride, padding = argument(node, 2, "stride", None) or kernel, argument(node, 3, "padding", 0)
    window = [pair(size) for size in (kernel, stride, padding, argument(node, 4, "dilation", 1))]
    return window == [[2, 2], [2, 2], [0, 0], [1, 1]]


def _pack(module: GraphModule, layer: Node, rows: int) -> None:
    name, bias = str(layer_weight(layer)), layer_bias(layer)
    weight, groups, axes = get_tensor(module, name), conv_groups(layer), []
    if is_unrolled(layer):
        axes = axes_of(layer)
        weight = unroll_weight(weight, axes)
        if bias is not None and (phases := axes[0].stride * axes[1].stride) > 1:
            spread = nn.Parameter(get_tensor(module, str(bias.target)).detach().repeat(phases), requires_grad=False)
            bias = insert_tensor(module, layer, sibling(name, "phases_bias"), spread)
    packed = PackedWeight.of(weight, rows, groups)
    last, residual, activation, slope = _tail(layer, takes_residual=not axes)
    tensors = [
        insert_tensor(module, layer, sibling(name, "values"), nn.Parameter(packed.values, requires_grad=False)),
        insert_tensor(module, layer, sibling(name, "columns"), packed.columns),
        insert_tensor(module, layer, sibling(name, "row_pointers"), packed.row_pointers),
    ]
    if bias is None:
        zeros = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
        bias = insert_tensor(module, layer, sibling(name, "no_bias"), zeros)  # another call may have one
    operands = (layer.args[0], *tensors, bias, residual, weight.shape[0])
    if op_name(layer) == "linear":
        node = call_before(last, torch.ops.slrc.block_sparse_gemm.default, *operands, activation, slope)
    else:
        window = [[1, 1], [axis.pads for axis in axes], [1, 1]] if axes else conv_window(layer)
        shape = list(weight.shape[2:])
        conv = torch.ops.slrc.block_sparse_conv.default
        node = call_before(last, conv, *operands, shape, *window, groups, activation, slope)
    if axes:
        node = interleave(last, node, axes)
    node.meta["val"] = last.meta["val"]  # a later layer may add it
    last.replace_all_uses_with(node)


def _is_mlp(up: object, down: Node) -> bool:
    """Tell whether nothing stands between two matrix multiplications but the first one's bias and activation."""
    if not isinstance(up, Node) or op_name(up) != "block_sparse_gemm" or only_user(up) is not down:
        return False
    return up.args[5] is None and str(down.args[7]) == "none" and down.args[5] is not up


def _join(up: Node, down: Node) -> None:
    x, *weight, _, hidden_channels, activation, slope = up.args
    _, *down_weight, residual, out_channels, _, _ = down.args
    operands = (x, *weight, *down_weight, residual, hidden_channels, out_channels, activation, slope)
    node = call_before(down, torch.ops.slrc.block_sparse_mlp.default, *operands)
    node.meta["val"] = down.meta["val"]
    down.replace_all_uses_with(node)


def _tail(layer: Node, *, takes_residual: bool) -> tuple[Node, Node | None, str, float]:
    """Return the last operator that goes with a layer, the residual that is added, the activation and its slope."""
    last, residual = _sum(layer) if takes_residual else (layer, None)
    follower = only_user(last)
    if follower is not None and (activation := activation_of(follower)):
        slope = float(argument(follower, 1, "negative_slope", 0.01)) if activation == "leakyrelu" else 0.0
        return follower, residual, activation, slope
    return last, residual, "none", 0.0


def _sum(layer: Node) -> tuple[Node, Node | None]:
    """Return the addition to a layer's result that goes with it, and what it adds; or the layer and nothing."""
    follower = only_user(layer)
    other = _residual(follower, layer) if follower is not None else None
    return (layer, None) if follower is None or other is None else (follower, other)


def _residual(node: Node, layer: Node) -> Node | None:
    """Return what an addition adds to a layer's result, if it has the same shape and type."""
    if op_name(node) != "add" or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    others = [a for a in node.args if a is not layer]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    mine, theirs = layer.meta["val"], others[0].meta.get("val")
    alike = isinstance(theirs, Tensor) and theirs.shape == mine.shape and theirs.dtype == mine.dtype
    return others[0] if alike else None
