"""`Workload`: what the user gives."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slrc.errors import SlrcError, WorkloadError
from slrc.user_code import at, calling_line, first_line, lines_in, lines_of, users_line

Metrics = Mapping[str, float]
Sums = Mapping[str, tuple[float, float]]
"""By a metric's name, its sum over the samples of a batch, and how many samples that are."""


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of a batch `(x, y)`: inputs `(n, …)`, class indices `(n,)`.

    Raises:
        WorkloadError: the batch is not a pair, or the model does not return a tensor of logits of two classes or more.
    """
    logits, labels = _classified(model, batch, "loss", "`loss(model, batch) -> scalar tensor`")
    if logits.dim() > 1 and logits.shape[1] == 1:
        raise WorkloadError(
            f"the default loss is the cross-entropy of two classes or more, and the model returns one: "
            f"{tuple(logits.shape)}",
            hint="give a loss of your own: `Workload(loss=...)`, `loss(model, batch) -> scalar tensor`",
        )
    return nn.functional.cross_entropy(logits, labels)


def accuracy(model: nn.Module, batch: Any) -> Sums:
    """Return `{"accuracy": (right, labels)}` of a batch `(x, y)`: logits `(n, classes, …)`, class indices `(n, …)`.

    Raises:
        WorkloadError: the batch is not a pair, or the model does not return a tensor of logits.
    """
    logits, labels = _classified(model, batch, "evaluate_batch", '`evaluate_batch(model, batch) -> {"metric": (…, …)}`')
    return {"accuracy": (int((logits.argmax(1) == labels).sum()), labels.numel())}


class BatchMetric(NamedTuple):
    """The leading metric of a batch: its sum over what it is the mean of, and how much that is."""

    name: str
    total: float
    weight: float

    @property
    def counts_wholes(self) -> bool:
        """Whether the sum may be a number of samples, as of those that are right."""
        return self.total.is_integer() and self.weight.is_integer() and 0 <= self.total <= self.weight


class Measurement(NamedTuple):
    """A metric; where it is the share of samples that are right, or have some other property, of how many."""

    name: str
    value: float
    samples: int | None = None


def mean(parts: Iterable[BatchMetric]) -> Measurement:
    """Return a metric's mean over batches, the same in whatever order they come.

    Raises:
        WorkloadError: there are none, they have different names, or their counts come to nothing.
    """
    found = list(parts)
    names = list(dict.fromkeys(part.name for part in found))
    total, count = _exact_sum(part.total for part in found), _exact_sum(part.weight for part in found)
    if len(names) > 1:
        raise WorkloadError(f"`evaluate_batch` returned `{names[0]}` first for one batch, `{names[1]}` for another")
    if not count > 0:
        raise WorkloadError(
            f"`eval_batches` hold nothing to evaluate: {len(found)} batches, a count of {count:g}",
            hint="give an iterable that starts anew each time and is not empty, such as a DataLoader",
        )
    are_wholes = all(part.counts_wholes for part in found)
    return Measurement(names[0], total / count, int(count) if are_wholes else None)


@dataclass
class Workload:
    """A model and what belongs to it.

    Args:
        model: the module to compile; training changes it in place.
        example_inputs: a tuple of inputs for one call of the model, used for capture, proof and timing.
        train_batches: an iterable that can be read again and again, such as a `DataLoader`; `None` without data.
        loss: `loss(model, batch)` returns a scalar; cross-entropy of `(x, y)` unless given.
        eval_batches: what the model is evaluated on, an iterable like `train_batches`. Several processes share the
            batches out, and each batch counts once. `None` without data.
        evaluate_batch: `evaluate_batch(model, batch)` returns `{"metric": (sum, count)}`, the first one leading: the
            metric is the sum over all batches by the count over all of them. It calls the model equally often for each
            batch, which is on the model's device. The accuracy of `(x, y)` unless given.
        evaluate: `evaluate(model)` returns `{"metric": value}`, the first one leading, for metrics that are no means;
            each of several processes then evaluates everything. In place of `eval_batches`.
        optimizer: makes the optimiser from the trainable parameters; the recipe's SGD unless given.
        scheduler: makes the learning-rate schedule from the optimiser and the number of steps; unless given, the
            recipe's, which has the optimiser's own learning rate as its highest.
        distill: `distill(output, teacher_output)` returns a scalar: how far the model's output in training is from that
            of the dense model in evaluation mode. For the default loss the divergence of their softened
            distributions, for another one the mean squared error unless given.
        calibration: inputs for a method that needs no labels, an iterable that can be read again and again: each batch
            a tensor, or a tuple of the model's arguments; the inputs of the training batches unless given.
        name: how reports call the model.
    """

    model: nn.Module
    example_inputs: tuple[Any, ...]
    train_batches: Iterable[Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy
    eval_batches: Iterable[Any] | None = None
    evaluate_batch: Callable[[nn.Module, Any], Sums] = accuracy
    evaluate: Callable[[nn.Module], Metrics] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None
    distill: Callable[[Any, Any], Tensor] | None = None
    calibration: Iterable[Any] | None = None
    name: str = "model"
    warnings: list[str] = field(default_factory=list)
    where: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        self.where = at(calling_line())
        if not isinstance(self.model, nn.Module):
            raise WorkloadError(f"`Workload.model` must be a torch.nn.Module, got {described(self.model)}")
        if isinstance(self.example_inputs, Tensor):
            raise WorkloadError(
                "`Workload.example_inputs` must be a tuple of inputs, got a tensor",
                hint="write `example_inputs=(x,)`",
            )
        if not isinstance(self.example_inputs, tuple) or not self.example_inputs:
            raise WorkloadError(
                f"`Workload.example_inputs` must be a tuple of inputs, got {described(self.example_inputs)}"
            )
        _check_batches("train_batches", self.train_batches)
        _check_batches("calibration", self.calibration)
        _check_batches("eval_batches", self.eval_batches)
        if self.evaluate is not None and self.eval_batches is not None:
            raise WorkloadError(
                "`Workload.evaluate` and `Workload.eval_batches` exclude each other: both say how to evaluate",
                hint="give `eval_batches` and `evaluate_batch` for a mean over samples, `evaluate` for anything else",
            )
        if self.eval_batches is None and self.evaluate_batch is not accuracy:
            raise WorkloadError("`Workload.evaluate_batch` needs `eval_batches`", hint="`eval_batches=DataLoader(…)`")

    @property
    def is_evaluated(self) -> bool:
        """Whether a metric can be measured."""
        return self.evaluate is not None or self.eval_batches is not None

    def measure(self, model: nn.Module) -> tuple[str, float] | None:
        """Return the leading metric's name and value for a model in evaluation mode; `None` if there is no data for it.

        Raises:
            WorkloadError: `evaluate` failed or did not return `{"metric": value}`, or `evaluate_batch` accordingly.
        """
        found = self.measure_counted(model)
        return None if found is None else (found.name, found.value)

    def measure_counted(self, model: nn.Module) -> Measurement | None:
        """As `measure`, with the number of samples where they count as wholes; what `evaluate` uses is not known."""
        if self.eval_batches is not None:
            with evaluating(model):
                return mean(self.measure_batch(model, batch) for batch in read(self.eval_batches, "eval_batches"))
        if self.evaluate is None:
            return None
        try:
            with evaluating(model):
                metrics = self.evaluate(model)
        except SlrcError:
            raise
        except Exception as error:
            raise user_error("`evaluate`", error) from error
        if not isinstance(metrics, Mapping) or not metrics:
            raise WorkloadError(
                f'`evaluate` must return {{"metric": value}}, got {described(metrics)}',
                hint='for example `return {"accuracy": correct / total}`',
            )
        name, value = next(iter(metrics.items()))
        try:
            return Measurement(str(name), float(value))
        except (TypeError, ValueError, RuntimeError):
            raise WorkloadError(
                f"`evaluate` must return numbers, got {described(value)} for `{name}`",
                hint='for example `return {"accuracy": correct / total}`',
            ) from None

    def measure_batch(self, model: nn.Module, batch: Any) -> BatchMetric:
        """Return the leading metric of one of `eval_batches`.

        Raises:
            WorkloadError: `evaluate_batch` failed or did not return `{"metric": (sum, count)}`.
        """
        parameter = next(model.parameters(), None)
        try:
            found = self.evaluate_batch(model, batch if parameter is None else send_to_device(batch, parameter.device))
        except SlrcError:
            raise
        except Exception as error:
            raise user_error("`evaluate_batch`", error) from error
        try:
            name, (total, count) = next(iter(found.items()))
            return BatchMetric(str(name), float(total), float(count))
        except (AttributeError, StopIteration, TypeError, ValueError, RuntimeError):
            raise WorkloadError(
                f'`evaluate_batch` must return {{"metric": (sum, count)}}, got {found!r:.80}',
                hint='for example `return {"accuracy": (correct, len(y))}`',
            ) from None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients, and back in its own mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def cached_weights(model: nn.Module, path: str | Path, train: Callable[[nn.Module], None]) -> nn.Module:
    """Load a model's trained weights from `path`, or train it once and save them there.

    The file appears whole or not at all, so that an interrupted training leaves nothing behind.
    """
    path = Path(path).expanduser()
    if not path.exists():
        train(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_model(model, str(aside))
        aside.replace(path)
    load_model(model, str(path))
    return model


def read(batches: Iterable[Any], field: str = "train_batches") -> Iterator[Any]:
    """Yield a workload's batches; what the user's loader raises becomes an error that names the user's line."""
    try:
        yield from batches
    except (SlrcError, GeneratorExit):
        raise
    except Exception as error:
        raise user_error(f"reading `{field}`", error) from error


