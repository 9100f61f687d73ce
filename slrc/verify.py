"""The proof that each step computes the same as the user's model, on several inputs.

The reference is what the model computes in float64. A step may be off by what the model itself loses in float32, times
a small factor: a network that is badly conditioned is then no false alarm, and a step that is wrong is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slrc.errors import VerificationError
from slrc.ir.program import Program
from slrc.probes import Probe

FACTOR = 10.0
"""A step may lose so many times as much as the model itself does in float32: it sums in another order."""
TOLERANCE_EXACT = 1e-5
"""What a step may lose in any case, as a share of the largest value: some operators lose nothing on one input."""
TOLERANCE_FP32 = 1e-4
"""The same where the model does not run in float64, so that what it loses is not known."""
METRIC_TOLERANCE = 2e-3
SMALL_METRIC = 0.1
"""A smaller metric, as of a network that is hardly trained, may move by as much as this one."""
EDGE_SAMPLES = 2
"""So many samples may change sides in any case: of few, one is more than `METRIC_TOLERANCE`."""


class Check(BaseModel):
    """One step compared with the model on the inputs that are named.

    Errors are taken for each output on each input on its own, as the largest absolute difference over the largest
    reference value. `max_rel_error` is that of the output that is closest to its bound, and `tolerance` that bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    inputs: tuple[str, ...] = ()
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class _Reference:
    """What the model computes for one probe, and what it loses there in its own precision, for each output."""

    probe: Probe
    outputs: list[Tensor]
    losses: list[float]
    tolerance: float

    @staticmethod
    def of(module: nn.Module, probe: Probe) -> _Reference:
        own = outputs_of(module, probe.inputs)
        try:
            exact = outputs_of(copy.deepcopy(module).double(), pytree.tree_map(_in_float64, probe.inputs))
        except Exception:  # a `forward` that makes float32 tensors of its own, or an operator without float64
            return _Reference(probe, own, [0.0] * len(own), TOLERANCE_FP32)
        losses = [_error(a, b)[1] for a, b in zip(exact, own, strict=True)]
        return _Reference(probe, exact, losses, TOLERANCE_EXACT)


class Checker:
    """Compares programs and artifacts with the model that they are made of, and keeps what it found.

    Args:
        module: the user's model, on the CPU, with the weights that the steps start from.
        probes: the inputs to compare on; the first one is the example. A further one that the model cannot take, or
            for which it returns no finite number, is left out.
    """

    def __init__(self, module: nn.Module, probes: Sequence[Probe]) -> None:
        self.checks: list[Check] = []
        self._references = [_Reference.of(module, probes[0])]
        for probe in probes[1:]:
            try:
                reference = _Reference.of(module, probe)
            except Exception:
                continue
            if all(bool(t.isfinite().all()) for t in reference.outputs):
                self._references.append(reference)

    def __call__(self, step: str, run: Callable[..., Any], tolerance: float = 0.0) -> Check:
        """Compare what `run` returns for every probe with the model's outputs.

        Args:
            step: a name for the report and for errors.
            run: called like the model.
            tolerance: what it may lose in any case, for an engine in another precision.

        Raises:
            VerificationError: outputs differ in number, in shape, or by more than they may.
        """
        found = [
            _compare(step, r.outputs, outputs_of(run, r.probe.inputs), r.losses, max(tolerance, r.tolerance))
            for r in self._references
        ]
        worst = max(found, key=lambda c: _share(c.max_rel_error, c.tolerance))
        names, absolute = tuple(r.probe.name for r in self._references), max(c.max_abs_error for c in found)
        check = worst.model_copy(update={"inputs": names, "max_abs_error": absolute})
        self.checks.append(check)
        return check

    def program(self, transform: str, program: Program) -> None:
        """Compare the program that a transform made."""
        self(f"masked module = {transform}", program.module())

    @property
    def probes(self) -> list[Probe]:
        """The inputs that are compared on."""
        return [r.probe for r in self._references]

    @property
    def largest_loss(self) -> float:
        """The largest share of an output that the model itself loses in its own precision."""
        return max((loss for r in self._references for loss in r.losses), default=0.0)


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
    return _compare(step, reference, outputs, [0.0] * len(reference), tolerance)


