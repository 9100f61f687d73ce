"""What a refit needs of a layer: second moments of its inputs, and with its outputs in the dense network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from slrc.ir.nodes import CONVOLUTIONS, TRANSPOSED, argument, conv_groups, is_transposed, op_name


class Moments(NamedTuple):
    """Means over samples, with `K = in/groups · kernel` columns and `g` convolution groups.

    `hessian` `(g, K, K)` is the covariance of the inputs, `cross` `(out, K)` that of outputs and inputs, `inputs`
    `(g, K)` and `outputs` `(out,)` are the means, `energy` `(out,)` the variance of the outputs.
    """

    hessian: Tensor
    cross: Tensor
    inputs: Tensor
    outputs: Tensor
    energy: Tensor

    def about_zero(self) -> Moments:
        """Return the second moments about zero, for a layer that cannot take on means."""
        means = self.inputs.unsqueeze(2) * self.inputs.unsqueeze(1)
        spread = self.inputs.repeat_interleave(len(self.outputs) // len(self.inputs), dim=0)
        return Moments(
            self.hessian + means,
            self.cross + self.outputs.unsqueeze(1) * spread,
            torch.zeros_like(self.inputs),
            torch.zeros_like(self.outputs),
            self.energy + self.outputs.square(),
        )


class Statistics:
    """Adds up moments in float64, about the first samples' means, so that no large mean drowns them."""

    def __init__(self) -> None:
        self.samples = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in samples: `(samples, g, K)` and `(samples, out)`; half precision is summed in float32."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        inputs, outputs = inputs.to(dtype), outputs.to(dtype)
        if not self.samples:
            self._inputs_about, self._outputs_about = inputs.mean(dim=0), outputs.mean(dim=0)
            (groups, columns), out = inputs.shape[1:], outputs.shape[1]
            self._hessian = torch.zeros(groups, columns, columns, dtype=torch.float64)
            self._cross = torch.zeros(groups, out // groups, columns, dtype=torch.float64)
            self._inputs = torch.zeros(groups, columns, dtype=torch.float64)
            self._outputs = torch.zeros(out, dtype=torch.float64)
            self._energy = torch.zeros(out, dtype=torch.float64)
        x = (inputs - self._inputs_about).permute(1, 2, 0).contiguous()  # depthwise products are slow on strides
        y = (outputs - self._outputs_about).T.contiguous()
        self._hessian += x @ x.transpose(1, 2)
        self._cross += y.reshape(len(x), -1, y.shape[1]) @ x.transpose(1, 2)
        self._inputs += x.sum(dim=2)
        self._outputs += y.sum(dim=1)
        self._energy += y.square().sum(dim=1)
        self.samples += y.shape[1]

    def moments(self) -> Moments:
        """Return the moments about the means; the sums are used up."""
        inputs, outputs = self._inputs / self.samples, self._outputs / self.samples
        hessian = self._hessian.div_(self.samples).sub_(inputs.unsqueeze(2) * inputs.unsqueeze(1))
        by_group = outputs.reshape(len(inputs), -1, 1)
        cross = self._cross.div_(self.samples).sub_(by_group * inputs.unsqueeze(1)).flatten(0, 1)
        energy = self._energy.div_(self.samples).sub_(outputs.square())
        return Moments(hessian, cross, inputs + self._inputs_about, outputs + self._outputs_about, energy)


@dataclass(frozen=True)
class Sampler:
    """Takes samples of a layer's inputs and outputs: patches of a convolution, rows of a linear layer.

    A patch of a transposed convolution has a zero for each tap that meets no input at that place of the output.

    Args:
        node: the layer; see `why_not`.
        kernel: the sizes of a convolution's kernel.
        positions: how many of each image are taken, at random, where there are more.
    """

    node: Node
    kernel: tuple[int, ...]
    positions: int

    def why_not(self, weight: Tensor, inputs: Tensor) -> str:
        """Return why a layer's inputs cannot be unfolded; empty if they can."""
        if is_transposed(self.node) and conv_groups(self.node) > 1:
            return "it is a transposed convolution in groups"
        if self._is_convolution and inputs.dim() != weight.dim():
            return "its input has no batch"
        return "" if weight.is_floating_point() else "its weights are not real numbers"

    @property
    def _is_convolution(self) -> bool:
        return op_name(self.node) in CONVOLUTIONS or is_transposed(self.node)

    def __call__(self, inputs: Tensor, outputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return samples of the inputs `(samples, g, K)` and of the outputs `(samples, out)`."""
        if self._is_convolution:
            return self._patches(inputs, outputs, generator)
        x, y = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
        most = self.positions * (len(inputs) if inputs.dim() > 1 else 1)
        if len(x) > most:
            some = torch.randperm(len(x), generator=generator)[:most]
            x, y = x[some], y[some]
        return x.unsqueeze(1), y

    def _patches(self, inputs: Tensor, outputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, sizes = len(inputs), outputs.shape[2:]
        total = math.prod(sizes)
        places = torch.arange(total).expand(images, total)
        if total > self.positions:
            drawn = torch.rand(images, total, generator=generator)
            places = drawn.topk(self.positions, dim=1).indices
        image = torch.arange(images)
        y = outputs.flatten(2)[image.unsqueeze(1), :, places].flatten(0, 1)
        dims = len(self.kernel)
        index: list[Any] = [image.reshape(-1, *[1] * (dims + 1)), slice(None)]
        for d, (place, size) in enumerate(zip(torch.unravel_index(places, sizes), self.kernel, strict=True)):
            taps = torch.arange(size).reshape([-1 if i == d else 1 for i in range(dims)])
            index.append(self._read(place.reshape(*places.shape, *[1] * dims), taps, d, inputs.shape[2 + d]))
        beyond = [int((at == size).any()) for at, size in zip(index[2:], inputs.shape[2:], strict=True)]
        padded = pad(inputs, [side for one in reversed(beyond) for side in (0, one)]) if any(beyond) else inputs
        patches = padded[tuple(index)]  # (images, positions, *kernel, in)
        groups = conv_groups(self.node)
        by_group = patches.reshape(*patches.shape[:-1], groups, -1).flatten(0, 1)
        return by_group.movedim((-2, -1), (1, 2)).flatten(2), y

    def _read(self, place: Tensor, tap: Tensor, d: int, size: int) -> Tensor:
        """Return where in dimension `d` of the inputs a tap of the kernel reads for an output's place.

        That is `size`, a zero behind the inputs, where it reads padding, or where a transposed convolution has nothing
        for the tap to meet.
        """
        stride, padding, dilation = self._geometry(d)
        if is_transposed(self.node):
            spread = place + padding - tap * dilation
            at, is_read = spread.div(stride, rounding_mode="floor"), spread % stride == 0
        else:
            at = place * stride - padding + tap * dilation
            is_read = torch.ones_like(at, dtype=torch.bool)
        return torch.where(is_read & (at >= 0) & (at < size), at, size)

    def _geometry(self, d: int) -> tuple[int, int, int]:
        """Return the stride, the padding before and the dilation of dimension `d`."""
        node = self.node
        spread = 7 if op_name(node) in TRANSPOSED else 5
        stride, dilation = (
            _of_dim(argument(node, position, name, 1), d) for position, name in ((3, "stride"), (spread, "dilation"))
        )
        given = argument(node, 4, "padding", 0)
        if given == "same":
            return stride, dilation * (self.kernel[d] - 1) // 2, dilation
        return stride, 0 if given == "valid" else _of_dim(given, d), dilation


def _of_dim(value: int | list[int], d: int) -> int:
    values = [value] if isinstance(value, int) else list(value)
    return values[0 if len(values) == 1 else d]
