"""A program on disk: its graph as JSON, its tensors as safetensors; no pickle, and no code is run when it is read.

    graph.json            example inputs, operators in order, outputs, and what every tensor is
    weights.safetensors   parameters, buffers and constants by name; tied parameters are stored once
    inputs.safetensors    the tensors of the example inputs

Operators and arguments stand there as `slrc.ir.graph_values` writes them: only the operators of ATen that
`slrc.ir.operators` lists and a few functions of symbolic sizes are ever looked up.
"""

from __future__ import annotations

import inspect
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from slrc.errors import OutputError
from slrc.ir.graph_values import GraphValue, decode, encode, find_operator, operator_name
from slrc.ir.nodes import op_name
from slrc.ir.operand_checks import misfit
from slrc.ir.operators import WRITE

SCHEMA_VERSION = 1
GRAPH, WEIGHTS, INPUTS = "graph.json", "weights.safetensors", "inputs.safetensors"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredTensor(_Data):
    """What a tensor of the graph is; `same_as` names the one that it is tied to."""

    kind: Literal["parameter", "buffer", "constant"]
    dtype: str
    shape: tuple[int, ...]
    persistent: bool = True
    same_as: str | None = None


class StoredNode(_Data):
    """One operator and its arguments."""

    name: str
    op: str
    args: list[Any]
    kwargs: dict[str, Any] = Field(default_factory=dict)


class StoredGraph(_Data):
    """What `graph.json` holds. Shapes of inputs and outputs say `null` for a dimension that may vary."""

    schema_version: Literal[1] = 1
    name: str
    torch: str
    input_names: list[str]
    inputs: Any
    outputs: Any
    shapes: list[list[int | None] | None]
    tensors: dict[str, StoredTensor]
    nodes: list[StoredNode]


