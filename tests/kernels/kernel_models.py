"""ONNX models of one or more block-sparse nodes, and of their dense twins."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from kernel_layers import Layer
from onnx import TensorProto, helper, numpy_helper


def layer_parts(layer: Layer, name: str = "") -> tuple[Any, list[Any], list[Any], Any]:
    """Return the node, its graph inputs, its initializers and its graph output; every name begins with `name`."""
    tensors = dict(layer.packed)
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    inputs = {"x": layer.x} | ({} if layer.residual is None else {"residual": layer.residual})
    order = ["x", "values", "columns", "row_pointers", "bias", "residual"]
    names = [name + n if n in tensors or n in inputs else "" for n in order]
    while not names[-1]:
        names.pop()
    attributes: dict[str, Any] = {
        "block": layer.block,
        "weight_shape": layer.weight.shape,
        "activation": layer.activation,
        "slope": layer.slope,
    }
    if layer.weight.ndim == 4:
        attributes |= {
            "strides": layer.strides,
            "pads": layer.pads,
            "dilations": layer.dilations,
            "group": layer.groups,
        }
    op = "BlockSparseConv" if layer.weight.ndim == 4 else "BlockSparseGemm"
    node = helper.make_node(op, names, [name + "y"], domain="ai.slrc", **attributes)
    values = [helper.make_tensor_value_info(name + n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()]
    initializers = [numpy_helper.from_array(a, name + n) for n, a in tensors.items()]
    return node, values, initializers, helper.make_tensor_value_info(name + "y", TensorProto.FLOAT, None)


def mlp_parts(up: Layer, down: Layer, name: str = "") -> tuple[Any, list[Any], list[Any], Any]:
    """Return the same of one node for two matrices; both have a bias, and `down.x` is what `up` computes."""
    first, inputs, tensors, _ = layer_parts(up, name)
    second, down_inputs, down_tensors, y = layer_parts(down, name + "down_")
    renamed = {name + "down_residual": name + "residual"}
    for value in down_inputs[1:]:
        value.name = renamed[value.name]
    names = [*first.input, *(renamed.get(n, n) for n in second.input[1:])]
    attributes = {a.name: helper.get_attribute_value(a) for a in first.attribute}
    own = {a.name: helper.get_attribute_value(a) for a in second.attribute}
    attributes |= {"down_block": own["block"], "down_weight_shape": own["weight_shape"]}
    node = helper.make_node("BlockSparseMlp", names, [y.name], domain="ai.slrc", **attributes)
    return node, [*inputs, *down_inputs[1:]], [*tensors, *down_tensors], y


def make_model(parts: list[tuple[Any, list[Any], list[Any], Any]]) -> onnx.ModelProto:
    """Return a model of independent nodes."""
    nodes, inputs, initializers, outputs = zip(*parts, strict=True)
    graph = helper.make_graph(nodes, "layers", [*chain(*inputs)], outputs, [*chain(*initializers)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.slrc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def planes_session(op_type: str, library: Path, threads: int = 1, **attributes: int) -> ort.InferenceSession:
    """Load a model of one node without a weight from `x` to `y`, of any sizes."""
    node = helper.make_node(op_type, ["x"], ["y"], domain="ai.slrc", **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    return session(make_model([(node, [x], [], y)]), library, threads)


def exact_options(threads: int = 1) -> ort.SessionOptions:
    """Return options of a session whose integer sums are exact: without VNNI, usual ones overflow in 16 bits."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def session(model: onnx.ModelProto, library: Path, threads: int = 1) -> ort.InferenceSession:
    """Load a model with the kernels."""
    options = exact_options(threads)
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed(layer: Layer, name: str = "") -> dict[str, np.ndarray]:
    """Return a layer's run-time inputs."""
    return {name + "x": layer.x} | ({} if layer.residual is None else {name + "residual": layer.residual})


def set_attributes(node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """Give a node other attributes; it loses those that are `None`."""
    kept = [a for a in node.attribute if a.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(n, value) for n, value in attributes.items() if value is not None)
