"""What values of a program are on calibration data: their extremes, how they are spread, and the means of channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from slrc.errors import WorkloadError
from slrc.forms.quantization import Range
from slrc.ir.program import Program
from slrc.passes.quantization.find_places import is_quantizable
from slrc.reconstruction.calibration import Inputs

BINS = 2048


@dataclass(frozen=True)
class Observed:
    """What is known of one value.

    `counts` `(BINS,)` divides `limits` evenly. `means` and `extremes` are of channels, `(channels,)`: the mean, and the
    greatest magnitude; `None` for a value without channels.
    """

    limits: Range
    counts: Tensor
    means: Tensor | None
    extremes: Tensor | None


class _Watcher(Interpreter):
    """Runs a program and shows some of its values to `see`."""

    def __init__(self, program: Program, names: Collection[str]) -> None:
        super().__init__(program.graph_module)
        self._names = names
        self._see: dict[str, Tensor] = {}

    def watch(self, batch: Inputs) -> dict[str, Tensor]:
        self._see = {}
        with torch.no_grad():
            self.run(*batch)
        return self._see

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n.name in self._names and isinstance(result, Tensor):
            self._see[n.name] = result
        return result


def observe(program: Program, names: Collection[str], inputs: Sequence[Inputs]) -> Mapping[str, Observed]:
    """Run a program twice on some inputs; return what its values of these names are.

    Raises:
        WorkloadError: a value is not finite.
    """
    watcher, channel_dims = _Watcher(program, names), _channel_dims(program)
    lows, highs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    sums: dict[str, list[Tensor]] = {}
    most: dict[str, Tensor] = {}
    for batch in inputs:
        for name, value in watcher.watch(batch).items():
            lows[name], highs[name] = min(lows[name], float(value.min())), max(highs[name], float(value.max()))
            if not bool(value.isfinite().all()):
                raise WorkloadError(
                    f"the value `{name}` is not finite on the calibration data",
                    hint="look for values that overflow in the model as it was given",
                )
            channels = (
                value.transpose(0, channel_dims.get(name, 1) % value.dim()).flatten(1) if value.dim() > 1 else None
            )
            if channels is not None:
                sums.setdefault(name, []).append(channels.mean(1))
                high = channels.abs().amax(1)
                most[name] = torch.maximum(most[name], high) if name in most else high
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in names}
    for batch in inputs:
        for name, value in watcher.watch(batch).items():
            counts[name] += torch.histc(value.float(), BINS, lows[name], highs[name]).double()
    return {
        name: Observed(
            Range(lows[name], highs[name]),
            counts[name],
            torch.stack(sums[name]).mean(0) if name in sums else None,
            most.get(name),
        )
        for name in names
    }


def _channel_dims(program: Program) -> dict[str, int]:
    """Return the dimension of channels of what linear layers read: the last."""
    layers = (n for n in program.graph_module.graph.nodes if is_quantizable(n))
    return {n.args[0].name: -1 if "linear" in str(n.target) else 1 for n in layers}  # type: ignore[union-attr]
