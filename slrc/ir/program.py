"""`Program`: the captured inference graph, and the one way to rewrite it.

A program holds a `torch.export.ExportedProgram`: a functional FX graph of ATen operators whose parameters keep
the fully qualified names of the user's module. Analyses read `Program.graph_module`, in which parameters are
`get_attr` nodes; transforms call `Program.rewrite`, which edits a copy and exports it again, so that shapes and
signatures are always those of the graph as it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from slrc.errors import CaptureError, OutputError, SlrcError
from slrc.ir.export_memory import remembered
from slrc.ir.nodes import (
    WEIGHTED,
    conv_groups,
    is_free,
    is_transposed,
    layer_weight,
    node_macs,
    op_name,
    output_dim,
)
from slrc.ir.program_file import StoredProgram
from slrc.ir.quiet import quiet_torch
from slrc.ir.tracing import drop_expansions, export
from slrc.user_code import at, first_line, lines_of, users_line


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer whose weight is a parameter of the model.

    `weight` is the parameter's name and `shape` its shape, `(out, in/groups, *kernel)`, of a transposed convolution
    `(in, out/groups, *kernel)`; `output_dim` is as for `slrc.ir.nodes.output_dim`; `nodes` are the graph nodes that use
    it (more than one if it is tied or its module is called again); `macs` counts them all, at batch 1.
    """

    weight: str
    op: str
    shape: tuple[int, ...]
    groups: int
    is_transposed: bool
    output_dim: int
    nodes: tuple[str, ...]
    macs: int
    is_first: bool
    is_last: bool

    @property
    def name(self) -> str:
        """The module's name: `layer1.0.conv1` for the parameter `layer1.0.conv1.weight`."""
        return self.weight.removesuffix(".weight")

    @property
    def is_depthwise(self) -> bool:
        """Whether each output sees one input channel only."""
        return self.groups > 1 and self.shape[1] == 1

    @property
    def outputs_first_shape(self) -> tuple[int, ...]:
        """The shape of `outputs_first`."""
        first = self.output_dim
        return (self.shape[first], *self.shape[:first], *self.shape[first + 1 :])

    def outputs_first(self, weight: Tensor) -> Tensor:
        """Return the layer's weight as `(out, in/groups, *kernel)`: transposed convolutions hold it the other way."""
        return weight.movedim(self.output_dim, 0)

    def as_stored(self, outputs_first: Tensor) -> Tensor:
        """Return a weight `(out, in/groups, *kernel)` as the layer holds it."""
        return outputs_first.movedim(0, self.output_dim)


