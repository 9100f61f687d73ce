"""From a program to an ONNX model: what every backend that reads ONNX shares."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from slrc.backends.packed_onnx import attach_functions, translation_table
from slrc.errors import BackendError
from slrc.program import Program

OPSET = 21
"""The newest opset that ONNX Runtime and TensorRT's parser both take whole."""
EXTERNAL_DATA_BYTES = 1 << 30
"""Above this the weights go to a file of their own: a protobuf holds 2 GiB at most."""


def export_onnx(program: Program, path: Path) -> bool:
    """Write `program` as a checked ONNX model with named inputs and outputs; return whether it has packed layers.

    Raises:
        BackendError: an operator has no ONNX form; the message names it.
    """
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                custom_translation_table=translation_table(),
            )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise BackendError(
            f"{program.name} cannot be exported to ONNX: {reason[0] if reason else type(error).__name__}",
            hint="an operator of the model has no ONNX form in this version of torch; `--debug` shows which",
        ) from error
    assert exported is not None
    is_packed = attach_functions(exported.model)
    exported.save(path, external_data=_bytes(program) > EXTERNAL_DATA_BYTES)
    onnx.checker.check_model(str(path))
    return is_packed


def _bytes(program: Program) -> int:
    return sum(t.numel() * t.element_size() for t in program.tensors.values())
