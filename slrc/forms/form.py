"""Forms: how a layer with structured zeros is executed.

A form is chosen for each layer and target. Which forms a layer can take follows from the zeros of its weight alone, so
a choice is data: a form by the name of the layer's weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer
from torch import Tensor

from slrc.errors import PlanError
from slrc.forms.packed_int8 import int8_density
from slrc.forms.packed_weight import block_density

BLOCK_ROWS = (4, 8, 16)
"""The blocks that zeros are sought in."""
MOST_PARTS = 8
LEAST_PART_ROWS = 16
"""A layer is not split into more than two parts of fewer outputs: each would cost more than it saves."""
LEAST_ZEROS = 0.2
"""The share of blocks or channels that must be zero for a form to be worth a trial."""
FEW_COLUMNS = 32
"""Up to so many, as those of a 3×3 kernel on an image, a convolution may be packed with no zeros: runtimes are slow on
few channels. In int8 any convolution may be."""
ALIKE = 1.02
"""Forms whose work differs by less count as the same work."""


class FormKind(StrEnum):
    """What a layer becomes. On an int8 target it is in int8, unless its form says that it is in float32."""

    DENSE = "dense"
    """The layer as it is, zeros and all."""
    SPLIT = "split"
    """A gather and a smaller layer for each row group, then a concatenation."""
    GROUPED = "grouped"
    """One gather, then one grouped convolution."""
    PACKED = "packed"
    """One node with packed blocks, for the kernels of slrc, in float32."""
    FLOAT32 = "float32"
    """On an int8 target, the layer as it is in float32."""
    PACKED_INT8 = "packed-int8"
    """One node with packed blocks of integers."""


@dataclass(frozen=True)
class Form:
    """`dense`, `split:R` and `grouped:R` with R row groups, `packed:M` with blocks of M outputs × 1 column.

    For int8 targets there are `float32`, and `packed-int8:M` with blocks of M outputs × 4 input channels. `packed:1`
    and `packed-int8:1` are for depthwise layers. They need no zeros for it, nor do convolutions in int8,
    or those of few columns in float32.
    """

    kind: FormKind
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.size else str(self.kind)


DENSE = Form(FormKind.DENSE)
FLOAT32 = Form(FormKind.FLOAT32)
DEPTHWISE = Form(FormKind.PACKED, 1)
DEPTHWISE_INT8 = Form(FormKind.PACKED_INT8, 1)
IN_FLOAT = (FormKind.FLOAT32, FormKind.PACKED)
"""What stays in floating point on an int8 target."""
Forms = Mapping[str, Form]
"""The form of each layer, by the name of its weight; a layer that is not named stays dense."""


def parse_form(text: str) -> Form:
    """Return the form that `text` names.

    Raises:
        PlanError: it names none.
    """
    match = re.fullmatch(r"(dense|float32)|(split|grouped|packed|packed-int8):([1-9]\d*)", text.strip())
    if match is None:
        raise PlanError(
            f"unknown form `{text}`: expected dense, float32, split:R, grouped:R, packed:M or packed-int8:M"
        )
    return Form(FormKind(match[1] or match[2]), int(match[3] or 0))


def in_float(forms: Forms) -> tuple[str, ...]:
    """Return the layers that stay in floating point on an int8 target."""
    return tuple(weight for weight, form in forms.items() if form.kind in IN_FLOAT)


def int8_blocks(forms: Forms) -> dict[str, int]:
    """Return the rows of the blocks of layers that are packed in int8."""
    return {weight: form.size for weight, form in forms.items() if form.kind is FormKind.PACKED_INT8}


def candidate_forms(weight: Tensor, op: str, groups: int = 1, *, is_integer: bool = False) -> list[Form]:
    """Return the forms that a layer allows, `dense` first: by its zeros, or packed with none if that may be faster.

    Args:
        weight: `(out, in/groups, *kernel)`, of transposed convolutions too.
        op: the ATen operator's bare name, such as `conv2d`.
        groups: of the convolution.
        is_integer: whether the layer runs in int8 unless its form says otherwise.
    """
    forms = _float_forms(weight, op, groups)
    if not is_integer:
        return forms
    if op == "conv2d" and groups > 1 and weight.shape[1] == 1:
        forms.append(DEPTHWISE_INT8)
    elif op in ("conv2d", "linear") and weight.shape[1] > 1:
        density = {rows: int8_density(weight, rows, groups) for rows in BLOCK_ROWS}
        forms += _packed_forms(density, needs_zeros=op != "conv2d", kind=FormKind.PACKED_INT8)
    return [*forms, FLOAT32]


def _float_forms(weight: Tensor, op: str, groups: int) -> list[Form]:
    forms = [DENSE]
    if op == "conv_transpose2d" and groups == 1 and weight.dtype == torch.float32:
        whole = [rows for rows in BLOCK_ROWS if weight.shape[0] % rows == 0]  # a block is of one phase of the stride
        return forms + _packed_forms({rows: block_density(weight, rows) for rows in whole})
    if op not in ("conv1d", "conv2d", "conv3d", "linear") or weight.shape[0] < 2:
        return forms
    if groups == 1 and (parts := _row_groups(weight)):
        forms.append(Form(FormKind.SPLIT, parts))
        kept = kept_channels(weight, parts).sum(dim=1)
        if op != "linear" and parts > 1 and bool((kept == kept[0]).all()):
            forms.append(Form(FormKind.GROUPED, parts))
    if weight.dtype != torch.float32:  # as the kernels are
        return forms
    if op == "conv2d" and groups > 1 and weight.shape[1] == 1:
        forms.append(DEPTHWISE)
    elif op in ("conv2d", "linear") and weight.shape[1] > 1:
        density = {rows: block_density(weight, rows, groups) for rows in BLOCK_ROWS}
        forms += _packed_forms(density, needs_zeros=op != "conv2d" or weight[0].numel() > FEW_COLUMNS)
    return forms


def _packed_forms(
    density: Mapping[int, float], *, needs_zeros: bool = True, kind: FormKind = FormKind.PACKED
) -> list[Form]:
    """Return the packed forms that do about the least work, of those with a density; none if that saves nothing."""
    least = min(density.values(), default=1.0)
    if needs_zeros and least > 1 - LEAST_ZEROS:
        return []
    return [Form(kind, rows) for rows, d in density.items() if d <= least * ALIKE]


def _row_groups(weight: Tensor) -> int:
    """Return the least number of row groups whose kept channels are about the least work; 0 if that saves nothing."""
    work = {
        parts: float(kept_channels(weight, parts).float().mean())
        for parts in range(1, MOST_PARTS + 1)
        if weight.shape[0] % parts == 0 and (parts <= 2 or weight.shape[0] // parts >= LEAST_PART_ROWS)
    }
    least = min(work.values())
    return next(p for p, w in work.items() if w <= least * ALIKE) if least <= 1 - LEAST_ZEROS else 0


def kept_channels(weight: Tensor, parts: int) -> Tensor:
    """Return which input channels each of `parts` row groups keeps, `(parts, in)`: of a group of zeros, the first."""
    rows = weight.detach().reshape(parts, weight.shape[0] // parts, weight.shape[1], -1)
    kept = (rows != 0).any(dim=3).any(dim=1)
    kept[:, 0] |= ~kept.any(dim=1)
    return kept


FormField = Annotated[
    Form,
    BeforeValidator(lambda v: v if isinstance(v, Form) else parse_form(str(v))),
    PlainSerializer(str, return_type=str),
]


class LayerChoice(BaseModel):
    """The form of one layer, the share of the dense work that it does, and what each form that was timed took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: str
    form: FormField
    density: float
    ms: Mapping[str, float] = {}