@dataclass(frozen=True)
class Program:
    """A captured inference graph with the inputs it was captured on."""

    exported: ExportedProgram
    example_inputs: tuple[Any, ...]
    name: str = "model"

    @cached_property
    def graph_module(self) -> GraphModule:
        """The graph with parameters as `get_attr` nodes. Read-only: `rewrite` works on copies."""
        module = self.exported.module(check_guards=False)
        assert isinstance(module, GraphModule)
        return module

    @property
    def nodes(self) -> Iterator[Node]:
        """The operators, in order."""
        return (node for node in self.graph_module.graph.nodes if node.op == "call_function")

    @cached_property
    def batch_is_dynamic(self) -> bool:
        """Whether the first dimension of the inputs may vary."""
        return any(self.free_batches)

    @cached_property
    def batch(self) -> int:
        """The batch size that `macs` counts are relative to: 1 where the batch is dynamic, or inputs differ in it."""
        sizes = {x.shape[0] for x in pytree.tree_leaves(self.example_inputs) if isinstance(x, Tensor) and x.dim() > 0}
        return 1 if self.batch_is_dynamic or len(sizes) != 1 else int(sizes.pop())

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """Layers by the name of their weight, in graph order."""
        uses: dict[str, list[Node]] = {}
        for node in self.nodes:
            if (weight := layer_weight(node)) is not None:
                uses.setdefault(weight, []).append(node)
        inputs = {n for n in self.graph_module.graph.nodes if n.op == "placeholder"}
        reached, last = _downstream_of_inputs(self.nodes, inputs), _upstream_of_output(self.graph_module)
        return {
            weight: Layer(
                weight=weight,
                op=op_name(nodes[0]),
                shape=tuple(self.tensors[weight].shape),
                groups=conv_groups(nodes[0]),
                is_transposed=is_transposed(nodes[0]),
                output_dim=output_dim(nodes[0]),
                nodes=tuple(n.name for n in nodes),
                macs=sum(node_macs(n) for n in nodes) // self.batch,
                is_first=any(n in reached for n in nodes),
                is_last=any(n in last for n in nodes),
            )
            for weight, nodes in uses.items()
        }

    def called(self, operator: str) -> str:
        """Return what a user calls an operator of the graph: the name of its layer, else its own."""
        return next((layer.name for layer in self.layers.values() if operator in layer.nodes), operator)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name."""
        module = self.graph_module
        return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        """Names of the parameters, buffers left out."""
        return frozenset(name for name, _ in self.graph_module.named_parameters(remove_duplicate=False))

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once, those that inference does not use (auxiliary heads) never."""
        used = [n.target for n in self.graph_module.graph.nodes if n.op == "get_attr" and n.users]
        unique = {id(t): t for name in used if name in self.parameter_names for t in [self.tensors[str(name)]]}
        return sum(t.numel() for t in unique.values())

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one sample: convolutions, linear layers, matrix products and attention."""
        return sum(node_macs(node) for node in self.nodes) // self.batch

    @cached_property
    def free_batches(self) -> tuple[bool, ...]:
        """For every tensor of a call, in order, whether its first dimension may vary."""
        nodes = self.graph_module.graph.find_nodes(op="placeholder")
        values = [v for n in nodes if isinstance(v := n.meta.get("val"), Tensor)]
        return tuple(v.dim() > 0 and is_free(v.shape[0]) for v in values)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of a call by position.

        Raises:
            TypeError: they are not those of the example inputs.
        """
        return _in_order(self._input_names, args, kwargs)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call, in the order of the graph's inputs; arguments may be given by name.

        Raises:
            TypeError: the arguments are not those of the example inputs.
            ValueError: a container is not like the example's.
        """
        in_spec = self.exported.call_spec.in_spec
        assert in_spec is not None
        leaves = in_spec.flatten_up_to((self.arguments(args, kwargs), {}))  # dicts in any order of keys
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """Return what the model returns, made of the tensors that the graph's outputs are."""
        out_spec = self.exported.call_spec.out_spec
        assert out_spec is not None
        stored, tensors = self.graph_module.graph.output_node().args[0], iter(outputs)
        assert isinstance(stored, (tuple, list))
        return pytree.tree_unflatten([next(tensors) if isinstance(x, Node) else x for x in stored], out_spec)

    @property
    def _input_names(self) -> tuple[str, ...]:
        return tuple(self.graph_module.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]

    def flat_inputs(self) -> list[Tensor]:
        """Return the example inputs as a flat list of tensors."""
        return [x.contiguous() for x in pytree.tree_leaves(self.example_inputs) if isinstance(x, Tensor)]

    def module(self, trainable: bool = False) -> nn.Module:
        """Return a fresh module that runs the graph; it shares no tensor with the program.

        With `trainable`, gradients flow to every floating-point parameter. The graph is that of evaluation whatever
        the module's mode: batch norm keeps its statistics, and there is no dropout. `with_tensors` takes what was
        learnt back: `program.with_tensors(module.state_dict())`.
        """
        module = copy.deepcopy(self.graph_module)
        for parameter in module.parameters():
            parameter.requires_grad_(trainable and parameter.is_floating_point())
        hook = partial(_arguments_in_order, self._input_names)
        module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        return module

    def save(self, folder: str | Path) -> None:
        """Write the program as JSON and safetensors, to be read by `load` without the user's code.

        Raises:
            OutputError: the folder cannot be written, or the graph holds an operator of the user's own, or takes or
                gives containers other than tuples, lists and dicts.
        """
        stored = self.stored()
        try:
            stored.write(Path(folder))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write to `{folder}`: {error}") from error

    @staticmethod
    def load(folder: str | Path) -> Program:
        """Read a program that `save` wrote, or a compile as `program` in its output; the file's text is never run.

        Raises:
            OutputError: a file is missing, damaged or of another version, asks for an operator that is not one of
                ATen, or does not fit together.
        """
        stored = StoredProgram.read(Path(folder))
        try:
            inputs = stored.example_inputs()
            program = Program(export(stored.module(), inputs), inputs, stored.graph.name)
            stored.check(program.graph_module)
        except SlrcError as error:
            raise OutputError(f"program `{folder}` cannot be rebuilt: {error.message}", error.hint) from error
        except Exception as error:  # whatever torch makes of a damaged file
            reason = str(error).partition("\n")[0]
            raise OutputError(f"program `{folder}` cannot be rebuilt: {type(error).__name__}: {reason}") from error
        return program

    def stored(self) -> StoredProgram:
        """Return the program as data, ready to be written.

        Raises:
            OutputError: see `save`.
        """
        out_spec = self.exported.call_spec.out_spec
        assert out_spec is not None
        return StoredProgram.of(self.graph_module, self.example_inputs, out_spec, self.name)

    def rewrite(self, edit: Callable[[GraphModule], bool]) -> tuple[Program, bool]:
        """Return the program after `edit`, and whether it changed anything.

        `edit` gets a copy of the graph module, changes its graph and tensors, and says whether it did. Operators and
        tensors that are no longer used are dropped, and the graph is exported again.
        """
        module = copy.deepcopy(self.graph_module)
        if not edit(module):
            return self, False
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default  # attention of other widths may lay its result out otherwise
        module.graph.eliminate_dead_code()
        _drop_unused_tensors(module)
        module.graph.lint()
        module.recompile()
        return Program(export(module, self.example_inputs), self.example_inputs, self.name), True

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Program:
        """Return the same graph with other values for some of its parameters and buffers."""

        exported = copy.deepcopy(self.exported)
        own = {**exported.constants, **exported.state_dict}
        with torch.no_grad():
            for name, value in tensors.items():
                if name in own:
                    own[name].copy_(value)
        return Program(exported, self.example_inputs, self.name)


