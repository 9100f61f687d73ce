"""From a program to an ONNX model: what every backend that reads ONNX shares."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.fx import Node

from slrc.backends import pack_integers, packed_onnx, quantized_onnx
from slrc.backends.onnx_export_memory import spared
from slrc.backends.packed_onnx import attach_functions
from slrc.errors import BackendError
from slrc.ir.export_memory import remembered
from slrc.ir.program import Program
from slrc.ir.quiet import quiet_torch

aten = torch.ops.aten

OPSET = 21
"""The newest opset that ONNX Runtime and TensorRT's parser both take whole."""
OLDEST_OPSET = 18
"""The oldest one that torch exports to itself."""
EXTERNAL_DATA_BYTES = 1 << 30
"""Above this the weights go to a file of their own: a protobuf holds 2 GiB at most."""


def export_onnx(program: Program, path: Path, opset: int = OPSET) -> bool:
    """Write `program` as a checked ONNX model with named inputs and outputs; return whether it has packed layers.

    `opset` is 18 or later: torch has its translations in opset 18. See `rewrite_opset` for an older one.

    Raises:
        BackendError: an operator has no ONNX form; the message names it.
    """
    import onnx

    exported_program = _without_constant_outputs(_with_plain_attention(program))
    try:
        with quiet_torch(), remembered(), spared():
            exported = torch.onnx.export(
                exported_program,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                verbose=False,
                custom_translation_table={**packed_onnx.translation_table(), **quantized_onnx.translation_table()},
            )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise BackendError(
            f"{program.name} cannot be exported to ONNX: {reason[0] if reason else type(error).__name__}",
            hint="an operator of the model has no ONNX form in this version of torch; `--debug` shows which",
        ) from error
    assert exported is not None
    pack_integers.pack_layers(exported.model)
    quantized_onnx.write_integers(exported.model)
    is_packed = attach_functions(exported.model, opset)
    exported.save(path, external_data=_bytes(program) > EXTERNAL_DATA_BYTES)
    onnx.checker.check_model(str(path))
    return is_packed


def _with_plain_attention(program: Program) -> ExportedProgram:
    """Write attention over more than four dimensions in products: torch has an ONNX form for four alone."""
    fused = aten.scaled_dot_product_attention.default
    if all(node.target is not fused or node.meta["val"].dim() == 4 for node in program.nodes):
        return program.exported
    return program.exported.run_decompositions({fused: _attention})


def _without_constant_outputs(exported: ExportedProgram) -> ExportedProgram:
    """Write `None`, which ONNX leaves out, for the numbers and texts among the outputs: it has no form for them."""
    if all(isinstance(x, Node) or x is None for x in exported.graph.output_node().args[0]):
        return exported
    exported = copy.deepcopy(exported)
    output = exported.graph.output_node()
    output.args = (tuple(x if isinstance(x, Node) else None for x in output.args[0]),)
    for spec in exported.graph_signature.output_specs:
        if isinstance(spec.arg, ConstantArgument):
            spec.arg = ConstantArgument(name="", value=None)
    return exported


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(q kᵀ · scale + mask) v`, in evaluation: nothing is dropped."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_choice else scores + attn_mask
    return scores.softmax(-1) @ value


def _bytes(program: Program) -> int:
    return sum(t.numel() * t.element_size() for t in program.tensors.values())
