"""Distillation (Hinton et al., arXiv 1503.02531): the pruned network learns from the dense one's outputs too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss
from torch.utils import _pytree as pytree

from slrc.errors import SlrcError, WorkloadError
from slrc.options import RecipeSettings
from slrc.workload import Workload, cross_entropy, user_error

Distance = Callable[[Any, Any], Tensor]
"""How far a network's output is from the teacher's: a scalar."""


class Call(NamedTuple):
    """One call of the network, by the workload's loss."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class Teacher:
    """The dense network, frozen and in evaluation mode, which is shown what the trained one is shown.

    The workload's loss calls the network as it likes: its calls are watched, and the teacher answers the same ones. The
    loss becomes `(1 − weight) · loss + weight · distance`. The distance is that of the workload, if it gives one; for
    the default cross-entropy the divergence of the softened distributions times T², over dimension 1; else the mean
    squared error of the raw outputs. What is compared is what the network returns in training and in evaluation alike,
    see `common_outputs`.

    Args:
        model: a copy of the dense network, for the teacher alone.
        workload: whose loss and distance.
        settings: weight and temperature.
    """

    def __init__(self, model: nn.Module, workload: Workload, settings: RecipeSettings) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weight = settings.distill_weight
        self.distance = _distance(workload, settings.temperature)
        self.own_distance = workload.distill is not None
        self.unfit: str | None = None
        """Why outputs cannot be compared, once the first ones were seen; empty if they can."""

    @contextmanager
    def watch(self, student: nn.Module) -> Iterator[list[Call]]:
        """Yield a list that fills with the calls of `student` meanwhile."""
        calls: list[Call] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(Call(args, kwargs, output))

        handle = student.register_forward_hook(keep, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    @property
    def num_bytes(self) -> int:
        """The memory that the teacher takes."""
        state = self.model.state_dict().values()
        return sum(t.numel() * t.element_size() for t in state if isinstance(t, Tensor))

    def _why_not(self, calls: list[Call], answers: list[Any]) -> str:
        if not calls:
            return "the loss does not call the model itself"
        if self.own_distance:
            return ""
        for call, answer in zip(calls, answers, strict=True):
            try:
                pairs = common_outputs(call.output, answer)
            except WorkloadError as error:
                return error.message
            if not any(ours.requires_grad for ours, _ in pairs):
                return "the model's outputs have no gradient"
        return ""

    def blend(self, loss: Tensor, calls: list[Call]) -> Tensor:
        """Return the loss with the mean distance of the calls blended in; the loss alone if outputs do not compare.

        Raises:
            WorkloadError: the workload's distance failed, or is not a scalar.
        """
        if self.unfit:
            return loss
        with torch.no_grad():
            answers = [self.model(*call.args, **call.kwargs) for call in calls]
        if self.unfit is None:
            self.unfit = self._why_not(calls, answers)
            if self.unfit:
                return loss
        distances = []
        for call, answer in zip(calls, answers, strict=True):
            try:
                distance = self.distance(call.output, answer)
            except SlrcError:
                raise
            except Exception as error:
                raise user_error("`distill(output, teacher_output)`", error) from error
            if not isinstance(distance, Tensor) or distance.numel() != 1:
                raise WorkloadError("`distill(output, teacher_output)` must return a scalar tensor")
            distances.append(distance.reshape(()))
        return (1.0 - self.weight) * loss + self.weight * torch.stack(distances).mean()


def soft_divergence(output: Any, teacher_output: Any, temperature: float = 2.0) -> Tensor:
    """Return T² times the divergence of the softened distributions over dimension 1, averaged over all others.

    Args:
        output: logits `(n, classes, …)`, or a container of such; several count alike.
        teacher_output: the teacher's, of the same shapes.
        temperature: T, by which logits are divided.

    Raises:
        WorkloadError: see `common_outputs`.
    """
    divergences = []
    for ours, theirs in common_outputs(output, teacher_output):
        log_ours = log_softmax(ours.float() / temperature, dim=1)
        log_theirs = log_softmax(theirs.float() / temperature, dim=1)
        divergences.append(kl_div(log_ours, log_theirs, reduction="none", log_target=True).sum(dim=1).mean())
    return temperature**2 * torch.stack(divergences).mean()


def output_error(output: Any, teacher_output: Any) -> Tensor:
    """Return the mean squared error of the floating-point tensors that two outputs have in common, averaged.

    Raises:
        WorkloadError: see `common_outputs`.
    """
    pairs = common_outputs(output, teacher_output)
    return torch.stack([mse_loss(a.float(), b.float()) for a, b in pairs]).mean()


def common_outputs(output: Any, teacher_output: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the floating-point tensors of an output in training, each with that of an output in evaluation mode.

    Dicts are compared by the keys that both have, tuples and lists place by place up to the shorter one's end. Where
    one is a tensor and the other a tuple, list or dict, that one's first entry counts: auxiliary outputs come after it.

    Raises:
        WorkloadError: nothing is in common, or tensors differ in shape.
    """
    pairs = list(_pairs(output, teacher_output))
    if not pairs or any(ours.shape != theirs.shape for ours, theirs in pairs):
        raise WorkloadError(
            "the model returns something else in training than in evaluation mode",
            hint="give `Workload(distill=...)` a function that takes from both what can be compared",
        )
    return pairs


def _pairs(ours: Any, theirs: Any) -> Iterator[tuple[Tensor, Tensor]]:
    (our_leaves, shape), (their_leaves, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    if shape == other:
        for a, b in zip(our_leaves, their_leaves, strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and b.is_floating_point():
                yield a, b
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [key for key in ours if key in theirs]:
            yield from _pairs(ours[key], theirs[key])
    elif isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        for a, b in zip(ours, theirs, strict=False):
            yield from _pairs(a, b)
    elif (isinstance(ours, Tensor) or isinstance(theirs, Tensor)) and our_leaves and their_leaves:
        yield from _pairs(our_leaves[0], their_leaves[0])


def returns_logits(workload: Workload) -> bool | None:
    """Tell whether outputs are logits over dimension 1, by a workload's distance or loss; `None` if it does not say."""
    if workload.distill is not None:
        return workload.distill is soft_divergence
    return True if workload.loss is cross_entropy else None


def _distance(workload: Workload, temperature: float) -> Distance:
    if workload.distill is not None:
        return workload.distill
    if returns_logits(workload):
        return lambda ours, theirs: soft_divergence(ours, theirs, temperature)
    return output_error
