"""Which layers of a program can run in integers under a scheme, and which values are rounded for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slrc.forms.activations import activation_of
from slrc.forms.quantization import Scheme
from slrc.ir.nodes import CONVOLUTIONS, argument, is_transposed, layer_weight, op_name
from slrc.passes.graph_edits import layer_bias, only_user

SHARING = frozenset(
    [
        "max_pool2d",
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "index_select",
        "expand",
        "clone",
        "contiguous",
        "relu",
        "upsample_nearest2d",
        "constant_pad_nd",
        "pad",
        "getitem",
        "split",
        "split_with_sizes",
        "chunk",
    ]
)
"""Operators whose results are some of their input's numbers, or zero: they have its steps."""
POOLS = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "mean"})
ADDITIONS = frozenset({"add", "cat", "mul"})
CLIPPING = frozenset({"relu", "relu6"})


@dataclass(frozen=True)
class Place:
    """A value that is rounded: `like` names the value whose range it has, `readers` those that read it rounded.

    `readers` is `None` for a value that an integer operator computes: nobody has it otherwise.
    """

    value: str
    like: str
    readers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Places:
    """The nodes of layers that run in integers, and the values that are rounded, in order."""

    layers: tuple[str, ...]
    values: tuple[Place, ...]


def find_places(
    module: GraphModule,
    scheme: Scheme,
    skipped: Collection[str] = (),
    *,
    packed: Collection[str] = (),
    round_ends: bool = False,
) -> Places:
    """Return what is rounded in a graph with parameters as `get_attr` nodes.

    1. Convolutions and linear layers, whose weights and biases are parameters, are integer; those in `skipped`, by the
       name of their weight, are not.
    2. What they read is rounded; a pad with zeros before convolutions belongs to them.
    3. Everywhere: what convolutions return is rounded, behind a ReLU or ReLU6 that alone reads it. So is the sum,
       product, concatenation or mean of rounded values, and what linear layers return, where an integer operator reads
       it. Operators that move numbers share the range of what they move. A layer in `packed`, by the name of its
       weight, adds a rounded value itself, and has a LeakyReLU: that is rounded, what the layer alone returns is not.
       With `round_ends`, so are the graph's inputs and outputs, whoever reads them.
    4. Not everywhere: what is added to a layer's result is rounded, the result itself is not.
    """
    layers = [n for n in module.graph.nodes if is_quantizable(n) and layer_weight(n) not in skipped]
    ends = [n for n in _ends(module) if _is_float(n)] if round_ends else []
    adding = {n for n in layers if layer_weight(n) in packed}
    values = _Everywhere(layers, ends, adding).places(module) if scheme.everywhere else tuple(_read_by_layers(layers))
    return Places(tuple(n.name for n in layers), values)


def values_to_observe(module: GraphModule, scheme: Scheme, *, packed: Collection[str] = ()) -> set[str]:
    """Return the values that `find_places` may ask a range of, whichever layers stay in float.

    One layer alone in integers rounds what another would do for it, such as its own result beside an operand in float;
    all together round what joins them. What a packed layer returns may be rounded only between the two: where it could
    add an operand, which stays in float, and another layer reads that.
    """
    weights = quantizable_weights(module)
    choices: list[Collection[str]] = [(), *({w for w in weights if w != own} for own in weights)]
    places = (p for skipped in choices for p in find_places(module, scheme, skipped, packed=packed).values)
    own = {n.name for n in module.graph.nodes if is_quantizable(n) and layer_weight(n) in packed}
    return own | {name for p in places for name in (p.value, p.like)}


def quantizable_weights(module: GraphModule) -> list[str]:
    """Return the weights of layers that have an integer form, each once."""
    found = [w for n in module.graph.nodes if is_quantizable(n) and (w := layer_weight(n))]
    return list(dict.fromkeys(found))


def is_quantizable(node: Node) -> bool:
    """Whether an operator is a convolution or linear layer that has an integer form."""
    if layer_weight(node) is None or not _is_float(node) or not isinstance(node.args[0], Node):
        return False
    if op_name(node) in CONVOLUTIONS:
        known = not is_transposed(node) and node.meta["val"].dim() == node.args[1].meta["val"].dim()  # type: ignore[union-attr]
    else:
        known = op_name(node) == "linear"
    bias = layer_bias(node)
    return known and (bias is None or bias.op == "get_attr")


def clipping_of(node: Node) -> str:
    """Return `relu` or `relu6` where an operator is one, which rounding from zero on does too; else an empty text."""
    found = activation_of(node)
    return found if found in CLIPPING else ""


def _is_leaky(node: Node) -> bool:
    return activation_of(node) == "leakyrelu"


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _is_zero_pad(node: Node) -> bool:
    if op_name(node) not in ("constant_pad_nd", "pad"):
        return False
    mode = argument(node, 2, "mode", "constant") if op_name(node) == "pad" else "constant"
    value = argument(node, 3 if op_name(node) == "pad" else 2, "value", 0)
    return mode == "constant" and (value is None or value == 0)


def _operands(node: Node) -> list[Node]:
    if op_name(node) == "cat":
        return [a for a in node.args[0] if isinstance(a, Node)]  # type: ignore[union-attr]
    return [a for a in node.args[:2] if isinstance(a, Node)]


