"""The dense and the pruned network, run side by side on all calibration inputs, one stretch of operators at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from slrc.ir.program import Program
from slrc.reconstruction.calibration import Inputs


class Stretch(NamedTuple):
    """Operators that are run, and the layer after them."""

    nodes: list[Node]
    layer: Node


class SideBySide:
    """Values of both networks, as long as something reads them.

    Until a tensor that it depends on changes, a value is the same in both networks and is kept once. The layers are
    taken in the graph's order, and everything else as early as it can be: what is added to a layer's result is then
    there when the layer is refitted, wherever that comes from.

    Args:
        program: the dense network.
        batches: the inputs of its calls.
        layers: the operators to stop at, in the graph's order.
    """

    def __init__(self, program: Program, batches: Sequence[Inputs], layers: Sequence[Node]) -> None:
        self.module = program.graph_module
        self.own: dict[int, Tensor] = {}
        """The pruned network's tensors that differ from the dense one's, by the identity of those."""
        self.stretches = list(_stretches(self.module, set(layers)))
        self._tensors = {n.target: _attribute(self.module, str(n.target)) for n in _of(self.module, "get_attr")}
        self._last_read = _last_reads(self.module, self.stretches)
        inputs = [n for n in _of(self.module, "placeholder") if isinstance(n.meta.get("val"), Tensor)]
        self._num_samples = sum(len(batch[0]) if batch[0].dim() else 1 for batch in batches)
        self._stored = program.exported.state_dict.keys()
        self._dense: list[dict[Node, Any]] = [dict(zip(inputs, batch, strict=True)) for batch in batches]
        self._pruned: list[dict[Node, Any]] = [{} for _ in batches]

    @property
    def num_batches(self) -> int:
        """How many calls are run."""
        return len(self._dense)

    @property
    def num_samples(self) -> int:
        """How many samples these calls hold."""
        return self._num_samples

    def constant(self, node: Node) -> Any:
        """Return the dense network's parameter, buffer or submodule that a node reads."""
        return self._tensors[node.target]

    def current(self, node: Node) -> Tensor:
        """Return the pruned network's parameter or buffer that a node reads."""
        tensor = self._tensors[node.target]
        return self.own.get(id(tensor), tensor)

    def is_stored(self, node: Node) -> bool:
        """Whether a node reads a parameter or buffer of the model's state, which can be given another value."""
        return node.op == "get_attr" and node.target in self._stored

    def reads(self, node: Node) -> int:
        """Return how many operators read the parameter or buffer that a node reads, under any of its names."""
        tensor = self._tensors[node.target]
        return sum(len(n.users) for n in _of(self.module, "get_attr") if self._tensors[n.target] is tensor)

    def replace(self, node: Node, value: Tensor) -> None:
        """Give the pruned network another value for the parameter or buffer that a node reads."""
        tensor = self._tensors[node.target]
        self.own[id(tensor)] = value.to(tensor.dtype)

    def dense(self, batch: int, node: Node) -> Any:
        """Return a value of the dense network."""
        return self.constant(node) if node.op == "get_attr" else self._dense[batch][node]

    def pruned(self, batch: int, node: Node) -> Any:
        """Return the same value of the pruned network."""
        if node.op == "get_attr":
            return self.current(node)
        own = self._pruned[batch]
        return own[node] if node in own else self._dense[batch][node]

    def knows(self, node: Node) -> bool:
        """Whether a value has been computed and is kept."""
        return node.op == "get_attr" or node in self._dense[0]

    def differs(self, node: Node) -> bool:
        """Whether a value of the pruned network is another than that of the dense one."""
        if node.op == "get_attr":
            return id(self._tensors[node.target]) in self.own
        return node in self._pruned[0]

    def run(self, stretch: int) -> Iterator[int]:
        """Run a stretch of operators and the dense network's layer after it, batch by batch; yield each batch's number.

        Before, the layer of the stretch before is run in the pruned network, with the weights it has by now.
        """
        for batch in range(len(self._dense)):
            with torch.no_grad():
                self._run_stretch(batch, stretch)
            yield batch

    def _run_stretch(self, batch: int, stretch: int) -> None:
        if stretch:
            before = self.stretches[stretch - 1].layer
            self._run_pruned(batch, before)
            self._forget(batch, before, (stretch, -1))
        nodes, layer = self.stretches[stretch]
        for place, node in enumerate(nodes):
            self._run_dense(batch, node)
            self._run_pruned(batch, node)
            self._forget(batch, node, (stretch, place))
        self._run_dense(batch, layer)

    def _run_dense(self, batch: int, node: Node) -> None:
        self._dense[batch][node] = _call(node, partial(self.dense, batch))

    def _run_pruned(self, batch: int, node: Node) -> None:
        if any(self._differs_in(batch, n) for n in node.all_input_nodes):
            self._pruned[batch][node] = _call(node, partial(self.pruned, batch))

    def _differs_in(self, batch: int, node: Node) -> bool:
        return self.differs(node) if node.op == "get_attr" else node in self._pruned[batch]

    def _forget(self, batch: int, node: Node, moment: tuple[int, int]) -> None:
        """Drop what a node was the last to read, and its own value if nothing reads it."""
        for read in (node, *node.all_input_nodes):
            if self._last_read.get(read, moment) <= moment:
                self._dense[batch].pop(read, None)
                self._pruned[batch].pop(read, None)


def _of(module: GraphModule, op: str) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == op]


def _attribute(module: GraphModule, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _call(node: Node, value: Callable[[Node], Any]) -> Any:
    assert callable(node.target)
    args, kwargs = map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)


def _stretches(module: GraphModule, layers: set[Node]) -> Iterator[Stretch]:
    done = {n for n in module.graph.nodes if n.op in ("placeholder", "get_attr")}
    left = [n for n in module.graph.nodes if n.op == "call_function"]
    while any(n in layers for n in left):
        ready, waiting = [], []
        for node in left:
            if node not in layers and all(n in done for n in node.all_input_nodes):
                ready.append(node)
                done.add(node)
            else:
                waiting.append(node)
        layer, *left = waiting  # the first one waits for nothing: it is a layer
        done.add(layer)
        yield Stretch(ready, layer)


def _last_reads(module: GraphModule, stretches: Sequence[Stretch]) -> dict[Node, tuple[int, int]]:
    """Return when each value is read last: the stretch and the place in it. A layer's pruned run is at place −1.

    What comes after the last layer is never run, but what it reads may be added to that layer's result.
    """
    last: dict[Node, tuple[int, int]] = {}
    for i, (nodes, layer) in enumerate(stretches):
        moments = [(node, (i, place)) for place, node in enumerate(nodes)] + [(layer, (i + 1, -1))]
        for node, moment in moments:
            last[node] = max(last.get(node, moment), moment)
            last.update(dict.fromkeys(node.all_input_nodes, moment))
    run = {n for nodes, layer in stretches for n in (*nodes, layer)}
    for node in _of(module, "call_function"):
        if node not in run:
            last.update(dict.fromkeys(node.all_input_nodes, (len(stretches) + 1, 0)))
    return last
