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

TOLERANCE_FP32 = 1e-4
METRIC_TOLERANCE = 2e-3


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
    """Compare a metric of two programs on evaluation data; a few samples on the edge may fall either way.

    Raises:
        VerificationError: they differ by more than 0.2 % of the metric.
    """
    error = abs(reference - value)
    relative = error / abs(reference) if reference else error
    check = Check(
        step=step,
        max_abs_error=error,
        max_rel_error=relative,
        tolerance=METRIC_TOLERANCE,
        passed=relative <= METRIC_TOLERANCE,
    )
    if not check.passed:
        raise VerificationError(f"check `{step}` failed: the metric was {reference:.4f}, now {value:.4f}")
    return check


class RunnerModule(nn.Module):
    """A loaded artifact as a module, so that the user's `evaluate` can run it.

    Batches larger than the artifact takes are run in pieces; where its batch is fixed, the last piece is filled up.
    """

    def __init__(self, runner: Runner, artifact: Artifact, out_spec: pytree.TreeSpec) -> None:
        super().__init__()
        self._runner, self._artifact, self._out_spec = runner, artifact, out_spec
        # Empty: for an `evaluate` that asks `next(model.parameters())` for the device.
        self.device_of_inputs = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *inputs: Any) -> Any:
        """Run on the user's inputs and return what the model would."""
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        size = self._artifact.max_batch
        outputs = self._runner(*leaves) if size is None else self._in_pieces(leaves, size)
        return pytree.tree_unflatten(outputs, self._out_spec)

    def _in_pieces(self, leaves: list[Tensor], size: int) -> list[Tensor]:
        pieces = []
        for start in range(0, leaves[0].shape[0], size):
            part = [x[start : start + size] for x in leaves]
            real = part[0].shape[0]
            if real < size and not self._artifact.dynamic_batch:
                part = [torch.cat([x, x[-1:].expand(size - real, *x.shape[1:])]) for x in part]
            pieces.append([y[:real] for y in self._runner(*part)])
        return [torch.cat(columns) for columns in zip(*pieces, strict=True)]
