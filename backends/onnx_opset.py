"""Writing an ONNX model for a parser of fewer operators: functions inlined, layer norm in parts, an older opset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slrc.errors import BackendError

if TYPE_CHECKING:
    import onnx

LAST_WITH_AXES_ATTRIBUTES = 17
REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
"""The operators whose axes became an input with opset 18; `ReduceSum` had that before."""
NEW_IN_18: dict[str, dict[str, Any]] = {
    "Split": {"num_outputs": None},
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
}
"""Attributes that opset 17 does not have, and the value with which they say nothing; `None` for any."""
NOT_IN_17 = (b"min", b"max")
"""What operators that scatter do not do to values that meet: the checker does not look."""


def rewrite_opset(
    path: Path,
    opset: int,
    *,
    inline: bool = False,
    split_layer_norm: bool = False,
    batches: Mapping[str, int] | None = None,
) -> None:
    """Rewrite the ONNX model at `path` in place for a parser that takes less.

    1. With `inline`, the model's functions are inlined.
    2. With `split_layer_norm`, a LayerNormalization becomes means, products and a root, in float32.
    3. With `opset` 17 and a model of opset 18, reductions have their axes as an attribute again.
    4. With `batches`, by the names of inputs, their first dimension is that, where it may be any.
    5. The file's IR version is the oldest that has the opset.

    Raises:
        BackendError: an operator has no form in that opset; the message names it.
    """
    import onnx
    from onnx.inliner import inline_local_functions

    model = onnx.load(path, load_external_data=False)
    if inline and model.functions:
        model = inline_local_functions(model)
    if split_layer_norm:
        _replace(model.graph, "LayerNormalization", _parts_of_layer_norm)
    own = next(o for o in model.opset_import if o.domain == "")
    if opset == LAST_WITH_AXES_ATTRIBUTES < own.version:
        for node in model.graph.node:
            if any(a.name == "reduction" and a.s in NOT_IN_17 for a in node.attribute):
                raise _no_form(path, opset, f"`{node.name}` ({node.op_type}) takes the least or the largest")
        _to_17(model.graph)
        own.version = opset
    if batches is not None:
        _fix_batches(model.graph, batches)
    imported = [o for o in model.opset_import if o.domain in ("", "ai.onnx")]
    model.ir_version = max(onnx.helper.find_min_ir_version_for(imported), 8 if model.functions else 0)
    onnx.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _no_form(path, opset, str(error).strip().splitlines()[0]) from error


def _no_form(path: Path, opset: int, reason: str) -> BackendError:
    return BackendError(
        f"`{path}` cannot be written in opset {opset}: {reason}",
        hint="name a newer version of TensorRT in the target, such as `tensorrt:10.3`, or rewrite the operator",
    )


def _fix_batches(graph: onnx.GraphProto, batches: Mapping[str, int]) -> None:
    """Give the dimensions that inputs leave open a size; what follows from them is left to the reader to infer."""
    sizes = {
        dim.dim_param: batches[i.name] for i in graph.input for dim in i.type.tensor_type.shape.dim if dim.dim_param
    }
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
            elif dim.dim_param:
                dim.ClearField("dim_param")


def _to_17(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type in REDUCTIONS and len(node.input) > 1:
            _axes_to_attribute(graph, node)
        neutral = NEW_IN_18.get(node.op_type, {})
        for attribute in list(node.attribute):
            if attribute.name in neutral and neutral[attribute.name] in (None, attribute.s or attribute.i):
                node.attribute.remove(attribute)


def _axes_to_attribute(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Move a reduction's axes; one whose axes are computed stays as it is, for the checker to name."""
    from onnx import helper

    axes = _constant(graph, node.input[1])
    if axes is None:
        return
    del node.input[1:]
    kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if axes:
        node.attribute.append(helper.make_attribute("axes", axes))


def _constant(graph: onnx.GraphProto, name: str) -> list[int] | None:
    """Return the numbers of a constant; none where the input is left out; `None` where it is computed."""
    from onnx import numpy_helper

    if not name:
        return []
    tensors = [i for i in graph.initializer if i.name == name]
    tensors += [a.t for n in graph.node if n.op_type == "Constant" and name in n.output for a in n.attribute]
    return [int(x) for x in numpy_helper.to_array(tensors[0]).reshape(-1)] if tensors else None


def _replace(
    graph: onnx.GraphProto, op_type: str, make: Callable[[onnx.GraphProto, onnx.NodeProto], Iterator[onnx.NodeProto]]
) -> None:
    nodes = [part for node in graph.node for part in (make(graph, node) if node.op_type == op_type else [node])]
    del graph.node[:]
    graph.node.extend(nodes)


def _parts_of_layer_norm(graph: onnx.GraphProto, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield `y = (x - mean) / sqrt(mean((x - mean)²) + ε) · scale + bias`, in float32, in operators of opset 17.

    The square of what float16 holds may be more than it holds.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, scale, bias = (*node.input, "")[:3]
    names = iter(f"{node.output[0]}.norm_{i}" for i in range(100))
    axis = values.get("axis", -1)
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis, _rank(graph, x)))
    dtype = _element_type(graph, scale)
    epsilon = numpy_helper.from_array(np.array(values.get("epsilon", 1e-5), dtype=np.float32), next(names))
    graph.initializer.append(epsilon)
    parts: list[onnx.NodeProto] = []

    def op(op_type: str, *inputs: str, **attributes: Any) -> str:
        out = next(names)
        parts.append(helper.make_node(op_type, inputs, [out], name=out, **attributes))
        return out

    def mean(name: str) -> str:
        # With its axes as an input, as opset 18 has them: `_to_17` makes the attribute of them.
        where = numpy_helper.from_array(np.array(axes, dtype=np.int64), next(names))
        graph.initializer.append(where)
        return op("ReduceMean", name, where.name, keepdims=1)

    wide = [
        op("Cast", name, to=TensorProto.FLOAT) if name and dtype != TensorProto.FLOAT else name
        for name in (x, scale, bias)
    ]
    centred = op("Sub", wide[0], mean(wide[0]))
    deviation = op("Sqrt", op("Add", mean(op("Mul", centred, centred)), epsilon.name))
    scaled = op("Mul", op("Div", centred, deviation), wide[1])
    shifted = op("Add", scaled, wide[2]) if bias else scaled
    op("Cast", shifted, to=dtype) if dtype != TensorProto.FLOAT else op("Identity", shifted)
    parts[-1].output[0] = node.output[0]
    yield from parts


def _rank(graph: onnx.GraphProto, name: str) -> int:
    for value in (*graph.value_info, *graph.input):
        if value.name == name:
            return len(value.type.tensor_type.shape.dim)
    raise BackendError(
        f"a LayerNormalization of `{name}` cannot be written in parts: its number of dimensions is unknown"
    )


def _element_type(graph: onnx.GraphProto, name: str) -> int:
    """Return the type of a weight: that of what it scales too."""
    for tensor in graph.initializer:
        if tensor.name == name:
            return tensor.data_type
    for value in (*graph.value_info, *graph.input):
        if value.name == name:
            return value.type.tensor_type.elem_type
    return 1