def _compare(
    step: str, reference: Sequence[Tensor], outputs: Sequence[Tensor], losses: Sequence[float], tolerance: float
) -> Check:
    shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in outputs]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"check `{step}` failed: expected outputs of shapes {shapes[0]}, got {shapes[1]}")
    errors = [_error(a, b) for a, b in zip(reference, outputs, strict=True)]
    bounds = [max(tolerance, FACTOR * loss) for loss in losses]
    worst = max(range(len(errors)), key=lambda i: _share(errors[i][1], bounds[i]), default=None)
    relative, bound = (errors[worst][1], bounds[worst]) if worst is not None else (0.0, tolerance)
    check = Check(
        step=step,
        max_abs_error=max((absolute for absolute, _ in errors), default=0.0),
        max_rel_error=relative,
        tolerance=bound,
        passed=relative <= bound,
    )
    if not check.passed:
        raise VerificationError(
            f"check `{step}` failed: the outputs differ by {relative:.1e} of the largest value, tolerance {bound:.0e}",
            hint="this is a bug in slrc or in the runtime: please report it with the model; nothing was published",
        )
    return check


def _share(error: float, bound: float) -> float:
    return error / bound if bound else float("inf") if error else 0.0


def _error(reference: Tensor, output: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and the same as a share of the largest finite reference value."""
    a, b = reference.double(), output.double()
    if not a.numel():
        return 0.0, 0.0
    both_same = (a == b) | (a.isnan() & b.isnan())
    error = float(torch.where(both_same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf")).max())
    scale = float(a.nan_to_num(posinf=0, neginf=0).abs().max())
    return error, error / scale if scale else error


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def compare_metric(step: str, reference: float, value: float, samples: int | None = None) -> Check:
    """Compare a metric of two programs on evaluation data; of thousands of samples a few on the edge may differ.

    The relative error is a share of the metric, or of 0.1 if that is more. Where the metric is a share of so many
    `samples`, two of them may differ however few there are.

    Raises:
        VerificationError: it is more than 0.2 %, and more than two samples.
    """
    error = abs(reference - value)
    scale = max(abs(reference), SMALL_METRIC)
    tolerance, told = METRIC_TOLERANCE, ""
    hint = "the outputs agree on the example inputs: does `evaluate` use few samples, or random ones?"
    passed = error / scale <= tolerance
    if samples is not None:
        differ, may = round(error * samples), max(EDGE_SAMPLES, int(tolerance * scale * samples))
        tolerance = max(tolerance, EDGE_SAMPLES / samples / scale)
        passed = passed or differ <= EDGE_SAMPLES
        told = f": by {differ} of {samples:,} samples, and {may} may differ"
        hint = "the outputs agree on the example inputs: are `eval_batches` the same samples each time?"
    check = Check(
        step=step,
        inputs=("evaluation data",),
        max_abs_error=error,
        max_rel_error=error / scale,
        tolerance=tolerance,
        passed=passed,
    )
    if not check.passed:
        raise VerificationError(
            f"check `{step}` failed: the metric was {reference:.4f}, now {value:.4f}{told}", hint=hint
        )
    return check


def compare_rounded(step: str, reference: float, value: float, most: float | None) -> Check:
    """Compare the metric of a program with that of its rounded form. Both errors are what was lost; a gain is none.

    Raises:
        VerificationError: more than `most` is lost; `None` for any loss.
    """
    lost = max(0.0, reference - value)
    check = Check(
        step=step,
        inputs=("evaluation data",),
        max_abs_error=lost,
        max_rel_error=lost,
        tolerance=1.0 if most is None else most,
        passed=most is None or reference - value <= most,  # false too of what is not a number
    )
    if not check.passed:
        raise VerificationError(
            f"check `{step}` failed: the metric was {reference:.4f}, rounded {value:.4f}, and may lose {most}",
            hint="try `--qat-epochs 2`, leave layers in float with `--int8-skip NAME`, or allow more with `--max-drop`",
        )
    return check
