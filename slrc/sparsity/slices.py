"""`Slice`: where units lie in a tensor, and how positions and orders are written in a plan's JSON."""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer
from torch import Tensor


def _parse_ranges(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    spans = [re.fullmatch(r"(\d+):(\d+)", span.strip()) for span in value.split(",")]
    ranges = [range(int(span[1]), int(span[2])) for span in spans if span is not None]
    if len(ranges) < len(spans) or not all(ranges):
        raise ValueError(f"expected ranges like `0:64,128:192`, got `{value}`")
    return tuple(i for one in ranges for i in one)


def _print_ranges(indices: tuple[int, ...] | None) -> str | None:
    if indices is None:
        return None
    spans: list[list[int]] = []
    for i in indices:
        if spans and spans[-1][1] == i:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1])
    return ",".join(f"{start}:{stop}" for start, stop in spans)


def _parse_order(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
        raise ValueError(f"expected places like `3,0,1,2`, got `{value}`")
    return tuple(int(place) for place in value.split(","))


def _print_order(order: tuple[int, ...] | None) -> str | None:
    return None if order is None else ",".join(map(str, order))


Indices = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_parse_ranges),
    PlainSerializer(_print_ranges, return_type=str | None),
]

Order = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_parse_order),
    PlainSerializer(_print_order, return_type=str | None),
]


class Slice(BaseModel):
    """Where the units of a coupled group, or the outputs of a single weight, lie in one dimension of one tensor.

    `index` lists positions unit by unit, the same number for each (`"0:64,128:192"` in JSON); `None` is unit `i` at
    position `i`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str
    dim: int = 0
    index: Indices = None

    def first(self, tensor: Tensor) -> Tensor:
        """Return `tensor` with the dimension of the units first."""
        return tensor.movedim(self.dim, 0)

    def rows(self, tensor: Tensor, units: int) -> Tensor:
        """Return the slice of `tensor` as `(units, features)`."""
        moved = self.first(tensor)
        if self.index is not None:
            moved = moved[torch.tensor(self.index, device=tensor.device)]
        return moved.reshape(units, -1)

    def scale_(self, tensor: Tensor, value: Tensor) -> None:
        """Multiply the slice of `tensor` in place by a factor for each unit, `(units,)`: a number, or true or false."""
        moved = self.first(tensor)
        index = torch.arange(len(moved)) if self.index is None else torch.tensor(self.index)
        spread = value.repeat_interleave(len(index) // len(value)).reshape(-1, *(1 for _ in moved.shape[1:]))
        moved[index] = moved[index] * spread