def user_error(what: str, error: Exception) -> WorkloadError:
    """Return an error that names the user's own line that raised."""
    lines, said, kind = lines_of(error), str(error).strip(), type(error).__name__
    first = first_line(error)
    if said.startswith(f"Caught {kind} in "):  # a DataLoader's worker sends its trace as text
        lines += lines_in(said)
        first = f"{kind}: {said.splitlines()[-1].removeprefix(f'{kind}: ')}"
    return WorkloadError(f"{what} failed{at(users_line(lines))}: {first}", hint="`--debug` shows the whole trace")


def _classified(model: nn.Module, batch: Any, field: str, wanted: str) -> tuple[Tensor, Tensor]:
    """Return a classifier's logits for a batch, and the labels."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise WorkloadError(
            f"the default `{field}` needs batches `(x, y)`, got {described(batch)}",
            hint=f"give `Workload({field}=...)` a function {wanted}",
        )
    logits = model(batch[0])
    if not isinstance(logits, Tensor):
        raise WorkloadError(
            f"the default `{field}` needs a model that returns logits, got {described(logits)}",
            hint=f"give `Workload({field}=...)` a function that takes what it needs from the model's output",
        )
    return logits, batch[1]


def _exact_sum(values: Iterable[float]) -> float:
    """Sum without rounding on the way, so that the order makes no difference."""
    found = list(values)
    return math.fsum(found) if all(map(math.isfinite, found)) else sum(found)


def _check_batches(field: str, batches: Any) -> None:
    if batches is not None and not isinstance(batches, Iterable):
        raise WorkloadError(f"`Workload.{field}` must be iterable, got {described(batches)}")
    if isinstance(batches, Tensor):
        raise WorkloadError(
            f"`Workload.{field}` must be an iterable of batches, got a tensor", hint=f"write `{field}=x.split(32)`"
        )
    if isinstance(batches, Iterator):
        raise WorkloadError(
            f"`Workload.{field}` can be read only once: every epoch after the first would be empty",
            hint="give a DataLoader, a list, or an object whose `__iter__` starts anew",
        )


def described(value: Any) -> str:
    """Return what a value of the user's is, for an error."""
    if isinstance(value, Mapping):
        return f"a dict with keys {', '.join(map(repr, list(value)[:4]))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
