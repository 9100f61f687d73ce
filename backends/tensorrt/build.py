"""Building an engine: parse the ONNX model, say which batches it must take, and compile it.

`trt` is the module of a flavour, `tensorrt` or `tensorrt_rtx`: they have one API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrc.backends.tensorrt.log import MessageLog, message_log
from slrc.errors import BackendError

MIN_BATCH = 1
MAX_BATCH = 32
"""The largest batch that an engine takes, unless the example inputs hold a larger one."""
NOT_BY_DEFAULT = frozenset({"sm75"})
"""Turing has to be named: TensorRT-RTX has no float32 matrix product for it."""


@dataclass(frozen=True)
class BatchProfile:
    """The batches that an engine takes, from `smallest` to `largest`; it is tuned for `typical`."""

    smallest: int
    typical: int
    largest: int

    def __str__(self) -> str:
        return f"{self.smallest} to {self.largest}, tuned for {self.typical}"

    @staticmethod
    def around(typical: int) -> BatchProfile:
        """Return the profile for an example batch, where the batch may vary."""
        typical = max(typical, MIN_BATCH)
        return BatchProfile(MIN_BATCH, typical, max(MAX_BATCH, typical))


def known_capabilities(trt: Any) -> tuple[str, ...]:
    """Return the compute capabilities that this version can name, such as `sm86`, the oldest first."""
    names = [name.lower() for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    return tuple(sorted(names, key=lambda name: int(name.removeprefix("sm"))))


def default_capabilities(trt: Any) -> tuple[str, ...]:
    """Return what an engine is built for if the target names nothing: Ampere and all that came after it."""
    return tuple(name for name in known_capabilities(trt) if name not in NOT_BY_DEFAULT)


def build_engine(
    trt: Any,
    model: Path,
    engine: Path,
    batches: Mapping[str, BatchProfile],
    capabilities: Sequence[str] = (),
) -> None:
    """Compile the ONNX file `model` into the file `engine`.

    Args:
        trt: the flavour's module.
        model: an ONNX model whose only dynamic dimensions are the first ones of inputs.
        engine: the file to write.
        batches: by the name of an input whose first dimension is dynamic, its range.
        capabilities: names such as `sm86` to build for; empty for the GPU that is present.

    Raises:
        BackendError: the parser or the builder refuses the model; the message says what it said.
    """
    log = message_log(trt)
    builder = trt.Builder(log.ilogger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.ilogger)
    _parse(parser, model, log)
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    # A float32 engine has to agree with the model; TF32 keeps 10 bits of the mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    # For the summary of the engine's layers.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_capabilities(trt, config, capabilities)
    _add_batch_profile(builder, config, network, batches)
    log.clear()
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} cannot build an engine of `{model}`: {log.last_error}",
            hint="try `fp16`, or leave out the compute capability that the message names",
        )
    engine.write_bytes(serialized)


def _parse(parser: Any, model: Path, log: MessageLog) -> None:
    log.clear()
    if parser.parse_from_file(str(model)):
        return
    errors = [_describe(parser.get_error(i)) for i in range(parser.num_errors)] or [log.last_error]
    raise BackendError(
        f"the ONNX parser cannot take `{model}`:\n" + "\n".join(f"  {error}" for error in errors),
        hint="TensorRT has no form of these operators: rewrite them in the model, or use `--target ort`",
    )


def _describe(error: Any) -> str:
    """Return `node `name` (Operator): what is wrong`; an error of the whole file has no node."""
    where = f"node `{error.node_name()}` ({error.node_operator()}): " if error.node_operator() else ""
    return f"{where}{error.desc()}"


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[name.upper()], index):
            raise BackendError(
                f"{trt.__name__} {trt.__version__} does not build for `{name}` together with the others",
                hint=f"build for one of {', '.join(capabilities)} at a time",
            )


def _add_batch_profile(builder: Any, config: Any, network: Any, batches: Mapping[str, BatchProfile]) -> None:
    """Give every input with a dynamic batch its range."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = {x.name: tuple(x.shape) for x in inputs if -1 in tuple(x.shape)}
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shape in dynamic.items():
        rest = shape[1:]
        if -1 in rest:
            raise BackendError(
                f"input `{name}` has shape {shape}: only the batch may be dynamic for TensorRT",
                hint="give example inputs of the size that the engine is for",
            )
        batch = batches[name]
        profile.set_shape(name, (batch.smallest, *rest), (batch.typical, *rest), (batch.largest, *rest))
    config.add_optimization_profile(profile)