class FormChoice(BaseModel):
    """The forms of a program's layers on one target, and why.

    `taken` names which of the networks in `whole_ms` it is; `dropped` says which forms could not be had; `idle` are
    weights of layers that lost blocks and yet are faster dense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    threads: int
    taken: str = ""
    dropped: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    whole_ms: Mapping[str, float] = {}
    layers: tuple[LayerChoice, ...] = ()

    @property
    def forms(self) -> Forms:
        """The form of each layer that does not stay dense."""
        return {x.weight: x.form for x in self.layers if x.form != DENSE}

    def notes(self, names: Mapping[str, str]) -> tuple[str, ...]:
        """Return what a user is told besides the forms; `names` are those of the layers, by their weights."""
        if not self.idle:
            return self.dropped
        first, others = names[self.idle[0]], len(self.idle) - 1
        which = f"`{first}` and {others} more lost blocks and run" if others else f"`{first}` lost blocks and runs"
        return (*self.dropped, f"on {self.target} {which} dense: that is faster there")

    def spared(self, weights: Collection[str]) -> FormChoice:
        """Return the choice with the fastest of their forms in floating point for layers that are not to be in int8.

        A layer that is split stays so, and is in `float32`.
        """

        def in_float(layer: LayerChoice) -> LayerChoice:
            if layer.weight not in weights or layer.form.kind in IN_FLOAT:
                return layer
            if layer.form.kind in (FormKind.SPLIT, FormKind.GROUPED):
                return layer.model_copy(update={"form": FLOAT32})
            known = {form: ms for text, ms in layer.ms.items() if (form := parse_form(text)).kind in IN_FLOAT}
            return layer.model_copy(update={"form": min(known, key=lambda f: known[f], default=FLOAT32)})

        return self.model_copy(update={"layers": tuple(map(in_float, self.layers))})