@dataclass(frozen=True)
class StoredProgram:
    """A program as data: what is written, and what was read and checked."""

    graph: StoredGraph
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]

    @staticmethod
    def of(module: GraphModule, inputs: tuple[Any, ...], out_spec: pytree.TreeSpec, name: str) -> StoredProgram:
        """Describe a graph with parameters as `get_attr` nodes.

        Raises:
            OutputError: it holds something that the format has no word for, such as an operator of the user's own.
        """
        values: dict[Node, GraphValue] = {}
        nodes, outputs = [], None
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = GraphValue("input", sum(v.tag == "input" for v in values.values()))
            elif node.op == "get_attr":
                values[node] = GraphValue("tensor", str(node.target))
            elif node.op == "output":
                leaves = list(node.args[0])
                try:
                    outputs = pytree.tree_unflatten(leaves, out_spec)
                except Exception as error:  # a container of the user's own, made of nodes
                    raise OutputError(f"{name} cannot be stored: its outputs are in a container of its own") from error
            else:
                values[node] = GraphValue("node", node.name)
                op, args = operator_name(node.target, name), [encode(a, values) for a in node.args]
                kwargs = {key: encode(a, values) for key, a in node.kwargs.items()}
                nodes.append(StoredNode(name=node.name, op=op, args=args, kwargs=kwargs))
        leaves, in_spec = pytree.tree_flatten(inputs)
        tensors = {f"input_{i}": x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        leaves = [GraphValue("input", i) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
        table, weights = _describe_tensors(module)
        graph = StoredGraph(
            name=name,
            torch=torch.__version__,
            input_names=[*inspect.signature(module.forward).parameters],
            inputs=encode(pytree.tree_unflatten(leaves, in_spec), {}),
            outputs=encode(outputs, values),
            shapes=_shapes(module),
            tensors=table,
            nodes=nodes,
        )
        for key, tensor in {**tensors, **weights}.items():
            if not _is_storable(tensor):
                raise OutputError(f"{name} cannot be stored: safetensors cannot hold `{key}`, of {tensor.dtype}")
        return StoredProgram(graph, weights, tensors)

    def write(self, folder: Path) -> None:
        """Write the three files.

        Raises:
            OSError, SafetensorError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in ((WEIGHTS, self.weights), (INPUTS, self.inputs)):
            save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, folder / file)
        (folder / GRAPH).write_text(_print(self.graph.model_dump(exclude_defaults=True)))

    @staticmethod
    def read(folder: Path) -> StoredProgram:
        """Read what `write` wrote.

        Raises:
            OutputError: a file is missing, damaged or of another version, or tensors are not those of the graph.
        """
        if missing := [file for file in (GRAPH, WEIGHTS, INPUTS) if not (folder / file).is_file()]:
            raise OutputError(
                f"program `{folder}` has no file `{missing[0]}`",
                hint="give the folder `program` of a compile's output, or one that `Program.save` wrote",
            )
        try:
            data = json.loads((folder / GRAPH).read_text())
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA_VERSION:
                raise OutputError(
                    f"program `{folder}` has schema version {version}, expected {SCHEMA_VERSION}",
                    hint="write it anew with this version of slrc",
                )
            graph = StoredGraph.model_validate(data)
            weights, inputs = (load_file(folder / file) for file in (WEIGHTS, INPUTS))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise OutputError(f"program `{folder}`, field `{where}`: {first['msg']}") from None
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise OutputError(f"program `{folder}` cannot be read: {error}") from None
        stored = {n: t for n, t in graph.tensors.items() if t.same_as is None}
        found = {n: (_dtype(t), tuple(t.shape)) for n, t in weights.items()}
        for tensor in dict.fromkeys((*stored, *found)):
            expected = (stored[tensor].dtype, stored[tensor].shape) if tensor in stored else "no such tensor"
            if found.get(tensor, "no such tensor") != expected:
                got = found.get(tensor, "none")
                raise OutputError(f"program `{folder}`, tensor `{tensor}`: expected {expected}, got {got}")
        return StoredProgram(graph, weights, inputs)

    def example_inputs(self) -> tuple[Any, ...]:
        """Return the example inputs, in the containers that the program takes."""
        return tuple(decode(self.graph.inputs, lambda tag, i: self.inputs[f"{tag}_{i}"].clone()))

    def module(self) -> nn.Module:
        """Return a module that runs the stored operators one by one, with the parameters under their names.

        Raises:
            OutputError: an operator is none that may be looked up, a name cannot be one, or a value is used before it
                is there.
        """
        root = nn.Module()
        graph = Graph()
        values: dict[tuple[str, Any], Node] = {}
        for i, _ in enumerate(pytree.tree_leaves(self.example_inputs())):
            values["input", i] = graph.placeholder(f"input_{i}")
        made: dict[str, Tensor] = {}
        for name, tensor in self.graph.tensors.items():
            made[name] = made[tensor.same_as] if tensor.same_as is not None else self._tensor(name)
            _register(root, name, tensor, made[name])
            values["tensor", name] = graph.get_attr(name)

        def value(tag: str, key: Any) -> Node:
            if (tag, key) not in values:
                raise OutputError(f"there is no {tag} `{key}` yet")
            return values[tag, key]

        for node in self.graph.nodes:
            if ("node", node.name) in values or not all(key.isidentifier() for key in node.kwargs):
                raise OutputError(f"node `{node.name}`: its name or one of its arguments is not one it can have")
            args = tuple(decode(a, value) for a in node.args)
            kwargs = {key: decode(a, value) for key, a in node.kwargs.items()}
            made_node = graph.call_function(find_operator(node.op), args, kwargs)
            if op_name(made_node) == WRITE and getattr(next(iter(args), None), "op", "") != "get_attr":
                raise OutputError(f"node `{node.name}` writes to what is no tensor of the program")
            values["node", node.name] = made_node
        outputs = decode(self.graph.outputs, value)
        leaves, out_spec = pytree.tree_flatten(outputs)
        graph.output(tuple(leaves))

        def forward(*inputs: Any) -> Any:
            flat = Interpreter(root, graph=graph).run(*pytree.tree_leaves(inputs))
            return pytree.tree_unflatten(flat, out_spec)

        names = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self.graph.input_names]
        forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        root.forward = forward
        return root

    def check(self, module: GraphModule) -> None:
        """Make sure that the rebuilt program takes and gives the shapes of the stored one, and that its operands fit.

        Raises:
            OutputError: it does not.
        """
        if (found := _shapes(module)) != self.graph.shapes:
            raise OutputError(f"expected inputs and outputs of shapes {self.graph.shapes}, got {found}")
        if reason := misfit(module):
            raise OutputError(f"operands do not fit at {reason}")

    def _tensor(self, name: str) -> Tensor:
        tensor = self.weights[name].clone()  # what was read may lie in the file still
        return nn.Parameter(tensor, requires_grad=False) if self.graph.tensors[name].kind == "parameter" else tensor


def _describe_tensors(module: GraphModule) -> tuple[dict[str, StoredTensor], dict[str, Tensor]]:
    """Return what every tensor of a graph is, and each one once."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    found: dict[str, Any] = {**parameters, **buffers}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in found:
            found[node.target] = operator.attrgetter(node.target)(module)
    transient = {
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
    table, first = {}, dict[int, str]()
    for name, tensor in found.items():
        _check_name(name)
        if not isinstance(tensor, Tensor):
            raise OutputError(f"`{name}` cannot be stored: it is a {type(tensor).__name__}, not a tensor")
        same_as = first.setdefault(id(tensor), name)
        table[name] = StoredTensor(
            kind="parameter" if name in parameters else "buffer" if name in buffers else "constant",
            dtype=_dtype(tensor),
            shape=tuple(tensor.shape),
            persistent=name not in transient,
            same_as=None if same_as == name else same_as,
        )
    return table, {name: found[name] for name in first.values()}


def _register(root: nn.Module, name: str, stored: StoredTensor, tensor: Tensor) -> None:
    """Put a tensor in its place; modules on the way are made."""
    _check_name(name)
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        children = dict(owner.named_children())
        if part not in children:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if hasattr(owner, leaf):
        raise OutputError(f"`{name}` cannot be the name of a tensor: it is taken")
    if stored.kind == "parameter":
        owner.register_parameter(leaf, tensor)  # type: ignore[arg-type]
    elif stored.kind == "buffer":
        owner.register_buffer(leaf, tensor, persistent=stored.persistent)
    else:
        setattr(owner, leaf, tensor)


_TAKEN = frozenset(dir(GraphModule(nn.Module(), Graph())))


def _check_name(name: str) -> None:
    """Make sure that a tensor's name hides no attribute of a module, means nothing to Python, and is no code.

    Raises:
        OutputError: it does, or is.
    """
    parts = name.split(".")
    is_text = name.isprintable() and not set(name) & set("\"'\\") and all(parts)
    if not is_text or parts[0] in _TAKEN or any(part.startswith("__") for part in parts):
        raise OutputError(f"{name!r} cannot be the name of a tensor")


def _shapes(module: GraphModule) -> list[list[int | None] | None]:
    """Return the shapes of inputs and outputs; `None` for a dimension that may vary and for what is no tensor."""
    outputs: Any = module.graph.output_node().args[0]
    nodes = [*(n for n in module.graph.nodes if n.op == "placeholder"), *outputs]
    return [_shape(n.meta.get("val") if isinstance(n, Node) else None) for n in nodes]


def _shape(value: Any) -> list[int | None] | None:
    if not isinstance(value, Tensor):
        return None
    return [s if isinstance(s, int) else s.node.maybe_as_int() for s in value.shape]


def _is_storable(tensor: Tensor) -> bool:
    try:
        save({"x": torch.empty(1, dtype=tensor.dtype)})
    except Exception:  # safetensors has no word for the type
        return False
    return tensor.layout == torch.strided


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _print(graph: Mapping[str, Any]) -> str:
    """Return JSON with a line for each operator and each tensor."""
    lines = []
    for key, value in {"schema_version": SCHEMA_VERSION, **graph}.items():
        if key == "nodes":
            text = "[\n  " + ",\n  ".join(json.dumps(x) for x in value) + "\n ]"
        elif key == "tensors":
            text = "{\n  " + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(x)}" for k, x in value.items()) + "\n }"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
