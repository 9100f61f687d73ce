"""Half precision, decided in the ONNX graph: networks are strongly typed and take their types from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slrc.backends.onnx_export import EXTERNAL_DATA_BYTES
from slrc.errors import BackendError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def convert_to_float16(path: Path) -> None:
    """Rewrite the ONNX model at `path` to compute in float16, with inputs and outputs as they were.

    1. Functions of the model are inlined: the converter does not look inside them.
    2. Weights and operators become float16, but for the operators that the converter keeps in float32.
    3. A Cast stands behind each float32 input and before each float32 output.

    Raises:
        BackendError: the graph cannot be converted, or what comes out is not a valid model.
    """
    import onnx
    import onnx_ir as ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        onnx.save(_prepared(path), path)
        # Given as a path, so that its types are inferred from the file: a protobuf in memory ends at 2 GiB.
        converted = ir.from_proto(convert_float_to_float16(str(path), keep_io_types=True))
        converted.graph.sort()  # the converter appends its Casts at the end of the graph
        _save(converted, path)
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the converter raises whatever it meets
        reason = str(error).strip().splitlines()
        raise BackendError(
            f"`{path}` cannot be converted to float16: {reason[0] if reason else type(error).__name__}",
            hint="build it in float32: leave `fp16` out of the target",
        ) from error


def _prepared(path: Path) -> onnx.ModelProto:
    """Return the model with its functions inlined and with no types stated for its weights.

    The converter would change a stated type even for a weight that it keeps, such as the scales of a Resize.
    """
    import onnx
    from onnx.inliner import inline_local_functions

    model = onnx.load(path, load_external_data=False)
    if model.functions:
        model = inline_local_functions(model)
    weights = {i.name for i in model.graph.initializer}
    stated = [v for v in model.graph.value_info if v.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(stated)
    return model


def _save(model: ir.Model, path: Path) -> None:
    """Save in place, with the weights in a file of their own where one protobuf cannot hold them."""
    import onnx_ir as ir

    initializers = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    data = path.with_name(f"{path.name}.data")
    external = sum(t.nbytes for t in initializers) > EXTERNAL_DATA_BYTES
    ir.save(model, path, external_data=data.name if external else None)
    if not external:
        data.unlink(missing_ok=True)
