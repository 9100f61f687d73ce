"""Cut a program into segments that can be timed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from slrc.ir.export_memory import listed_once
from slrc.ir.nodes import node_macs
from slrc.ir.program import Program
from slrc.ir.quiet import quiet_torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Segment:
    """A layer or matrix product with the operators that follow it, up to the next one.

    `anchor` is its name in the program it was cut from, `macs` its multiply-accumulates.
    """

    anchor: str
    macs: int
    module: GraphModule
    inputs: tuple[Tensor, ...]

    def program(self) -> Program:
        """Return the segment as a program of its own, with its shapes fixed."""
        with quiet_torch(), torch.no_grad(), listed_once():
            exported = torch.export.export(self.module, self.inputs)
        return Program(exported, self.inputs, self.anchor)


def anchors(program: Program) -> list[Node]:
    """Return the operators that multiply, in order: those that most of the time goes into."""
    return [node for node in program.nodes if node_macs(node) > 0]


def cut_segments(program: Program) -> list[Segment]:
    """Return one segment for each anchor, in order.

    An operator belongs to the last anchor that its value comes from; those before the first anchor belong to the
    first. What is computed from parameters alone is constant: every segment that uses it holds a copy.
    """
    starts = anchors(program)
    if not starts:
        return []
    values = _Recorder(program.graph_module)
    with torch.no_grad():
        values.run(*program.example_inputs)
    owner = _owners(program, starts)
    return [_segment(program, anchor, k, owner, values.recorded) for k, anchor in enumerate(starts)]


class _Recorder(Interpreter):
    """Runs the graph once and keeps every value."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.recorded: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.recorded[n] = super().run_node(n)
        return self.recorded[n]


def _owners(program: Program, starts: list[Node]) -> dict[Node, int]:
    """Return the segment of every operator that depends on an input."""
    index = {node: k for k, node in enumerate(starts)}
    owner: dict[Node, int] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            owner[node] = 0
        elif node.op == "call_function":
            sources = [owner[a] for a in node.all_input_nodes if a in owner]
            if node in index:
                owner[node] = index[node]
            elif sources:
                owner[node] = max(sources)
    return owner


def _segment(program: Program, anchor: Node, k: int, owner: Mapping[Node, int], values: Mapping[Node, Any]) -> Segment:
    builder = _Builder(program, owner, values, k)
    nodes = [n for n in program.nodes if owner.get(n) == k]
    for node in nodes:
        builder.copy(node)
    ends = [n for n in nodes if isinstance(values[n], Tensor) and any(owner.get(u) != k for u in n.users)]
    module = builder.finish(ends)
    return Segment(anchor.name, node_macs(anchor) // program.batch, module, tuple(builder.inputs))


class _Builder:
    """Copies operators into a graph of their own; tensors from elsewhere become inputs, sizes constants."""

    def __init__(self, program: Program, owner: Mapping[Node, int], values: Mapping[Node, Any], k: int) -> None:
        self.inputs: list[Tensor] = []
        self._program, self._owner, self._values, self._k = program, owner, values, k
        self._graph, self._root = Graph(), nn.Module()
        self._copies: dict[Node, Any] = {}
        self._places = list(self._sources())
        for source in self._places:
            self._copies[source] = self._graph.placeholder(f"x{len(self.inputs)}")
            self.inputs.append(values[source].detach().contiguous())

    def _sources(self) -> Iterator[Node]:
        """Yield the tensors that come from other segments or from the caller."""
        seen: set[Node] = set()
        for node in self._program.graph_module.graph.nodes:
            if node.op != "call_function" or self._owner.get(node) != self._k:
                continue
            for a in node.all_input_nodes:
                comes_in = a in self._owner and (self._owner[a] != self._k or a.op == "placeholder")
                if comes_in and a not in seen and isinstance(self._values[a], Tensor):
                    seen.add(a)
                    yield a

    def copy(self, node: Node) -> Any:
        """Return the copy of a node, made with all that it needs."""
        if node in self._copies:
            return self._copies[node]
        value = self._values[node]
        if not isinstance(value, (Tensor, list, tuple)):
            self._copies[node] = value
        elif node.op == "get_attr" and isinstance(value, Tensor):
            name = f"p{sum(1 for _ in self._root.parameters())}"
            setattr(self._root, name, nn.Parameter(value.detach(), requires_grad=False))
            self._copies[node] = self._graph.get_attr(name)
        else:
            # How a tensor lies in memory is not known of inputs: what was a view may have to be a copy.
            target = aten.reshape.default if node.target is aten.view.default else node.target
            assert callable(target)
            args, kwargs = map_arg((node.args, node.kwargs), self.copy)
            self._copies[node] = self._graph.call_function(target, args, kwargs)
        return self._copies[node]

    def finish(self, ends: list[Node]) -> GraphModule:
        self._graph.output(tuple(self._copies[n] for n in ends))
        self._graph.eliminate_dead_code()
        return GraphModule(self._root, self._graph)
