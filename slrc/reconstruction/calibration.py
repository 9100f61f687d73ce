"""The calibration inputs: the arguments of some calls of the model, from the workload's own data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slrc.errors import WorkloadError
from slrc.ir.program import Program
from slrc.training.batches import seed_epoch
from slrc.training.steps import call_loss
from slrc.workload import Workload, read

CHUNK = 32
"""Samples that go through the network at once, where the batch is dynamic: what is computed between layers lives for
one chunk at a time."""
Inputs = list[Tensor]
"""The tensors of one call, in the order of the graph's inputs."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


def calibration_inputs(program: Program, workload: Workload, images: int, seed: int) -> list[Inputs]:
    """Return the tensors of calls that hold `images` samples together, or as many as the data has.

    They come from `Workload.calibration`, else from the training batches: the workload's own `loss` says what the model
    is given, and is stopped there.

    Raises:
        WorkloadError: there is no data, it does not fit the model, or holds values that are not finite.
    """
    if workload.calibration is not None:
        field, batches = "calibration", workload.calibration
        calls: Iterator[Call] = (_as_call(batch) for batch in read(batches, field))
    elif workload.train_batches is not None:
        field, batches = "train_batches", workload.train_batches
        calls = _captured(workload, batches)
    else:
        raise WorkloadError(
            "method `reconstruct` needs calibration data, and the workload has none",
            hint="give `Workload(calibration=...)` batches of a few hundred inputs, without labels",
        )
    seed_epoch(batches, seed, "calibration", 0)
    chunks: list[Inputs] = []
    left = images
    for number, (args, kwargs) in enumerate(calls, start=1):
        tensors = _fitting(program, args, kwargs, f"batch {number} of `{field}`")
        whole = samples_of(program, tensors)
        taken = min(left, whole) if program.batch_is_dynamic else whole
        chunks += _chunks(program, tensors, taken)
        left -= taken
        if left <= 0:
            break
    if not chunks:
        raise WorkloadError(f"`{field}` yielded nothing", hint="check the data folder and the loader's batch size")
    return chunks


def _as_call(batch: Any) -> Call:
    return (batch if isinstance(batch, tuple) else (batch,)), {}


class _Captured(BaseException):
    """Ends a loss at the model's call; no `Exception`, so that no handler of the user's takes it for one."""


def _captured(workload: Workload, batches: Iterable[Any]) -> Iterator[Call]:
    """Yield the arguments with which the loss calls the model, one call for each batch."""
    seen: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Captured

    model = workload.model
    for batch in read(batches):
        handle = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                call_loss(workload, model, batch)
        except _Captured:
            pass
        finally:
            handle.remove()
        if not seen:
            raise WorkloadError(
                "`loss(model, batch)` does not call the model, so that its inputs are not known",
                hint="give `Workload(calibration=...)` batches of inputs",
            )
        yield seen.pop()


def _fitting(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Inputs:
    """Return the tensors of a call, on the CPU.

    Raises:
        WorkloadError: they are not of the example's kind, or not finite.
    """
    hint = "each batch is a tensor, or a tuple of the model's arguments like `Workload.example_inputs`"
    try:
        tensors = [x.detach().cpu() for x in program.flatten(args, kwargs)]
    except (TypeError, ValueError) as error:
        raise WorkloadError(f"{where} does not fit the model: {error}", hint=hint) from None
    expected = program.flat_inputs()
    if len(tensors) != len(expected):
        raise WorkloadError(f"{where} has {len(tensors)} tensors, the model takes {len(expected)}", hint=hint)
    for x, example, is_free in zip(tensors, expected, program.free_batches, strict=True):
        fixed = int(is_free)
        if x.dtype != example.dtype or x.dim() != example.dim() or x.shape[fixed:] != example.shape[fixed:]:
            raise WorkloadError(
                f"{where} does not fit the model: expected {example.dtype} of shape {tuple(example.shape)}, "
                f"got {x.dtype} of shape {tuple(x.shape)}",
                hint=hint,
            )
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise WorkloadError(f"{where} holds values that are not finite", hint="look for a division by zero in it")
    return tensors


def samples_of(program: Program, tensors: Inputs) -> int:
    """Return how many samples a call has."""
    sizes = {len(x) for x, is_free in zip(tensors, program.free_batches, strict=True) if is_free}
    return sizes.pop() if len(sizes) == 1 else program.batch


def _chunks(program: Program, tensors: Inputs, samples: int) -> list[Inputs]:
    """Cut a call in several of a few samples each, as far as the model's batch is free."""
    sizes = {len(x) for x, is_free in zip(tensors, program.free_batches, strict=True) if is_free}
    if len(sizes) != 1:
        return [tensors]
    spans = [slice(start, min(start + CHUNK, samples)) for start in range(0, samples, CHUNK)]
    free = program.free_batches
    return [[x[span] if is_free else x for x, is_free in zip(tensors, free, strict=True)] for span in spans]
