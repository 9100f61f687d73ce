"""The proof that each step computes the same as the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slrc.backends import Artifact, Runner
from slrc.errors import VerificationError
from slrc.ir.program import Program

TOLERANCE_FP32 = 1e-4
METRIC_TOLERANCE = 2e-3
ROUNDING = 1e-6


class Check(BaseModel):
    """One comparison. `max_rel_error` is the largest absolute difference over the largest reference value.

    Errors are taken for each output on its own; the worst output counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    passed: bool


def outputs_of(module: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return the flattened tensor outputs of a module in evaluation mode, on the CPU, without a gradient."""
    if isinstance(module, nn.Module):
        module.eval()
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(*inputs))
    return [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def compare(step: str, reference: Sequence[Tensor], outputs: Sequence[Tensor], tolerance: float) -> Check:
    """Compare two lists of outputs.

    Raises:
        VerificationError: they differ in number, shape, or by more than `tolerance`.
    """
    shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in outputs]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"check `{step}` failed: expected outputs of shapes {shapes[0]}, got {shapes[1]}")
    worst_abs = worst_rel = 0.0
    for a, b in zip(reference, outputs, strict=True):
        a, b = a.double(), b.double()
        if not a.numel():
            continue
        both_same = (a == b) | (a.isnan() & b.isnan())
        error = float(torch.where(both_same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf")).max())
        scale = float(a.nan_to_num(posinf=0, neginf=0).abs().max())
        worst_abs = max(worst_abs, error)
        worst_rel = max(worst_rel, error / scale if scale else error)
    check = Check(
        step=step,
        max_abs_error=worst_abs,
        max_rel_error=worst_rel,
        tolerance=tolerance,
        passed=worst_rel <= tolerance,
    )
    if not check.passed:
        raise VerificationError(
            f"check `{step}` failed: the outputs differ by {worst_rel:.1e} of the largest value, "
            f"tolerance {tolerance:.0e}",
            hint="this is a bug in slrc or in the runtime: please report it with the model; nothing was published",
        )
    return check


def compare_metric(step: str, reference: float, value: float) -> Check:
    """Compare a metric of two programs on evaluation data; of thousands of samples a few on the edge may differ.

    Raises:
        VerificationError: they differ by more than 0.2 % of the metric, and by more than rounding, 1e-6.
    """
    error = abs(reference - value)
    relative = error / abs(reference) if reference else error
    check = Check(
        step=step,
        max_abs_error=error,
        max_rel_error=relative,
        tolerance=METRIC_TOLERANCE,
        passed=relative <= METRIC_TOLERANCE or error <= ROUNDING,
    )
    if not check.passed:
        raise VerificationError(
            f"check `{step}` failed: the metric was {reference:.4f}, now {value:.4f}",
            hint="the outputs agree on the example inputs: does `evaluate` use few samples, or random ones?",
        )
    return check


class RunnerModule(nn.Module):
    """A loaded artifact as a module, so that the user's `evaluate` can run it.

    Batches larger than the artifact takes are run in pieces; where its batch is fixed, the last piece is filled up.
    Inputs that are of the example's size in every call, such as a graph's adjacency, go to each piece whole.
    """

    def __init__(self, runner: Runner, artifact: Artifact, program: Program) -> None:
        super().__init__()
        self._runner, self._artifact, self._program = runner, artifact, program
        self._sizes = [x.shape[0] if x.dim() else 0 for x in program.flat_inputs()]
        # Empty: for an `evaluate` that asks `next(model.parameters())` for the device.
        self.device_of_inputs = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the user's inputs and return what the model would."""
        leaves = self._program.flatten(args, kwargs)
        varying = [i for i, x in enumerate(leaves) if x.dim() and x.shape[0] != self._sizes[i]]
        most = self._artifact.max_batch
        if most is None or not varying:
            outputs = self._runner(*leaves)
        else:
            size = most if self._artifact.dynamic_batch else self._sizes[varying[0]]
            outputs = self._in_pieces(leaves, frozenset(varying), size)
        return self._program.unflatten(outputs)

    def _in_pieces(self, leaves: list[Tensor], varying: frozenset[int], size: int) -> list[Tensor]:
        def piece(x: Tensor, start: int) -> Tensor:
            part = x[start : start + size]
            missing = 0 if self._artifact.dynamic_batch else size - len(part)
            return torch.cat([part, part[-1:].expand(missing, *x.shape[1:])]) if missing else part

        count, pieces = max(len(leaves[i]) for i in varying), []
        for start in range(0, count, size):
            parts = [piece(x, start) if i in varying else x for i, x in enumerate(leaves)]
            pieces.append([y[: count - start] for y in self._runner(*parts)])
        return [torch.cat(columns) for columns in zip(*pieces, strict=True)]
