"""Tensors that the processes of a run share out: each holds some rows of a `DTensor`, as FSDP keeps parameters.

Other tensors pass through all of these functions as they are. Whatever talks to the other processes must be called in
all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Tell whether a tensor is shared out. By its looks: torch loads the class, slowly, where one is made."""
    return hasattr(tensor, "to_local")


def own(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds: the same memory, so that changes in place last."""
    if not is_shared(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """Return all rows, gathered from the other processes."""
    if not is_shared(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


@torch.no_grad()
def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor shared out as `like` is, and on its device. Every process has the whole one: none is sent.

    Args:
        tensor: of the shape of `like`, and of any type.
        like: what lies beside it.
    """
    tensor = tensor.to(like.device)
    if not is_shared(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def total(value: float, of: Sequence[Tensor]) -> float:
    """Return the sum of all processes' values where the tensors that they are of are shared out, all or none."""
    if not of or not is_shared(of[0]):
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=of[0].device)
    torch.distributed.all_reduce(summed, group=of[0].device_mesh.get_group())
    return float(summed)
