"""Forms: what a weight's zeros allow, and the packed format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slrc.errors import PlanError
from slrc.forms.cost import cheapest_form, density_of, layer_kind
from slrc.forms.form import (
    DENSE,
    DEPTHWISE,
    DEPTHWISE_INT8,
    FLOAT32,
    Form,
    FormChoice,
    FormKind,
    LayerChoice,
    candidate_forms,
    in_float,
    int8_blocks,
    kept_channels,
    parse_form,
)
from slrc.forms.packed_weight import PackedWeight, block_density, unpack


def blocks(rows: int, out: int = 16, inputs: int = 12, kernel: int = 3, density: float = 0.25) -> Tensor:
    """A weight whose blocks of `rows` outputs survive by chance."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(out // rows, inputs * kernel**2, generator=generator) < density
    weight = torch.randn(out, inputs * kernel**2, generator=generator)
    return (weight * mask.repeat_interleave(rows, dim=0)).reshape(out, inputs, kernel, kernel)


def columns(kept: list[list[int]], out: int = 8, inputs: int = 6) -> Tensor:
    """A weight whose row groups keep these input channels."""
    weight = torch.zeros(out, inputs, 3, 3)
    for rows, channels in zip(weight.chunk(len(kept)), kept, strict=True):
        rows[:, channels] = 1.0
    return weight


def names(weight: Tensor, op: str = "conv2d", groups: int = 1) -> list[str]:
    return [str(form) for form in candidate_forms(weight, op, groups)]


@pytest.mark.parametrize(
    ("weight", "op", "groups", "expected"),
    [
        (torch.ones(8, 6, 3, 3), "conv2d", 1, ["dense"]),
        (blocks(8), "conv2d", 1, ["dense", "packed:4", "packed:8"]),
        (blocks(4), "conv2d", 1, ["dense", "packed:4"]),
        (blocks(16), "conv2d", 1, ["dense", "packed:4", "packed:8", "packed:16"]),
        (blocks(8), "conv2d", 2, ["dense", "packed:4", "packed:8"]),
        (blocks(8, 64, 64, 1, 0.5).flatten(1), "linear", 1, ["dense", "split:4", "packed:4", "packed:8"]),
        (blocks(8), "conv_transpose2d", 1, ["dense", "packed:4", "packed:8"]),
        (blocks(4, 12), "conv_transpose2d", 1, ["dense", "packed:4"]),
        (blocks(8), "conv_transpose2d", 2, ["dense"]),
        (blocks(8, density=0.9), "conv_transpose2d", 1, ["dense"]),
        (blocks(8).flatten(2), "conv1d", 1, ["dense"]),
        (blocks(8, density=0.9), "conv2d", 1, ["dense"]),
        (torch.zeros(16, 1, 3, 3), "conv2d", 16, ["dense", "packed:1"]),
        (torch.ones(32, 1, 5, 5), "conv2d", 16, ["dense", "packed:1"]),
        (torch.ones(16, 1, 3), "conv1d", 16, ["dense"]),
        (torch.ones(16, 1, 3, 3), "conv2d", 1, ["dense"]),
        (columns([[0, 1, 2], [2, 3, 4]]), "conv2d", 1, ["dense", "split:2", "grouped:2", "packed:4"]),
        (columns([[0, 1, 2], [2, 3]]), "conv2d", 1, ["dense", "split:2", "packed:4"]),
        (columns([[0, 1, 2]]), "conv2d", 1, ["dense", "split:1", "packed:4", "packed:8"]),
        (columns([[0], [1], [2], [3]], out=64), "conv1d", 1, ["dense", "split:4", "grouped:4"]),
        (columns([[0], [1], [2], [3]]), "conv1d", 1, ["dense", "split:2", "grouped:2"]),
        (torch.zeros(16, 6, 3, 3), "conv2d", 1, ["dense", "split:1", "packed:4", "packed:8", "packed:16"]),
        (columns([[0, 1, 2], []]), "conv2d", 1, ["dense", "split:2", "packed:4"]),
    ],
)
def test_what_zeros_allow(weight: Tensor, op: str, groups: int, expected: list[str]) -> None:
    assert names(weight, op, groups) == expected


def test_forms_are_read_as_they_are_printed() -> None:
    for text in ("dense", "split:2", "grouped:8", "packed:1", "packed:16"):
        assert str(parse_form(text)) == text
    for text in ("", "sparse", "packed", "packed:0", "split:-1", "dense:2"):
        with pytest.raises(PlanError, match="unknown form"):
            parse_form(text)


