"""`Program`: the captured inference graph, and the one way to rewrite it.

A program holds a `torch.export.ExportedProgram`: a functional FX graph of ATen operators whose parameters keep
the fully qualified names of the user's module. Analyses read `Program.graph_module`, in which parameters are
`get_attr` nodes; transforms call `Program.rewrite`, which edits a copy and exports it again, so that shapes and
signatures are always those of the graph as it stands.
"""

from __future__ import annotations

import copy
import linecache
import logging
import math
import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from slrc.errors import CaptureError, OutputError, SlrcError
from slrc.program_file import StoredProgram

aten = torch.ops.aten

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
WEIGHTED = CONVOLUTIONS | TRANSPOSED | {"linear"}
PACKED = {"block_sparse_conv": (1,), "block_sparse_gemm": (1,), "block_sparse_mlp": (1, 5)}
"""Operators of slrc, see `slrc.packed_ops`, and which of their inputs are values of packed weights."""
MATMULS = frozenset({"matmul", "bmm", "mm"})
BROADCASTING = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
"""Operators of two operands that torch and ONNX broadcast alike."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer whose weight is a parameter of the model.

    `weight` is the parameter's name, of shape `(out, in/groups, *kernel)`; `nodes` are the graph nodes that use it
    (more than one if it is tied or its module is called again); `macs` counts them all, at batch 1.
    """

    weight: str
    op: str
    shape: tuple[int, ...]
    groups: int
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
        values = [n.meta.get("val") for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        return any(isinstance(v, Tensor) and v.dim() > 0 and _is_free(v.shape[0]) for v in values)

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
                nodes=tuple(n.name for n in nodes),
                macs=sum(node_macs(n) for n in nodes) // self.batch,
                is_first=any(n in reached for n in nodes),
                is_last=any(n in last for n in nodes),
            )
            for weight, nodes in uses.items()
        }

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

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call, in the order of the graph's inputs; arguments may be given by name.

        Raises:
            TypeError: the arguments are not those of the example inputs.
            ValueError: a container is not like the example's.
        """
        in_spec = self.exported.call_spec.in_spec
        assert in_spec is not None
        leaves = in_spec.flatten_up_to((_in_order(self._input_names, args, kwargs), {}))  # dicts in any order of keys
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
            program = Program(_export(stored.module(), inputs), inputs, stored.graph.name)
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
        return Program(_export(module, self.example_inputs), self.example_inputs, self.name), True

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Program:
        """Return the same graph with other values for some of its parameters and buffers."""

        exported = copy.deepcopy(self.exported)
        own = {**exported.constants, **exported.state_dict}
        with torch.no_grad():
            for name, value in tensors.items():
                if name in own:
                    own[name].copy_(value)
        return Program(exported, self.example_inputs, self.name)


def capture(model: nn.Module, example_inputs: tuple[Any, ...], name: str = "model") -> Program:
    """Trace `model` in evaluation mode to a functional graph of ATen operators.

    The model is copied: it is neither moved nor changed. The batch dimension (the first of every tensor input) stays
    dynamic wherever the model allows it.

    Raises:
        CaptureError: the model cannot be copied, or `torch.export` cannot trace it; the message names the user's
            source line.
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
    exported = _export(twin, inputs).run_decompositions({})
    _drop_expansions(exported)
    return Program(exported, inputs, name)


def op_name(node: Node) -> str:
    """Return an operator's bare name: `conv2d` for `aten.conv2d.default`; empty for inputs, tensors and the output."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def layer_weight(node: Node) -> str | None:
    """Return the name of the weight if `node` is a convolution or linear layer with a parameter as its weight."""
    if op_name(node) not in WEIGHTED or len(node.args) < 2:
        return None
    weight = node.args[1]
    if isinstance(weight, Node) and weight.op == "get_attr":
        return str(weight.target)
    return None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an operator's argument, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def conv_groups(node: Node) -> int:
    """Return a convolution's number of groups; 1 for other operators."""
    name = op_name(node)
    position = 8 if name == "convolution" else 6
    return int(argument(node, position, "groups", 1)) if name in CONVOLUTIONS | TRANSPOSED else 1


def is_transposed(node: Node) -> bool:
    """Return whether a convolution is transposed, so that its weight is `(in, out/groups, *kernel)`."""
    return op_name(node) in TRANSPOSED or (op_name(node) == "convolution" and bool(node.args[6]))


