"""What a layer is to be fitted to: its moments on the calibration data, gathered while both networks run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from slrc.errors import WorkloadError
from slrc.ir.nodes import argument, layer_weight, output_dim
from slrc.ir.program import Program
from slrc.reconstruction.clipping import SAMPLED_NUMBERS, SAMPLES_A_COLUMN, Clipped
from slrc.reconstruction.side_by_side import SideBySide
from slrc.reconstruction.solve import Damped, damp
from slrc.reconstruction.statistics import Moments, Sampler, Statistics
from slrc.reconstruction.surroundings import Surroundings, surroundings


def first_uses(program: Program) -> dict[int, Node]:
    """Return the layer that is the first to use each weight, by the identity of the weight, in order."""
    found: dict[int, Node] = {}
    for node in program.nodes:
        if (weight := layer_weight(node)) is not None:
            found.setdefault(id(program.tensors[weight]), node)
    return found


def operands(layer: Node) -> tuple[Node, Node]:
    """Return a layer's input and its weight."""
    source, weight = layer.args[:2]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    return source, weight


@dataclass(frozen=True)
class Observed:
    """A layer, its weight as it is `stored` in the dense network, and what its inputs and outputs were.

    `moments` are about the means; `None` where the layer was not observed, and `why_not` says why. Where an activation
    clips the result, `clipped` are samples.
    """

    layer: Node
    stored: Tensor
    around: Surroundings
    moments: Moments | None
    clipped: Clipped | None
    why_not: str
    num_samples: int

    @property
    def weight(self) -> Tensor:
        """The weight as `(out, in/groups, *kernel)`."""
        return _turned(self.layer, self.stored)

    def outputs_first(self, stored: Tensor) -> Tensor:
        """Return what is stored of the weight, such as a mask, as `(out, K)`."""
        return _turned(self.layer, stored).flatten(1)

    def as_stored(self, outputs_first: Tensor) -> Tensor:
        """Return weights or a mask `(out, K)` as the layer's weight is stored."""
        return _turned(self.layer, outputs_first.reshape(self.weight.shape))

    @property
    def seen(self) -> Moments:
        """The moments that the layer can be fitted to: about zero, where nothing takes on the means."""
        assert self.moments is not None
        return self.moments if self.around.takes_means else self.moments.about_zero()

    def damped(self, damping: float) -> Damped:
        """Return H and G with `damping` for each column that a layer has for one sample of the calibration data.

        The more columns, the less is known of each; positions of one image tell nearly the same.
        """
        weight = self.weight.flatten(1).double()
        return damp(self.seen, weight, damping * weight.shape[1] / self.num_samples)


def observe(
    both: SideBySide,
    number: int,
    positions: int,
    generator: torch.Generator,
    wanted: Callable[[Node], bool] = lambda layer: True,
) -> Observed:
    """Run a stretch of both networks; observe the layer at its end if it is wanted.

    Its inputs are those of the pruned network. Its outputs are those of the dense one, and make up for what is added to
    them and is another in the pruned network.

    Args:
        both: the networks.
        number: of the stretch.
        positions: how many of each image a layer sees.
        generator: draws the positions.
        wanted: whether to observe a layer; asked when all before it has been run.

    Raises:
        WorkloadError: inputs or outputs are not finite.
    """
    layer = both.stretches[number].layer
    source, node = operands(layer)
    stored = both.constant(node)
    weight = _turned(layer, stored)
    around = surroundings(layer, both)
    sample = Sampler(layer, tuple(weight.shape[2:]), positions)
    statistics, kept, why_not = Statistics(), _Kept(both.num_batches, generator), ""
    for batch in both.run(number):
        x, y = both.pruned(batch, source), both.dense(batch, layer)
        why_not = sample.why_not(weight, x) if wanted(layer) else "it is not wanted"
        if why_not:
            continue
        if (residual := around.residual(both, batch)) is not None:
            y = y + residual.to(y.dtype)
        if not around.takes_means and isinstance(fixed := argument(layer, 2, "bias"), Node):
            y = y - _along(both.current(fixed), weight)
        offset = _offset(around, both, batch, y, weight)
        beside = [y] if offset is None else [y, offset]
        inputs, found = sample(x, torch.cat(beside, dim=1 if weight.dim() > 2 else -1), generator)
        outputs = found[:, : len(weight)]
        statistics.add(inputs, outputs)
        if offset is not None:
            kept.add(inputs, outputs, found[:, len(weight) :])
    moments = None if why_not else statistics.moments()
    if moments is not None and not all(bool(part.isfinite().all()) for part in moments):
        raise WorkloadError(
            f"the inputs or outputs of `{node.target}` are not finite on the calibration data",
            hint="look for values that overflow in the model as it was given",
        )
    return Observed(layer, stored, around, moments, kept.clipped(around), why_not, both.num_samples)


def _turned(layer: Node, weight: Tensor) -> Tensor:
    """Return a layer's weight with its outputs first, or one with outputs first as it is stored."""
    return weight.transpose(0, output_dim(layer))


def _along(channels: Tensor, weight: Tensor) -> Tensor:
    """Return numbers of each output `(out,)` so that they broadcast to a layer's result."""
    return channels.reshape(-1, *[1] * (weight.dim() - 2))


def _offset(around: Surroundings, both: SideBySide, batch: int, outputs: Tensor, weight: Tensor) -> Tensor | None:
    """Return what is added to a layer's scaled output before it is clipped, of its shape; `None` if it is not."""
    if around.clip is None or (around.added is not None and not both.knows(around.added)):
        return None
    added = torch.zeros_like(outputs) if around.added is None else both.pruned(batch, around.added)
    return added if around.shift is None else added + _along(around.shift, weight).to(outputs.dtype)


class _Kept:
    """Some of a layer's samples, each with what is added to its output, as many from each of `batches`."""

    def __init__(self, batches: int, generator: torch.Generator) -> None:
        self._batches, self._generator = batches, generator
        self._samples: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, inputs: Tensor, outputs: Tensor, offset: Tensor) -> None:
        numbers = max(inputs[0].numel(), outputs.shape[1])
        most = max(SAMPLED_NUMBERS // numbers, SAMPLES_A_COLUMN * inputs.shape[2]) // self._batches + 1
        some = torch.randperm(len(inputs), generator=self._generator)[:most]
        self._samples.append((inputs[some].float(), outputs[some].float(), offset[some].float()))

    def clipped(self, around: Surroundings) -> Clipped | None:
        if not self._samples or around.clip is None:
            return None
        inputs, outputs, offset = (torch.cat(parts) for parts in zip(*self._samples, strict=True))
        scale = torch.ones(outputs.shape[1]) if around.scale is None else around.scale.float()
        by_column, scale = inputs.permute(1, 2, 0).contiguous(), scale.unsqueeze(1)
        return Clipped(by_column, outputs.T.contiguous(), offset.T.contiguous(), scale, *around.clip)
