"""Convolutions: input channels join the weight's inputs; the output takes the weight's output labels."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from slrc.ir.nodes import conv_groups, is_transposed
from slrc.passes.analysis.index_rules.table import Dims, LabelTable, Rule, Value, shape_of


def convolution(node: Node, table: LabelTable) -> Value:
    """`conv(x (n, c, …), w (o, c/g, …), b (o))`, ungrouped, grouped or depthwise."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if is_transposed(node):
        return transposed_convolution(node, table)
    x_dims, w_dims, groups = table.dims(x), table.dims(weight), conv_groups(node)
    if len(x_dims) != len(w_dims):
        raise NotImplementedError  # an input without a batch
    for kernel in w_dims[2:]:
        table.pin(kernel, "kernel position", node)
    if groups == 1:
        inner = table.join(x_dims[1], w_dims[1], node)
        table.contract(inner, [table.value(x), table.value(weight)], node)
        table.consume(weight, 1)
    elif shape_of(weight)[1] == 1:
        _depthwise(node, table, x_dims, w_dims, groups)
    else:
        _grouped(node, table, x_dims, w_dims, groups)
        table.contract(w_dims[1], [table.value(x), table.value(weight)], node)
        table.consume(weight, 1)
    return _result(node, table, table.value(x), table.value(weight), w_dims[0])


def transposed_convolution(node: Node, table: LabelTable) -> Value:
    """`conv_transpose(x (n, c, …), w (c, o/g, …), b (o))`, ungrouped, grouped or depthwise."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    x_dims, w_dims, groups = table.dims(x), table.dims(weight), conv_groups(node)
    if len(x_dims) != len(w_dims):
        raise NotImplementedError  # an input without a batch
    for kernel in w_dims[2:]:
        table.pin(kernel, "kernel position", node)
    inner = table.join(x_dims[1], w_dims[0], node)
    out = w_dims[1]
    if 1 < groups == shape_of(weight)[0]:
        table.pin(out, "an output of every input channel", node)
        multiple = shape_of(weight)[1]
        return _result(
            node, table, table.value(x), table.value(weight), np.repeat(inner, multiple) if inner is not None else None
        )
    if groups > 1:
        if inner is not None:
            table.join_rows(inner.reshape(groups, -1).T)
        # One output in each group would have no label: it stays.
        out = np.tile(out, groups) if out is not None else None
    table.contract(inner, [table.value(x), table.value(weight)], node)
    table.consume(weight, 0)
    return _result(node, table, table.value(x), table.value(weight), out)


def _result(node: Node, table: LabelTable, x: Value, weight: Value, out: np.ndarray | None) -> Value:
    bias = node.args[2] if len(node.args) > 2 else None
    vanishes = weight.vanishes
    if isinstance(bias, Node):
        table.join(out, table.dims(bias)[0], node)
        vanishes = vanishes and table.value(bias).vanishes
    for spatial in x.dims[2:]:
        table.pin(spatial, "spatial position", node)
    # A bias is added at removed places of the first dimension too.
    vanishes = vanishes and (x.dims[0] is None or (x.vanishes and bias is None))
    return Value([x.dims[0], out, *[None] * (len(x.dims) - 2)], vanishes)


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
