"""A loaded artifact in the place of the user's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slrc.backends.base import Artifact, Runner
from slrc.ir.program import Program


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
