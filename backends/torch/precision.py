"""A program whose layers compute in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from slrc.ir.nodes import MATMULS, WEIGHTED, op_name
from slrc.ir.program import Program
from slrc.ir.tracing import export

MULTIPLYING = WEIGHTED | MATMULS | {"addmm", "baddbmm", "scaled_dot_product_attention"}
"""What computes in half precision; other operators compute in what they are given."""
TYPE_ASSERTIONS = "_assert_tensor_metadata"


def in_half(program: Program, dtype: torch.dtype) -> ExportedProgram:
    """Return a program with its layers in `dtype`, with inputs and outputs of the types that they had.

    1. Weights that layers alone read are stored in `dtype`, and what layers multiply becomes `dtype` in front of them.
    2. An operator that is given both `dtype` and float32, as a layer norm with its weights, computes in float32.
    3. Outputs become what they were.

    Raises:
        CaptureError: the program cannot be traced so.
    """
    return export(_Half(program, dtype), program.example_inputs)


class _Half(nn.Module):
    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        super().__init__()
        inner = program.module()
        assert isinstance(inner, GraphModule)
        self.inner, self.dtype = inner, dtype
        outputs = pytree.tree_leaves(inner.graph.output_node().args)
        self.output_dtypes = [x.meta["val"].dtype for x in outputs if isinstance(x, Node)]
        for node in inner.graph.find_nodes(op="get_attr"):
            if all(op_name(user) in MULTIPLYING for user in node.users):
                _store_as(inner, str(node.target), dtype)

    def forward(self, *inputs: Any) -> Any:
        """Run the graph operator by operator."""
        outputs, spec = pytree.tree_flatten(_Operators(self.inner, self.dtype).run(*inputs))
        dtypes = iter(self.output_dtypes)
        return pytree.tree_unflatten([x.to(next(dtypes)) if isinstance(x, Tensor) else x for x in outputs], spec)


class _Operators(Interpreter):
    def __init__(self, module: GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module)
        self._dtype = dtype

    def run_node(self, n: Node) -> Any:
        """Run an operator on what it was given, in the type that it computes in."""
        name = op_name(n)
        if name == TYPE_ASSERTIONS:
            return None
        self._to = self._dtype if name in MULTIPLYING else torch.float32
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator."""
        found = {x.dtype for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        either = {self._dtype, torch.float32}
        if self._to == self._dtype or either <= found:
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda x: x.to(self._to) if x.dtype in either else x, (args, kwargs)
            )
        return super().call_function(target, args, kwargs)


def _store_as(module: GraphModule, name: str, dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, leaf)
    if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
        tensor.data = tensor.data.to(dtype)
