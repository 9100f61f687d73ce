"""One-shot magnitude pruning: train as if nothing were pruned, then keep the groups of the largest energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from slrc.methods.base import Iteration, Method, MethodState


class Magnitude(Method):
    """No penalty and no state: `masks` does the work at the end."""

    name: ClassVar[str] = "magnitude"

    def add_penalty_gradient(self) -> None:
        """Nothing to add."""

    def update(self, loss: Callable[[], float]) -> Iteration | None:
        """Nothing to update."""
        return None

    def state(self) -> MethodState:
        """Nothing to save."""
        return MethodState({}, {}, ())

    def load_state(self, state: MethodState) -> None:
        """Nothing to load."""
