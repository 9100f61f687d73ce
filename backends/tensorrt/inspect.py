"""Reading what TensorRT says of an engine: its layers, in one line each, and which are run sparse."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from slrc.backends.engine_summary import EngineSummary
from slrc.backends.tensorrt.log import MessageLog

TYPES = {
    "Float": "float32",
    "FP32": "float32",
    "Half": "float16",
    "FP16": "float16",
    "BFloat16": "bfloat16",
    "BF16": "bfloat16",
    "Int8": "int8",
    "INT8": "int8",
    "FP8": "float8",
    "Int32": "int32",
    "INT32": "int32",
    "Int64": "int64",
    "INT64": "int64",
    "Bool": "bool",
    "BOOL": "bool",
}
"""By the names that versions print, the first ones since 10, of a layer's type."""
ELIGIBLE = (r"\(Sparsity\) Found (\d+) layer\(s\) eligible", r"\(Sparsity\) Layers eligible for sparse math:(.*)")
CHOSEN = (
    r"\(Sparsity\) Chose (\d+) layer\(s\)",
    r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)",
)
"""How versions say it: the number, or, the older ones, the layers' names."""


def inspect_engine(trt: Any, engine: Path, log: MessageLog) -> EngineSummary | None:
    """Return what an engine that was just built consists of; `None` if neither it nor the builder says so.

    Where the GPU is present the engine is asked, else what the builder has logged is read.
    """
    text, said = "", "\n".join(log.kept)
    loaded = trt.Runtime(log.ilogger).deserialize_cuda_engine(engine.read_bytes())
    if loaded is not None:
        text = str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))
    return summarise(text or said, said)


def summarise(layers: str, log: str) -> EngineSummary | None:
    """Return the summary of layers in TensorRT's `ONELINE` format, and of the builder's lines on sparsity.

    Layers:
    Name: conv1 + relu, LayerType: CaskConvolution, Inputs: [ { Name: x, … }], Outputs: [ { Name: y,
    Dimensions: [1,8,4,4], Format/Datatype: Row major linear FP16 format }], …
    Bindings:
    """
    lines = re.findall(r"^Name: .*LayerType: .*$", layers, re.MULTILINE)
    if not lines:
        return None
    types = Counter(name for line in lines if (name := _output_type(line)) is not None)
    return EngineSummary(
        layers=len(lines),
        precisions=dict(types),
        sparse_eligible=_count(ELIGIBLE, log),
        sparse_chosen=_count(CHOSEN, log),
    )


def _output_type(line: str) -> str | None:
    outputs = line.partition("Outputs: [")[2].partition("]}")[0]
    found = re.search(r"(?:Datatype|DataType): ([^},]*)", outputs)
    words = re.findall(r"\w+", found[1]) if found else []
    return next((TYPES[word] for word in words if word in TYPES), None)


def _count(forms: tuple[str, ...], log: str) -> int | None:
    """Return how many layers the last line in one of the forms speaks of: the line is logged for each pass."""
    found = [match for form in forms for match in re.finditer(form, log)]
    if not found:
        return None
    said = max(found, key=lambda match: match.start())[1].strip()
    return int(said) if said.isdigit() else len([name for name in said.split(", ") if name])
