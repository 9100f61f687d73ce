"""What stands around a layer in the graph: what takes on its mean, what scales its outputs, what is added to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from slrc.ir.nodes import argument, op_name
from slrc.passes.structure.fold_batch_norm import BATCH_NORMS
from slrc.reconstruction.side_by_side import SideBySide

LEAST_SCALE = 0.1
"""Of a batch norm beside the mean square of its scales: below it, little of a residual is asked of an output."""


@dataclass(frozen=True)
class Surroundings:
    """Of one layer.

    `bias` is the layer's own, if nothing else reads it; `mean` the running mean of a batch norm that alone reads the
    layer's result, `scale` and `shift` `(out,)` by what that norm multiplies and what it adds; `added` what is added to
    the result after that, and `clip` between what an activation then clips it.
    """

    bias: Node | None
    mean: Node | None
    scale: Tensor | None
    shift: Tensor | None
    added: Node | None
    clip: tuple[float, float] | None

    @property
    def takes_means(self) -> bool:
        """Whether the output's mean can be set."""
        return self.bias is not None or self.mean is not None

    def residual(self, both: SideBySide, batch: int) -> Tensor | None:
        """Return by how much the layer's output has to differ from the dense one's to make up for what is added.

        That is (dense − pruned) of what is added, over the scale; `None` where they are equal, or not known yet.
        """
        if self.added is None or not both.knows(self.added) or not both.differs(self.added):
            return None
        off = both.dense(batch, self.added) - both.pruned(batch, self.added)
        if self.scale is None:
            return off
        least = (LEAST_SCALE * self.scale.square().mean().sqrt()).square()
        return off * (self.scale / (self.scale.square() + least)).reshape(-1, *[1] * (off.dim() - 2))


def surroundings(layer: Node, both: SideBySide) -> Surroundings:
    """Return what stands around a layer."""
    bias = argument(layer, 2, "bias")
    own_bias = bias if isinstance(bias, Node) and _is_its_own(bias, both) else None
    norm = _only_reader(layer)
    mean = scale = shift = None
    result = layer
    if norm is not None and _normalizes_rows(norm, layer, both):
        norm_mean, variance = norm.args[3], norm.args[4]
        assert isinstance(norm_mean, Node)
        assert isinstance(variance, Node)
        mean = norm_mean if bias is None and _is_its_own(norm_mean, both) else None
        eps = norm.args[-1] if op_name(norm) != "batch_norm" else norm.args[7]
        scale = torch.rsqrt(both.constant(variance).double() + float(eps))  # type: ignore[arg-type]
        if isinstance(norm.args[1], Node):
            scale = scale * both.constant(norm.args[1]).double()
        shift = -both.constant(norm_mean).double() * scale
        if isinstance(norm.args[2], Node):
            shift = shift + both.constant(norm.args[2]).double()
        result = norm if op_name(norm) == "batch_norm" else _only_reader(norm) or norm
    added = _added(result)
    return Surroundings(own_bias, mean, scale, shift, added, _clip(result if added is None else _only_reader(result)))


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_its_own(node: Node, both: SideBySide) -> bool:
    """Whether a tensor of the model's state is read by one operator alone, under any name."""
    return both.is_stored(node) and both.reads(node) == 1


def _normalizes_rows(norm: Node, layer: Node, both: SideBySide) -> bool:
    """Whether a node is a batch norm with fixed statistics whose channels are the layer's outputs."""
    if op_name(norm) not in BATCH_NORMS or norm.args[0] is not layer:
        return False
    weight = layer.args[1]
    assert isinstance(weight, Node)
    aligned = layer.meta["val"].dim() == both.constant(weight).dim()  # features of tokens are last, channels second
    constants = all(isinstance(a, Node) and a.op == "get_attr" for a in norm.args[3:5])
    parameters = all(a is None or (isinstance(a, Node) and a.op == "get_attr") for a in norm.args[1:3])
    return aligned and constants and parameters and not (op_name(norm) == "batch_norm" and norm.args[5])


def _added(result: Node) -> Node | None:
    """Return what is added to a value that nothing else reads, if it is of the same shape."""
    add = _only_reader(result)
    if add is None or op_name(add) not in ("add", "add_") or argument(add, 2, "alpha", 1) != 1:
        return None
    other = [a for a in add.args[:2] if a is not result]
    if len(other) != 1 or not isinstance(other[0], Node):
        return None
    value, beside = (n.meta.get("val") for n in (result, other[0]))
    same = isinstance(value, Tensor) and isinstance(beside, Tensor) and value.shape == beside.shape
    return other[0] if same else None


def _clip(result: Node | None) -> tuple[float, float] | None:
    """Return between what an activation that alone reads a value clips it."""
    activation = None if result is None else _only_reader(result)
    if activation is None or activation.args[0] is not result:
        return None
    name = op_name(activation)
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else math.inf
    low, high = argument(activation, 1, "min_val", -1), argument(activation, 2, "max_val", 1)
    if name in ("clamp", "clip"):
        low, high = argument(activation, 1, "min"), argument(activation, 2, "max")
    elif name == "clamp_min":
        low, high = argument(activation, 1, "min"), None
    elif name != "hardtanh":
        return None
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
