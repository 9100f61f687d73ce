"""Convolutions: input channels join the weight's inputs; the output takes the weight's output labels."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from slrc.passes.index_rules.table import Dims, LabelTable, Rule, Value, shape_of
from slrc.program import conv_groups, is_transposed


def convolution(node: Node, table: LabelTable) -> Value:
    """`conv(x (n, c, …), w (o, c/g, …), b (o))`, ungrouped, grouped or depthwise."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if is_transposed(node):
        return transposed_convolution(node, table)
    x_dims, w_dims, groups = table.dims(x), table.dims(weight), conv_groups(node)
    for kernel in w_dims[2:]:
        table.pin(kernel, "kernel position", node)
    if groups == 1:
        table.join(x_dims[1], w_dims[1], node)
        table.consume(weight, 1)
    elif shape_of(weight)[1] == 1:
        _depthwise(node, table, x_dims, w_dims, groups)
    else:
        _grouped(node, table, x_dims, w_dims, groups)
        table.consume(weight, 1)
    return _result(node, table, x_dims, w_dims[0])


def transposed_convolution(node: Node, table: LabelTable) -> Value:
    """`conv_transpose(x (n, c, …), w (c, o, …), b (o))`, ungrouped."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if conv_groups(node) != 1:
        raise NotImplementedError
    x_dims, w_dims = table.dims(x), table.dims(weight)
    for kernel in w_dims[2:]:
        table.pin(kernel, "kernel position", node)
    table.join(x_dims[1], w_dims[0], node)
    table.consume(weight, 0)
    return _result(node, table, x_dims, w_dims[1])


def _result(node: Node, table: LabelTable, x_dims: Dims, out: np.ndarray | None) -> Value:
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, Node):
        table.join(out, table.dims(bias)[0], node)
    for spatial in x_dims[2:]:
        table.pin(spatial, "spatial position", node)
    return Value([x_dims[0], out, *[None] * (len(x_dims) - 2)])


def _depthwise(node: Node, table: LabelTable, x_dims: Dims, w_dims: Dims, groups: int) -> None:
    """Every input channel goes with the outputs that it alone feeds."""
    x, out = x_dims[1], w_dims[0]
    if x is None or out is None:
        table.pin(out, "depthwise over a fixed number of channels", node)
        table.pin(x, "depthwise over a fixed number of channels", node)
        return
    for outputs in out.reshape(groups, -1).T:
        table.union.join(x, outputs)


def _grouped(node: Node, table: LabelTable, x_dims: Dims, w_dims: Dims, groups: int) -> None:
    """The same place of every group goes together, so that the number of groups stays."""
    x, out, inputs = x_dims[1], w_dims[0], w_dims[1]
    if out is not None:
        table.join_rows(out.reshape(groups, -1).T)
    if x is not None and inputs is not None:
        places = table.join_rows(x.reshape(groups, -1).T)
        table.union.join(places, inputs)
    else:
        table.pin(x, "grouped over a fixed number of channels", node)
        table.pin(inputs, "grouped over a fixed number of channels", node)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], transposed_convolution),
}