def capture(model: nn.Module, example_inputs: tuple[Any, ...], name: str = "model", where: str = "") -> Program:
    """Trace `model` in evaluation mode to a functional graph of ATen operators.

    The model is copied: it is neither moved nor changed. The batch dimension (the first of every tensor input) stays
    dynamic wherever the model allows it.

    Args:
        model: the user's module.
        example_inputs: the arguments of one call.
        name: for reports and errors.
        where: where the user gave the inputs, for an error that has no line of the user's `forward` to name.

    Raises:
        CaptureError: the model cannot be copied, does not take the example inputs, or cannot be traced by
            `torch.export`; the message names the user's source line.
    """
    try:
        twin = copy.deepcopy(model).cpu().eval()
    except Exception as error:  # whatever the user's attributes raise
        raise CaptureError(
            f"the model cannot be copied: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            hint="computed tensors kept as attributes cannot be copied, as of the old `torch.nn.utils.weight_norm`",
        ) from error
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tensor.requires_grad_(False)
        tensor.data = tensor.data.contiguous()
    inputs = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu().contiguous(), example_inputs)
    _try(twin, inputs, where)
    with quiet_torch(), remembered():
        exported = export(twin, inputs).run_decompositions({})
    drop_expansions(exported)
    return Program(exported, inputs, name)


def _try(model: nn.Module, inputs: tuple[Any, ...], where: str) -> None:
    """Call the model as it is: what it cannot take is said in its own words, not in those of a tracer."""
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*copy.deepcopy(inputs))
    except Exception as error:  # whatever the user's forward raises
        line = at(users_line(lines_of(error))) or where
        given = ", ".join(_describe(x) for x in inputs)
        raise CaptureError(
            f"the model fails on its example inputs{line}: {first_line(error)}",
            hint=f"mend that line, or `Workload.example_inputs`, which are ({given}) and have to fit `forward`",
        ) from error


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _in_order(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call, some given by name, as a tuple."""
    named = names[len(args) :]
    if len(args) > len(names) or set(named) != set(kwargs):
        given = [*names[: len(args)], *("…" for _ in args[len(names) :]), *kwargs]
        raise TypeError(f"the model was captured with the arguments ({', '.join(names)}), got ({', '.join(given)})")
    return (*args, *(kwargs[name] for name in named))


def _arguments_in_order(
    names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before `forward`: a graph takes its arguments by position."""
    return _in_order(names, args, kwargs), {}


def _downstream_of_inputs(nodes: Iterator[Node], inputs: set[Node]) -> set[Node]:
    """Layers that see inputs, and nothing that comes after another layer.

    The stream of a transformer begins at an embedding, which is no layer: its first block alone is the first.
    """
    fresh, layers, after = set(inputs), set(), set()
    for node in nodes:
        if any(a in after for a in node.all_input_nodes):
            after.add(node)
        elif any(a in fresh for a in node.all_input_nodes) and not isinstance(node.meta.get("val"), torch.SymInt):
            if layer_weight(node) is not None:
                layers.add(node)
                after.add(node)
            elif op_name(node) not in WEIGHTED:  # whose weight may be computed
                fresh.add(node)
    return layers


def _upstream_of_output(module: GraphModule) -> set[Node]:
    """Layers whose result reaches an output, by nothing that another layer reads."""
    late, layers, before = set(), set(), set()
    for node in reversed(module.graph.nodes):
        reaches_output = node.op == "output" or any(user in late for user in node.users)
        if reaches_output and layer_weight(node) is not None:
            layers.add(node)
            before.add(node)
        elif any(user in before for user in node.users):
            before.add(node)
        elif reaches_output and op_name(node) not in WEIGHTED:
            late.add(node)
    return layers


def _drop_unused_tensors(module: GraphModule) -> None:
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
