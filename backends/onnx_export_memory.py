"""What torch does anew for every ONNX export though it is the same each time, or changes nothing."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten


@contextmanager
def spared() -> Iterator[None]:
    """Spare what ONNX exports repeat: most of the time of a small graph, such as a single layer."""
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
    except ImportError:  # a version of torch that keeps them elsewhere
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_translations_read_once(_registration.ONNXRegistry))
        stack.enter_context(_decomposed_where_needed(_fx_passes, _decomp))
        yield


@contextmanager
def _translations_read_once(registry: Any) -> Iterator[None]:
    """Keep what torch reads anew in every export: the sources of a thousand translations."""
    own, read = vars(registry)["from_torchlib"], registry.from_torchlib

    def copied(opset_version: int) -> Any:
        if opset_version not in _TRANSLATIONS:
            _TRANSLATIONS[opset_version] = read(opset_version)
        kept = _TRANSLATIONS[opset_version]
        fresh = copy.copy(kept)
        fresh.functions = {name: list(translations) for name, translations in kept.functions.items()}
        return fresh

    registry.from_torchlib = staticmethod(copied)
    try:
        yield
    finally:
        registry.from_torchlib = own


_TRANSLATIONS: dict[int, Any] = {}


@contextmanager
def _decomposed_where_needed(passes: Any, tables: Any) -> Iterator[None]:
    """Let torch trace a program anew, to decompose its operators, only if one of them has no form in ONNX."""
    own = passes.decompose_with_registry

    def decomposed(program: ExportedProgram, registry: Any) -> ExportedProgram:
        graph = copy.deepcopy(program.graph)
        _keep_names(graph, program)
        _average_by_mean(graph)
        known = {*tables.get_onnx_implemented_overloads(registry), operator.getitem}
        if any(node.op == "call_function" and node.target not in known for node in graph.nodes):
            return own(program, registry)  # type: ignore[no-any-return]
        found = copy.copy(program)
        found._graph_module = GraphModule(program.graph_module, graph)  # what follows changes it in place
        return found

    passes.decompose_with_registry = decomposed
    try:
        yield
    finally:
        passes.decompose_with_registry = own


def _keep_names(graph: Graph, program: ExportedProgram) -> None:
    """Name a copy's nodes as the program and its signature do: a copy has other names for Python's, such as `input`."""
    for node, own in zip(graph.nodes, program.graph.nodes, strict=True):
        node.name = own.name
    signature = program.graph_signature
    for spec, node in zip(signature.input_specs, graph.find_nodes(op="placeholder"), strict=True):
        node.name = spec.arg.name
    outputs: Any = graph.output_node().args[0]
    for output, node in zip(signature.output_specs, outputs, strict=True):
        if isinstance(node, Node) and node.op != "placeholder":
            node.name = output.arg.name


def _average_by_mean(graph: Graph) -> None:
    """Decompose average pooling to one pixel, which most networks of images end with, as torch does."""
    for node in graph.find_nodes(op="call_function", target=aten.adaptive_avg_pool2d.default):
        if list(node.args[1]) == [1, 1]:
            node.target, node.args = aten.mean.dim, (node.args[0], [-1, -2], True)
