"""What training leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slrc.errors import OutputError
from slrc.methods.base import Iteration
from slrc.sparsity.masks import Masks
from slrc.sparsity.plans import Plan
from slrc.training.checkpoints import EpochRecord
from slrc.training.steps import StepCost

WEIGHTS = "weights.safetensors"
"""What training left, in an output folder: the model's own tensors by their names, pruned."""


MORE = 0.01
"""By so much more of the constrained weights may be zero in weights to start from before it is told."""


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    `tensors` are the model's parameters and buffers, hard-pruned; `plan` is what they obey, with its budget shared out
    as it was at last; `dense` and `hard_pruned` are the leading metric
    before the first step, and right after pruning with no retraining. `cost` is what steps took here: after a resumed
    run, those since; `None` if there were none. `undistilled` says why the dense network could not teach, and `notes`
    are for the report.
    """

    tensors: dict[str, Tensor]
    plan: Plan
    masks: Masks
    method: str
    dense: float | None
    hard_pruned: float | None
    curve: tuple[EpochRecord, ...]
    history: tuple[Iteration, ...]
    cost: StepCost | None = None
    undistilled: str = ""
    notes: tuple[str, ...] = ()


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what training left into an output folder."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read what training left in another compile's output.

    Args:
        folder: the output.
        model: whose tensors they must be, by name and shape.

    Raises:
        OutputError: there are none, or they are another model's.
    """
    path = folder / WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"`{path}` cannot be read: {error}", hint="give the folder that `slrc compile --out` of this model wrote"
        ) from None
    own = {n: t.shape for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    if differing := sorted(n for n in own.keys() | found.keys() if n not in found or found[n].shape != own.get(n)):
        raise OutputError(
            f"`{path}` is of another model: `{differing[0]}` differs",
            hint="give the output of a compile of this model, whatever its pattern and speed-up",
        )
    return found


def pruned_further(folder: Path, start: Mapping[str, Tensor], plan: Plan) -> str:
    """Return what is to be told where weights to start from are pruned more than a plan asks; else nothing.

    Args:
        folder: where they come from.
        start: the weights.
        plan: what is to be pruned.
    """
    names = {s.tensor for c in plan for s in c.members}
    zero = Masks({name: start[name] != 0 for name in names}).sparsity(plan)
    asked = Masks.project(plan, start).sparsity(plan)
    if zero <= asked + MORE:
        return ""
    return (
        f"in `{folder}` {zero:.1%} of the constrained weights are zero, and {asked:.1%} are asked for: channels that "
        "are gone stay zero, other weights may grow again; to keep more, start from less pruned or from dense weights"
    )
