"""Sparsity patterns: typed values that say which weights may survive together.

Every pattern sees a weight as a *group view* of shape `(rows, groups, size)`: in each row, `keep` of the
`groups` may survive, and a group of `size` elements survives or vanishes as one. The Euclidean projection
on the set of such weights keeps, in each row, the `keep` groups of the largest energy (sum of squares);
this is exact for every pattern, since rows are independent and groups disjoint.

A new pattern is one class: its text, its view, the inverse of the view, and what it cannot take.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, PlainSerializer

from slrc.errors import PatternError

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(Protocol):
    """What every pattern can do. Shapes: weights are `(out, in, *kernel)`, coupled groups `(units, features)`."""

    coupled: ClassVar[bool]
    """Whether the pattern constrains coupled groups of tensors instead of single weights."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern itself prescribes, or `None` where the user chooses it."""

    def why_not(self, shape: tuple[int, ...], conv_groups: int = 1) -> str | None:
        """Return why a weight of `shape` cannot take the pattern, or `None` if it can."""

    def group_view(self, weight: Tensor) -> Tensor:
        """Return `weight` rearranged as `(rows, groups, size)`."""

    def from_group_view(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo `group_view` for a weight of `shape`."""


@dataclass(frozen=True)
class Unstructured:
    """`unstructured`: any weights may survive."""

    coupled: ClassVar[bool] = False
    fixed_sparsity: ClassVar[float | None] = None

    def __str__(self) -> str:
        return "unstructured"

    def why_not(self, shape: tuple[int, ...], conv_groups: int = 1) -> str | None:
        """Any weight will do."""
        return None

    def group_view(self, weight: Tensor) -> Tensor:
        """`(1, numel, 1)`."""
        return weight.reshape(1, -1, 1)

    def from_group_view(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Back to `shape`."""
        return view.reshape(shape)


@dataclass(frozen=True)
class Block:
    """`block:RxC`: blocks of R consecutive outputs × C consecutive input channels at one kernel position."""

    rows: int
    cols: int
    coupled: ClassVar[bool] = False
    fixed_sparsity: ClassVar[float | None] = None

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}"

    def why_not(self, shape: tuple[int, ...], conv_groups: int = 1) -> str | None:
        """Outputs (of each convolution group) must divide by R, input channels by C."""
        out, channels = shape[0] // conv_groups, _numel(shape[1:2])
        if conv_groups > 1 and shape[1] == 1:
            return "a depthwise weight has one input channel per output: its blocks cannot be skipped"
        if out % self.rows:
            return f"outputs must be a multiple of {self.rows}, got {out}"
        if channels % self.cols:
            return f"input channels must be a multiple of {self.cols}, got {channels}"
        return None

    def group_view(self, weight: Tensor) -> Tensor:
        """`(1, out/R · in/C · kh·kw, R·C)`."""
        rows, cols, taps = self._counts(tuple(weight.shape))
        blocks = weight.reshape(rows, self.rows, cols, self.cols, taps).permute(0, 2, 4, 1, 3)
        return blocks.reshape(1, -1, self.rows * self.cols)

    def from_group_view(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Back to `shape`."""
        rows, cols, taps = self._counts(shape)
        return view.reshape(rows, cols, taps, self.rows, self.cols).permute(0, 3, 1, 4, 2).reshape(shape)

    def _counts(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return out/R, in/C and kh·kw."""
        return shape[0] // self.rows, _numel(shape[1:2]) // self.cols, _numel(shape[2:])


@dataclass(frozen=True)
class Columns:
    """`columns:R`: outputs in R row groups; each keeps whole input channels of its own, as many in each group."""

    groups: int
    coupled: ClassVar[bool] = False
    fixed_sparsity: ClassVar[float | None] = None

    def __str__(self) -> str:
        return f"columns:{self.groups}"

    def why_not(self, shape: tuple[int, ...], conv_groups: int = 1) -> str | None:
        """Only ungrouped layers, with outputs that divide by R."""
        if conv_groups != 1:
            return f"a grouped convolution ({conv_groups} groups) cannot be split by input channels"
        if len(shape) < 2:
            return "it has no input channels"
        if shape[0] % self.groups:
            return f"outputs must be a multiple of {self.groups}, got {shape[0]}"
        return None

    def group_view(self, weight: Tensor) -> Tensor:
        """`(R, in, out/R · kh·kw)`."""
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return split.transpose(1, 2).reshape(self.groups, weight.shape[1], -1)

    def from_group_view(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Back to `shape`."""
        split = view.reshape(self.groups, shape[1], shape[0] // self.groups, -1)
        return split.transpose(1, 2).reshape(shape)


@dataclass(frozen=True)
class Channel:
    """`channel`: whole channels, over every tensor that is coupled with them; seen as `(units, features)`."""

    coupled: ClassVar[bool] = True
    fixed_sparsity: ClassVar[float | None] = None

    def __str__(self) -> str:
        return "channel"

    def why_not(self, shape: tuple[int, ...], conv_groups: int = 1) -> str | None:
        """Any coupled group will do."""
        return None

    def group_view(self, weight: Tensor) -> Tensor:
        """`(1, units, features)`."""
        return weight.reshape(1, weight.shape[0], -1)

    def from_group_view(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Back to `shape`."""
        return view.reshape(shape)


@dataclass(frozen=True)
class NM:
    """`N:M`: N of every M consecutive input channels, for each output and kernel position on its own."""

    n: int
    m: int
    coupled: ClassVar[bool] = False

    @property
    def fixed_sparsity(self) -> float | None:
        """`1 − N/M`."""
        return 1.0 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def why_not(self, shape: tuple[int, ...], conv_groups: int = 1) -> str | None:
        """Input channels must divide by M."""
        if len(shape) < 2:
            return "it has no input channels"
        if shape[1] % self.m:
            return f"input channels must be a multiple of {self.m}, got {shape[1]}"
        return None

    def group_view(self, weight: Tensor) -> Tensor:
        """`(out · kh·kw · in/M, M, 1)`."""
        return weight.reshape(weight.shape[0], weight.shape[1], -1).transpose(1, 2).reshape(-1, self.m, 1)

    def from_group_view(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Back to `shape`."""
        return view.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)


AnyPattern = Unstructured | Block | Columns | Channel | NM

_FORMS: tuple[tuple[str, Callable[..., AnyPattern]], ...] = (
    (r"unstructured", Unstructured),
    (r"block:(\d+)x(\d+)", Block),
    (r"columns:(\d+)", Columns),
    (r"channel", Channel),
    (r"(\d+):(\d+)", NM),
)


def parse_pattern(text: str) -> AnyPattern:
    """Return the pattern that `text` names: `unstructured`, `block:RxC`, `columns:R`, `channel` or `N:M`.

    Raises:
        PatternError: the text is none of these, or a number in it is out of range.
    """
    for form, make in _FORMS:
        if match := re.fullmatch(form, text.strip()):
            numbers = [int(number) for number in match.groups()]
            if 0 in numbers or (make is NM and numbers[0] >= numbers[1]):
                raise PatternError(
                    f"pattern `{text}` cannot be used: its numbers must be at least 1, and N below M in N:M",
                    hint="for example `block:8x1`, `columns:2` or `2:4`",
                )
            return make(*numbers)
    raise PatternError(
        f"unknown pattern `{text}`: expected auto, unstructured, block:RxC, columns:R, channel or N:M",
        hint="for example `--pattern channel`, `--pattern block:8x1` or `--pattern 2:4`",
    )


AUTO = "auto"
"""In the place of a pattern: for each layer the one that is best for it."""

PatternField = Annotated[
    AnyPattern,
    BeforeValidator(lambda v: v if isinstance(v, AnyPattern) else parse_pattern(str(v))),
    PlainSerializer(str, return_type=str),
]
"""A pattern in data: its text in JSON, in TOML and on the command line."""

PatternOrAuto = Annotated[
    AnyPattern | Literal["auto"],
    BeforeValidator(lambda v: v if isinstance(v, AnyPattern) or v == AUTO else parse_pattern(str(v))),
    PlainSerializer(str, return_type=str),
]
"""A pattern, or `auto`."""


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
