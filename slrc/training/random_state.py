"""The state of all random numbers that a training step may draw: of Python, numpy, torch and the accelerator."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """What `of_now` found, and `restore` puts back."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @staticmethod
    def of_now() -> RandomState:
        """Return the state of this process."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Go on from it."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
