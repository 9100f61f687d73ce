"""Checks of operands that kernels of ATen do not make themselves.

Some kernels read as many values as one operand says from another, and past its end if that is smaller: layers never
call them so, but a stored program may. Tracing does not see it either, where the smaller operand could be broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slrc.ir.nodes import argument, op_name


def misfit(module: GraphModule) -> str:
    """Return the first operator whose operands do not fit together, and what it needs; empty if all do."""
    for node in module.graph.nodes:
        fits, need = _CHECKS.get(op_name(node), (None, ""))
        if fits is not None and not fits(node):
            return f"`{node.name}`: {op_name(node)} needs {need}"
    return ""


def _batch_norm_fits(node: Node) -> bool:
    channels = _shape(node.args[0])[1]
    return all(_same(_shape(x), [channels]) for x in node.args[1:5] if isinstance(x, Node))


def _weight_norm_fits(node: Node) -> bool:
    direction, magnitude = _shape(node.args[0]), _shape(node.args[1])
    dim = argument(node, 2, "dim", 0)
    is_whole = dim == -1  # the norm of all weights, which is broadcast
    return is_whole or _same(magnitude, [size if d == dim else 1 for d, size in enumerate(direction)])


def _lstm_fits(node: Node) -> bool:
    x, states, weights, has_biases, layers, _, _, is_bidirectional, batch_first = node.args
    (hidden, cell), sizes = map(_shape, states), _shape(x)  # type: ignore[arg-type]
    width, directions = hidden[-1], 2 if is_bidirectional else 1
    if not statically_known_true(width == cell[-1]):
        return True  # with projections: made of linear layers, which check their operands
    batch = sizes[0 if batch_first else 1]
    expected: list[list[Any]] = []
    for layer in range(layers):  # type: ignore[arg-type]
        inputs = sizes[-1] if layer == 0 else width * directions
        one = [[4 * width, inputs], [4 * width, width], *([[4 * width]] * 2 if has_biases else [])]
        expected += one * directions
    state = [layers * directions, batch, width]  # type: ignore[operator]
    found = [_shape(weight) for weight in weights]  # type: ignore[union-attr]
    fits = len(found) == len(expected) and all(_same(a, b) for a, b in zip(found, expected, strict=True))
    return fits and _same(hidden, state) and _same(cell, state)


def _attention_fits(node: Node) -> bool:
    return _same(_shape(node.args[1])[-2:-1], _shape(node.args[2])[-2:-1])


def _grid_sampler_fits(node: Node) -> bool:
    return node.args[2] in (0, 1, 2) and node.args[3] in (0, 1, 2)


def _shape(x: Any) -> list[Any]:
    value = x.meta.get("val") if isinstance(x, Node) else None
    return list(value.shape) if isinstance(value, Tensor) else []


def _same(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other, strict=True))


_PER_CHANNEL = (_batch_norm_fits, "weights and statistics with a value for each channel")
_MAGNITUDE = (_weight_norm_fits, "a magnitude for each slice of the direction")
_MODES = (_grid_sampler_fits, "modes of interpolation and padding from 0 to 2")
_CHECKS: Mapping[str, tuple[Callable[[Node], bool], str]] = {
    "_native_batch_norm_legit": _PER_CHANNEL,
    "_native_batch_norm_legit_no_training": _PER_CHANNEL,
    "_weight_norm": _MAGNITUDE,
    "_weight_norm_interface": _MAGNITUDE,
    "lstm": (_lstm_fits, "states and weights of the sizes that its input and its width say"),
    "scaled_dot_product_attention": (_attention_fits, "as many keys as values"),
    "grid_sampler": _MODES,
    "grid_sampler_3d": _MODES,
}
