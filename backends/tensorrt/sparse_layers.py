"""Which layers of an ONNX model have 2:4 weights, and what keeps TensorRT from running them sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

FEW_CHANNELS, FEW_DLA_CHANNELS = 256, 65
"""Sparse tactics rarely win with fewer channels in or out, and a DLA has none."""
MOST_NAMES = 3
PASSED = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose")
"""What a constant weight may go through on its way to a layer and stay one."""


class SparseLayer(NamedTuple):
    """A layer of which two of each four weights along the input channels are zero."""

    name: str
    inputs: int
    outputs: int
    quantised: bool


def sparse_layers(path: Path) -> list[SparseLayer]:
    """Return the layers of an ONNX model that have 2:4 weights; a weight that is computed has none."""
    import onnx

    model = onnx.load(path)
    return list(_find(model.graph))


def warnings_of(layers: Sequence[SparseLayer], precision: str, *, dla: bool = False) -> list[str]:
    """Return what keeps these layers from being run sparse, as sentences for the report."""
    if not layers:
        return []
    found = []
    if precision == "float32":
        found.append(
            f"{_listed(layers)} 2:4 weights in float32, which TensorRT likely runs dense, since TF32 is off: "
            "add `fp16` to the target"
        )
    few = FEW_DLA_CHANNELS if dla else FEW_CHANNELS
    if narrow := [x for x in layers if min(x.inputs, x.outputs) < few]:
        found.append(
            f"{_listed(narrow)} 2:4 weights and fewer than {few} channels in or out, "
            "where TensorRT rarely gains by them"
        )
    if quantised := [x for x in layers if x.quantised]:
        found.append(
            f"{_listed(quantised)} 2:4 weights behind QuantizeLinear and DequantizeLinear, "
            "which can hide them from TensorRT"
        )
    return found


def _listed(layers: Sequence[SparseLayer]) -> str:
    names = ", ".join(x.name for x in layers[:MOST_NAMES])
    if len(layers) > MOST_NAMES:
        return f"{names} and {len(layers) - MOST_NAMES} more have"
    return f"{names} {'has' if len(layers) == 1 else 'have'}"


def _find(graph: onnx.GraphProto) -> Iterator[SparseLayer]:
    from onnx import helper, numpy_helper

    weights = {i.name: i for i in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        tensor, behind = node.input[1], made.get(node.input[1])
        passed: list[str] = []
        while behind is not None and behind.op_type in PASSED:
            passed.append(behind.op_type)
            tensor, behind = behind.input[0], made.get(behind.input[0])
        if tensor not in weights:
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        matrix = _out_by_in(node.op_type, numpy_helper.to_array(weights[tensor]), attributes)
        if matrix is not None and passed.count("Transpose") % 2:
            matrix = matrix.swapaxes(0, 1)
        if matrix is not None and is_two_of_four(matrix):
            quantised = "DequantizeLinear" in passed
            yield SparseLayer(node.name or tensor, matrix.shape[1], matrix.shape[0], quantised)


def _out_by_in(op_type: str, weight: NDArray[Any], attributes: dict[str, Any]) -> NDArray[Any] | None:
    """Return a layer's weight as `(out, in, places of the kernel)`; `None` for one that is no matrix, or grouped."""
    if op_type == "Conv":
        return weight.reshape(*weight.shape[:2], -1) if attributes.get("group", 1) == 1 else None
    if weight.ndim != 2:
        return None
    return (weight if op_type == "Gemm" and attributes.get("transB", 0) else weight.T)[..., None]


def is_two_of_four(weight: NDArray[Any]) -> bool:
    """Return whether of each four weights along the inputs of `(out, in, places)` two or more are zero."""
    if not weight.any() or weight.shape[1] % 4:
        return False
    zeros = (weight == 0).reshape(weight.shape[0], -1, 4, weight.shape[2]).sum(axis=2)
    return bool((zeros >= 2).all())