def concrete(size: int | torch.SymInt) -> int:
    """Return a size with every symbolic dimension (the batch) counted as 1, and parts of it as 1 at least."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    try:
        return max(1, int(expr.subs(dict.fromkeys(expr.free_symbols, 1))))
    except (ZeroDivisionError, TypeError):  # frames folded into the batch: `s // (s // 8)`
        return int(size.node.hint or 1)


def node_shape(node: Node) -> list[int]:
    """Return the sizes of a single-tensor value, a symbolic batch counted as 1."""
    return [concrete(s) for s in node.meta["val"].shape]


def node_macs(node: Node, shape_of: Callable[[Node], list[int]] = node_shape) -> int:
    """Return the multiply-accumulates of one operator; `shape_of` says how large its value and operands are."""
    name = op_name(node)
    if not isinstance(node.meta.get("val"), Tensor):
        return 0
    out = math.prod(shape_of(node))
    operands = [a for a in node.args[:2] if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]
    shape = [shape_of(a) for a in operands]
    if name in TRANSPOSED or (name == "convolution" and node.args[6]):
        return math.prod(shape[0]) * math.prod(shape[1][1:])
    if name in CONVOLUTIONS or name == "linear":
        return out * math.prod(shape[1][1:])
    if name in MATMULS:
        return out * shape[0][-1]
    if name in PACKED:
        packed = [node.args[k] for k in PACKED[name]]
        values = sum(int(a.meta["val"].numel()) for a in packed if isinstance(a, Node))
        return out // shape_of(node)[1 if name == "block_sparse_conv" else -1] * values
    if name == "addmm":
        return out * shape[1][-1]
    if name == "scaled_dot_product_attention":
        return (math.prod(shape[0]) + out) * shape[1][-2]
    return 0


def source_line(node: Node) -> str:
    """Return `file:line: code` of the user's source that an operator came from, or an empty string."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    for file, line, code in reversed(frames):
        if not _is_library(file):
            return f"{_short(file)}:{line}: {code}"
    return f"{_short(frames[-1][0])}:{frames[-1][1]}: {frames[-1][2]}" if frames else ""


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


def _export(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """Export with a dynamic batch if that works, else with the shapes as they are."""
    logging.getLogger("torch._export").setLevel(logging.ERROR)  # it warns of each input whose batch is always 1
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
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, args, dynamic_shapes=dynamic_shapes)
            if args is inputs or not _has_fixed_batch(exported, sizes):
                return exported
        except Exception as error:  # whatever the user's forward raises
            failures.append(error)
    raise _capture_error(failures[-1]) from failures[-1]


def _drop_expansions(exported: ExportedProgram) -> None:
    """Let operators broadcast what is written out for them, as a norm to all that it divides: copies have no labels."""
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default):
        # A tensor without dimensions would have another say in the type of the result.
        has_dims = node.args[0].meta["val"].dim() > 0
        if has_dims and node.users and all(_broadcasts(user, node) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def _broadcasts(user: Node, operand: Node) -> bool:
    """Whether an operator's other operand has the shape of its result, so that this one may be broadcast."""
    if op_name(user) not in BROADCASTING:
        return False
    others = [a for a in user.args[:2] if isinstance(a, Node) and a is not operand]
    return len(others) == 1 and str(others[0].meta["val"].shape) == str(user.meta["val"].shape)


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
    return any(size == 1 and not _is_free(first) for first, size in zip(firsts, sizes, strict=True))


def _capture_error(error: Exception) -> CaptureError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    where = ""
    if frames:
        last = frames[-1]
        code = linecache.getline(last.filename, last.lineno or 0).strip() or last.line
        where = f" at {_short(last.filename)}:{last.lineno}: `{code}`"
    operator = re.search(r"aten[.:]+\w+(\.\w+)?|torch\.ops\.[\w.]+|\w+::\w+", str(error))
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    named = f" (operator {operator.group(0)})" if operator else ""
    return CaptureError(
        f"the model cannot be captured{where}{named}: {type(error).__name__}: {first}",
        hint="control flow must not depend on a tensor's values; see `--debug` for the whole trace",
    )


_HERE = Path(__file__).parent
_OWN = tuple(p.resolve() for p in (Path(torch.__file__).parent, _HERE, _HERE / "passes", _HERE / "backends"))
_STANDARD, _PACKAGES = (Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "purelib"))


def _is_library(file: str) -> bool:
    """Whether a source file belongs to torch, slrc or Python: models of other packages count as the user's."""
    path = Path(file).resolve()
    in_standard = path.is_relative_to(_STANDARD) and not path.is_relative_to(_PACKAGES)
    return file.startswith("<") or any(path.is_relative_to(own) for own in _OWN) or in_standard


def _short(file: str) -> str:
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except ValueError:
        return re.sub(r".*/site-packages/", "", file)


def _is_free(size: int | torch.SymInt) -> bool:
    """Whether a size may vary: a model that fixes its batch leaves a symbol that equals a constant."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


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