@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("out", [16, 20, 44])
def test_packing_loses_nothing(rows: int, groups: int, out: int) -> None:
    weight = blocks(4, out)
    weight[:rows] = 0
    packed = PackedWeight.of(weight, rows, groups)
    again = unpack(packed.values, packed.columns, packed.row_pointers, tuple(weight.shape), groups)
    assert torch.equal(again, weight)
    block_rows = -(-out // groups // rows) * groups
    assert len(packed.row_pointers) == block_rows + 1
    assert packed.values.shape == (len(packed.columns), rows)
    of_no_row = int((packed.values == 0).all(dim=1).sum())
    kept = (len(packed.columns) - of_no_row) * rows
    assert kept == pytest.approx(weight.numel() * block_density(weight, rows, groups))
    assert (packed.row_pointers.diff() > 0).all()
    for start, stop in zip(packed.row_pointers, packed.row_pointers[1:], strict=False):
        assert (packed.columns[start:stop].diff() > 0).all()


def test_kept_channels() -> None:
    weight = columns([[0, 1, 2], [2, 3]])
    assert [row.nonzero().flatten().tolist() for row in kept_channels(weight, 2)] == [[0, 1, 2], [2, 3]]
    assert kept_channels(weight, 1).sum() == 4


def test_the_cost_model() -> None:
    sparse, dense = blocks(8), blocks(8, density=0.7)
    assert cheapest_form(sparse, candidate_forms(sparse, "conv2d")).kind is FormKind.PACKED
    assert cheapest_form(sparse, [DENSE]) == DENSE
    assert density_of(sparse, Form(FormKind.PACKED, 8)) < 0.3 < density_of(dense, Form(FormKind.PACKED, 8))
    assert density_of(columns([[0, 1, 2], [2, 3]]), Form(FormKind.SPLIT, 2)) == pytest.approx(5 / 12)
    depthwise = torch.ones(16, 1, 3, 3)
    assert cheapest_form(depthwise, candidate_forms(depthwise, "conv2d", 16), 16) == DEPTHWISE
    for weight, groups in ((depthwise, 16), (sparse, 1)):
        kinds = {form.kind for form in candidate_forms(weight.double(), "conv2d", groups)}
        assert FormKind.PACKED not in kinds
    assert layer_kind(depthwise, 16) == "depthwise"
    assert [layer_kind(torch.ones(s)) for s in ((2, 3), (2, 3, 1, 1), (2, 3, 1, 3))] == ["linear", "1x1", "window"]


def quads(rows: int, density: float = 0.25) -> Tensor:
    """A weight whose blocks of `rows` outputs × 4 input channels survive by chance."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(16 // rows, 3, 9, generator=generator) < density
    spread = mask.repeat_interleave(rows, dim=0).repeat_interleave(4, dim=1)
    return torch.randn(16, 12, 3, 3, generator=generator) * spread.reshape(16, 12, 3, 3)


@pytest.mark.parametrize(
    ("weight", "op", "groups", "expected"),
    [
        # With no zeros:
        (torch.ones(16, 32), "linear", 1, ["dense", "float32"]),
        (torch.ones(8, 3, 7, 7), "conv2d", 1, ["dense", "packed-int8:4", "packed-int8:8", "float32"]),
        (quads(8), "conv2d", 1, ["dense", "packed:4", "packed:8", "packed-int8:4", "packed-int8:8", "float32"]),
        (quads(4), "conv2d", 1, ["dense", "packed:4", "packed-int8:4", "float32"]),
        # No quad of zeros:
        (
            blocks(8, inputs=36, density=0.7),
            "conv2d",
            1,
            ["dense", "packed:4", "packed:8", "packed-int8:4", "packed-int8:8", "float32"],
        ),
        (torch.zeros(16, 1, 3, 3), "conv2d", 16, ["dense", "packed:1", "packed-int8:1", "float32"]),
        (torch.ones(16, 8, 3), "conv1d", 1, ["dense", "float32"]),
    ],
)
def test_forms_of_layers_that_run_in_int8(weight: Tensor, op: str, groups: int, expected: list[str]) -> None:
    assert [str(f) for f in candidate_forms(weight, op, groups, is_integer=True)] == expected


def test_what_forms_mean_on_an_int8_target() -> None:
    forms = {name: parse_form(name) for name in ("dense", "float32", "packed:8", "packed-int8:16", "split:2")}
    assert in_float(forms) == ("float32", "packed:8")
    assert int8_blocks(forms) == {"packed-int8:16": 16}
    assert [str(f) for f in forms.values()] == list(forms)


def test_the_cost_model_prefers_integers_at_equal_work() -> None:
    weight = quads(8)
    candidates = candidate_forms(weight, "conv2d", is_integer=True)
    assert cheapest_form(weight, candidates).kind is FormKind.PACKED_INT8
    assert density_of(weight, Form(FormKind.PACKED_INT8, 8)) == density_of(weight, Form(FormKind.PACKED, 8)) < 0.5
    assert cheapest_form(weight, [DENSE, FLOAT32]) == DENSE
    depthwise = torch.ones(16, 1, 3, 3)
    assert cheapest_form(depthwise, candidate_forms(depthwise, "conv2d", 16, is_integer=True), 16) == DEPTHWISE_INT8
    assert density_of(depthwise, DEPTHWISE_INT8, 16) == 1.0
    single = blocks(8, inputs=16, density=0.25)  # of four channels one or two survive
    assert cheapest_form(single, candidate_forms(single, "conv2d", is_integer=True)).kind is FormKind.PACKED


def test_a_layer_that_int8_hurts_has_its_fastest_form_in_floating_point() -> None:
    ms = {"dense": 2.0, "packed-int8:8": 1.0, "packed:4": 1.6, "packed:8": 1.5, "float32": 3.0}
    layers = tuple(LayerChoice(weight=w, form=parse_form("packed-int8:8"), density=0.2, ms=ms) for w in "ab")
    untimed = LayerChoice(weight="c", form=parse_form("packed-int8:8"), density=0.2)
    split = LayerChoice(weight="d", form=parse_form("split:2"), density=0.2, ms=ms)
    choice = FormChoice(target="ort:int8", threads=1, layers=(*layers, untimed, split))
    forms = {w: str(f) for w, f in choice.spared(["b", "c", "d"]).forms.items()}
    assert forms == {"a": "packed-int8:8", "b": "packed:8", "c": "float32", "d": "float32"}