def _is_join(node: Node) -> bool:
    name = op_name(node)
    if not _is_float(node):
        return False
    if name in POOLS:
        dims = argument(node, 1, "dim", None) if name == "mean" else None
        return name != "mean" or (isinstance(dims, (list, tuple)) and sorted(int(d) % 4 for d in dims) == [2, 3])
    two = len(node.args) >= 2 and all(isinstance(a, Node) for a in node.args[:2])
    return name == "cat" or bool(name in ADDITIONS and two and node.kwargs.get("alpha", 1) == 1)


def _ends(module: GraphModule) -> list[Node]:
    return [*module.graph.find_nodes(op="placeholder"), *module.graph.output_node().all_input_nodes]


@dataclass
class _Everywhere:
    """`source` says of every rounded value whose range it has; `made` which operator computed it, in integers.

    `ends` are rounded for all that read them. `adding` are the packed layers, which add a value themselves, and `added`
    the additions that they do, with the value that comes of each.
    """

    layers: list[Node]
    ends: list[Node]
    adding: set[Node]
    source: dict[Node, Node] = field(default_factory=dict)
    made: dict[Node, Node] = field(default_factory=dict)
    added: dict[Node, Node] = field(default_factory=dict)

    def places(self, module: GraphModule) -> tuple[Place, ...]:
        self.source.update({n: n for n in self.ends if n.op == "placeholder"})
        for node in module.graph.nodes:
            if node in self.layers:
                self._mark_read(node)
                self._mark_made(node)
            elif node in self.source:
                continue
            elif _is_join(node) and all(a in self.source for a in _operands(node)):
                self._mark_made(node)
            elif self._shares(node):
                self.source[node] = self.source[node.args[0]]  # type: ignore[index]
                self.made[node] = node
        for node in self.ends:
            self.source.setdefault(node, node)
        readers: dict[Node, list[str]] = {node: [] for node in self.ends}
        readers.update(self._readers(module))
        for_all = {*self.made, *self.ends}
        return tuple(
            Place(value.name, self.source[value].name, None if value in for_all else tuple(readers[value]))
            for value in module.graph.nodes
            if value in readers and _is_float(value)
        )

    def _mark_read(self, layer: Node) -> None:
        value = layer.args[0]
        assert isinstance(value, Node)
        if self._is_inside(value):
            value = value.args[0]
            assert isinstance(value, Node)
        self.source.setdefault(value, value)

    def _mark_made(self, node: Node) -> None:
        addition = self._addition(node) if node in self.adding else None
        last = node if addition is None else addition
        follower = only_user(last)
        end = last
        if follower is not None and (clipping_of(follower) or (node in self.adding and _is_leaky(follower))):
            end = follower
        self.source[end], self.made[end] = end, node
        if addition is not None:
            self.added[addition] = end

    def _addition(self, layer: Node) -> Node | None:
        """Return the operator that adds a rounded value of the same shape to a layer's result, if it alone reads it."""
        follower = only_user(layer)
        if follower is None or op_name(follower) != "add" or not _is_join(follower) or follower in self.source:
            return None
        others = [a for a in _operands(follower) if a is not layer]
        alike = len(others) == 1 and others[0] in self.source and _shape(others[0]) == _shape(layer)
        return follower if alike else None

    def _is_inside(self, node: Node) -> bool:
        """Whether a node is a pad that is part of the convolutions behind it."""
        readers = [n for n in node.users if n in self.layers and op_name(n) in CONVOLUTIONS]
        return _is_zero_pad(node) and len(readers) == len(node.users)

    def _shares(self, node: Node) -> bool:
        name = op_name(node)
        if name not in SHARING or not node.args or not isinstance(node.args[0], Node):
            return False
        if name in ("constant_pad_nd", "pad") and (not _is_zero_pad(node) or self._is_inside(node)):
            return False
        return node.args[0] in self.source and (_is_float(node) or name in ("split", "split_with_sizes", "chunk"))

    def _readers(self, module: GraphModule) -> dict[Node, list[str]]:
        """Return which operators read a value in integers, of all that are read so, or that a convolution returns."""
        found: dict[Node, list[str]] = {}
        ends = {maker: end for end, maker in self.made.items()} | self.added
        for value in reversed(list(module.graph.nodes)):
            if value not in self.source:
                continue
            maker = self.made.get(value)
            returned = maker in self.layers and maker is not None and op_name(maker) in CONVOLUTIONS
            readers = [
                user.name
                for user in value.users
                if (user in self.layers and user.args[0] is value) or self._is_inside(user) or ends.get(user) in found
            ]
            if returned or readers:
                found[value] = readers
        return found


def _read_by_layers(layers: list[Node]) -> Iterator[Place]:
    """Yield what layers read, and what is added to their results; an addition is fused with the last of two layers."""
    readers: dict[Node, list[str]] = {}
    for layer in layers:
        value = layer.args[0]
        assert isinstance(value, Node)
        readers.setdefault(value, []).append(layer.name)
    fused: set[Node] = set()
    for layer in reversed(layers):
        follower = only_user(layer)
        if follower is None or op_name(follower) != "add" or not _is_join(follower) or follower in fused:
            continue
        fused.add(follower)
        others = [a for a in _operands(follower) if a is not layer]
        if len(others) == 1 and others[0].op != "get_attr":
            readers.setdefault(others[0], []).append(follower.name)
    return (Place(value.name, value.name, tuple(names)) for value, names in readers.items())
