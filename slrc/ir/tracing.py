"""From a module to a `torch.export.ExportedProgram`, and from its operators back to the user's source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Node
from torch.utils import _pytree as pytree

from slrc.errors import CaptureError
from slrc.ir.export_memory import remembered
from slrc.ir.nodes import is_free, op_name
from slrc.ir.quiet import quiet_torch
from slrc.user_code import at, first_line, lines_in, lines_of, users_line

BROADCASTING = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
"""Operators of two operands that torch and ONNX broadcast alike."""

DETECTION = re.compile(r"torchvision/(models/detection/|ops/boxes)")
RAW_HEADS = """how many boxes there are depends on the image: wrap the network up to its raw heads, decode outside

    class RawHeads(torch.nn.ModuleDict):  # RawHeads({"backbone": detector.backbone, "head": detector.head})
        def forward(self, x):
            return self["head"](list(self["backbone"](x).values()))

(the head of torchvision's R-CNNs is `detector.rpn.head`)"""


def export(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """Export with a dynamic batch if that works, else with the shapes as they are.

    Raises:
        CaptureError: `torch.export` cannot trace it; the message names the user's source line.
    """
    sizes = [x.shape[0] for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0]
    attempts: list[tuple[tuple[Any, ...], Any]] = [(inputs, None)]
    if any(size != 1 for size in sizes):
        attempts.insert(0, (inputs, _any_batch(inputs)))
    if 1 in sizes:  # `torch.export` takes a dimension of size 1 for a constant: show it a batch of 2
        single = {id(x): torch.cat([x, x]) for x in pytree.tree_leaves(inputs) if _is_single(x)}
        doubled = pytree.tree_map(lambda x: single.get(id(x), x), inputs)
        attempts.insert(0, (doubled, _any_batch(single.values())))
    failures: list[Exception] = []
    for args, dynamic_shapes in attempts:
        try:
            with quiet_torch(), torch.no_grad(), remembered():
                exported = torch.export.export(module, args, dynamic_shapes=dynamic_shapes)
            if args is inputs or not _has_fixed_batch(exported, sizes):
                return exported
        except Exception as error:  # whatever the user's forward raises
            failures.append(error)
    raise _capture_error(failures[-1]) from failures[-1]


def drop_expansions(exported: ExportedProgram) -> None:
    """Let operators broadcast what is written out for them, as a norm to all that it divides: copies have no labels."""
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default):
        # A tensor without dimensions would have another say in the type of the result.
        has_dims = node.args[0].meta["val"].dim() > 0
        if has_dims and node.users and all(_broadcasts(user, node) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def source_line(node: Node) -> str:
    """Return `file:line: code` of the user's source that an operator came from, or an empty string."""
    line = users_line(lines_in(node.meta.get("stack_trace") or ""))
    return str(line) if line else ""


def _any_batch(inputs: Iterable[Any]) -> ShapesCollection:
    shapes = ShapesCollection()
    for x in pytree.tree_leaves(list(inputs)):
        if isinstance(x, Tensor) and x.dim() > 0:
            shapes[x] = {0: Dim.AUTO}
    return shapes


def _is_single(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == 1


def _has_fixed_batch(exported: ExportedProgram, sizes: Sequence[int]) -> bool:
    """Whether the model took the first dimension of an input for a constant, of those where it was 1."""
    inputs = set(exported.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder" and n.name in inputs]
    firsts = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0]
    return any(size == 1 and not is_free(first) for first, size in zip(firsts, sizes, strict=True))


def _broadcasts(user: Node, operand: Node) -> bool:
    """Whether an operator's other operand has the shape of its result, so that this one may be broadcast."""
    if op_name(user) not in BROADCASTING:
        return False
    others = [a for a in user.args[:2] if isinstance(a, Node) and a is not operand]
    return len(others) == 1 and str(others[0].meta["val"].shape) == str(user.meta["val"].shape)


def _capture_error(error: Exception) -> CaptureError:
    lines = lines_of(error)
    operator = re.search(r"aten[.:]+\w+(\.\w+)?|torch\.ops\.[\w.]+|\w+::\w+", str(error))
    named = f" (operator {operator.group(0)})" if operator else ""
    hint = "`--debug` shows the whole trace"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        hint = "control flow must not depend on a tensor's values: write it with `torch.where`, or outside of `forward`"
        if any(DETECTION.search(line.file) for line in lines):
            hint = RAW_HEADS
    return CaptureError(f"the model cannot be captured{at(users_line(lines))}{named}: {first_line(error)}", hint)
