"""Tensors that the processes of a run share out: each holds some rows of a `DTensor`, as FSDP keeps parameters.

Each process holds as many rows, one after another by its number; of the last ones some may have fewer, or none. Other
tensors pass through all of these functions as they are. Whatever talks to the other processes must be called in all of
them, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
BUCKET = 64 * 2**20
"""Bytes that are gathered at once: enough for a call to cost nothing beside them, little beside a device's memory."""


def is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Tell whether a tensor is shared out. By its looks: torch loads the class, slowly, where one is made."""
    return hasattr(tensor, "to_local")


def own(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds: the same memory, so that changes in place last."""
    if not is_shared(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def own_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's rows of a whole tensor, those that it holds of `like`, on its device."""
    if not is_shared(like):
        return tensor.to(like.device)
    rows = _rows(like)
    mine = tensor[rows * like.device_mesh.get_local_rank() :][:rows]
    return mine.to(like.device, copy=True)  # a view would keep the whole one


def of_own(rows: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which each process has such rows: as many as it holds of `like`. Nothing is sent."""
    if not is_shared(like):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor shared out as `like` is, and on its device. Every process has the whole one: none is sent.

    Args:
        tensor: of the shape of `like`, and of any type.
        like: what lies beside it.
    """
    return of_own(own_of(tensor, like), like)


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all rows of tensors by name. Those of all that are shared out are gathered from the processes at once."""
    shared = {n: t for n, t in tensors.items() if is_shared(t)}
    if not shared:
        return dict(tensors)
    mesh = next(iter(shared.values())).device_mesh
    parts = [_bytes(_padded(own(t), _rows(t))) for t in shared.values()]
    sizes = [len(part) for part in parts]
    sent = torch.cat(parts)
    received = sent.new_empty((mesh.size(), len(sent)))
    torch.distributed.all_gather(list(received), sent, group=mesh.get_group())
    gathered = {
        n: part.clone(memory_format=torch.contiguous_format).view(-1).view(t.dtype).view(-1, *t.shape[1:])[: len(t)]
        for (n, t), part in zip(shared.items(), received.split(sizes, dim=1), strict=True)
    }
    return {n: gathered.get(n, t) for n, t in tensors.items()}


def whole_in_turn(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and all rows, a bucket gathered at once."""
    for names in buckets(tensors, lambda n: tensors[n].nbytes):
        yield from whole({n: tensors[n] for n in names}).items()


def buckets(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in their order, as many at once as have `BUCKET` bytes together, one at least."""
    bucket: list[T] = []
    size = 0
    for item in items:
        size += num_bytes(item)
        if bucket and size > BUCKET:
            yield bucket
            bucket, size = [], num_bytes(item)
        bucket.append(item)
    if bucket:
        yield bucket


def totals(values: Sequence[float], of: Sequence[Tensor]) -> list[float]:
    """Return the sums of all processes' values where the tensors that they are of are shared out, all or none."""
    if not of or not is_shared(of[0]):
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=of[0].device)
    torch.distributed.all_reduce(summed, group=of[0].device_mesh.get_group())
    return [float(value) for value in summed.tolist()]


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Take over the first process's values of tensors that each has whole, all at once."""
    if not tensors:
        return
    sent = torch.cat([_bytes(t) for t in tensors])
    torch.distributed.broadcast(sent, 0)
    for tensor, part in zip(tensors, sent.split([t.nbytes for t in tensors]), strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a part alone lies where its type may


def _rows(shared: Tensor) -> int:
    """Return how many rows each process holds, the last ones perhaps fewer."""
    assert is_shared(shared)
    return math.ceil(len(shared) / shared.device_mesh.size())


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
