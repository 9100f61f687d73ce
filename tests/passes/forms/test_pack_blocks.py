"""Layers with zero blocks as one packed operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.forms.form import DEPTHWISE, Form, FormKind, Forms
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.forms.pack_blocks import PackBlocks
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Block
from slrc.verify import compare, outputs_of

F = nn.functional
IMAGE, TOKENS, FLAT = (6, 9, 9), (5, 6), (6,)
Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], tuple[int, ...]]


def only(layer: nn.Module, shape: tuple[int, ...] = IMAGE) -> Case:
    return lambda m, x: m.a(x), {"a": layer}, shape


def conv(out: int = 12, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, out, 3, padding=1, **options)


def tied() -> dict[str, Any]:
    a, b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    b.weight = a.weight
    return {"first": nn.Conv2d(6, 8, 1), "a": a, "b": b}


CASES: dict[str, Case] = {
    "3x3": only(nn.Conv2d(6, 12, 3, stride=2, padding=1, dilation=2)),
    "uneven": only(nn.Conv2d(6, 8, (3, 1), stride=(1, 2), padding=(0, 2))),
    "no bias": only(conv(bias=False)),
    "groups": only(conv(16, groups=2)),
    "1x1": only(nn.Conv2d(6, 4, 1)),
    "linear": only(nn.Linear(6, 4), FLAT),
    "linear on tokens": only(nn.Linear(6, 4, bias=False), TOKENS),
    "transposed": only(nn.ConvTranspose2d(6, 8, 2, stride=2)),
    "transposed, 1x1": only(nn.ConvTranspose2d(6, 8, 1, bias=False)),
    "transposed, 3x3": only(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1)),
    "transposed, 4x4": only(nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, bias=False)),
    "transposed, uneven": only(nn.ConvTranspose2d(6, 8, (5, 2), stride=(3, 1), padding=(4, 1), output_padding=(2, 0))),
    "transposed, gaps": only(nn.ConvTranspose2d(6, 8, 2, stride=(3, 4), output_padding=(2, 1))),
    "transposed, stride 1": only(nn.ConvTranspose2d(6, 8, 3, padding=1)),
    "transposed, then an addition": (
        lambda m, x: torch.relu(m.a(x) + m.b(x)),
        {"a": nn.ConvTranspose2d(6, 8, 2, stride=2), "b": nn.ConvTranspose2d(6, 8, 2, stride=2)},
        IMAGE,
    ),
    "transposed, then an activation": (
        lambda m, x: torch.nn.functional.leaky_relu(m.a(x), 0.2),
        {"a": nn.ConvTranspose2d(6, 8, 2, stride=2)},
        IMAGE,
    ),
    "module called twice": (
        lambda m, x: m.a(torch.relu(m.a(m.first(x)))),
        {"first": nn.Conv2d(6, 8, 1), "a": nn.Conv2d(8, 8, 1)},
        IMAGE,
    ),
    "tied weights, a bias each": (lambda m, x: m.b(torch.relu(m.a(m.first(x)))), tied(), IMAGE),
    "with its bias and without": (
        lambda m, x: m.a(x.relu()) + nn.functional.conv2d(x, m.a.weight),
        {"a": nn.Conv2d(6, 8, 1)},
        IMAGE,
    ),
    "weight read elsewhere": (lambda m, x: m.a(x) + m.a.weight.sum(), {"a": nn.Conv2d(6, 4, 1)}, IMAGE),
    "input used twice": (lambda m, x: m.a(x) * m.b(x), {"a": nn.Conv2d(6, 4, 1), "b": nn.Conv2d(6, 4, 1)}, IMAGE),
    "residual that comes later": (
        lambda m, x: torch.relu(m.a(x) + m.b(x.tanh())),
        {"a": nn.Conv2d(6, 8, 1), "b": nn.Conv2d(6, 8, 1)},
        IMAGE,
    ),
    "added to itself": (lambda m, x: (lambda y: y + y)(m.a(x)), {"a": nn.Conv2d(6, 8, 1)}, IMAGE),
    "added to a broadcast": (lambda m, x: m.a(x) + x.mean((1, 2, 3), keepdim=True), {"a": nn.Conv2d(6, 8, 1)}, IMAGE),
    "read before its activation": (lambda m, x: (lambda y: y.relu() * y)(m.a(x)), {"a": nn.Conv2d(6, 8, 1)}, IMAGE),
}


def packed(case: Case, net: Any, randomized: Any, rows: int = 4) -> tuple[nn.Module, Program, Masks, Program, bool]:
    run, layers, shape = case
    model = randomized(net(run, **layers))
    torch.manual_seed(0)
    program = capture(model, (torch.randn(2, *shape, dtype=torch.float64),))
    plan = allocate_sparsity(program, Block(rows, 1), 0.5, keep_ends=False)
    masks = Masks.project(plan, program.tensors)
    masked = ApplyMasks(masks)(program).program
    forms: Forms = {c.members[0].tensor: Form(FormKind.PACKED, rows) for c in plan}
    result, modified = PackBlocks(forms)(masked)
    assert not PackBlocks(forms)(result).modified
    return model, program, masks, result, modified


@pytest.mark.parametrize("name", CASES)
def test_it_rewrites(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    model, program, masks, result, modified = packed(CASES[name], net, randomized)
    assert modified
    assert result.batch_is_dynamic
    assert (
        not {op_name(n) for n in result.nodes} & {"conv2d", "linear", "conv_transpose2d"} or "first" in CASES[name][1]
    )
    assert result.macs < program.macs
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.2),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "clamp": lambda y: y.clamp(min=0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_what_follows_goes_into_the_operator(
    activation: str, residual: bool, net: Any, randomized: Any, masked_outputs: Any
) -> None:
    act = ACTIVATIONS[activation]
    case: Case = (lambda m, x: act(x + m.a(x)) if residual else act(m.a(x)), {"a": nn.Conv2d(8, 8, 1)}, (8, 5, 5))
    model, program, masks, result, _ = packed(case, net, randomized)
    assert [op_name(n) for n in result.nodes if not op_name(n).startswith("sym_")] == ["block_sparse_conv"]
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


def test_other_activations_stay(net: Any, randomized: Any) -> None:
    for act in (lambda y: F.gelu(y, approximate="tanh"), torch.tanh, lambda y: y.clamp(0, 1), lambda y: y - 1.0):
        case: Case = (lambda m, x, act=act: act(m.a(x)), {"a": nn.Conv2d(6, 8, 1)}, IMAGE)  # type: ignore[misc]
        result = packed(case, net, randomized)[3]
        assert len([n for n in result.nodes if not op_name(n).startswith("sym_")]) == 2


POOLS: dict[str, tuple[Any, bool]] = {
    "2x2": (lambda y: F.max_pool2d(y, 2), True),
    "2x2 in other words": (lambda y: F.max_pool2d(y, (2, 2), 2, padding=(0, 0)), True),
    "3x3": (lambda y: F.max_pool2d(y, 3, 2), False),
    "of stride 1": (lambda y: F.max_pool2d(y, 2, 1), False),
    "padded": (lambda y: F.max_pool2d(y, 2, padding=1), False),
    "rounded up": (lambda y: F.max_pool2d(y, 2, ceil_mode=True), False),
    "dilated": (lambda y: F.max_pool2d(y, 2, dilation=2), False),
    "of something else": (lambda y: F.max_pool2d(y - 1.0, 2), False),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_behind_a_packed_layer(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    pool, taken = POOLS[name]
    case: Case = (lambda m, x: pool(m.a(x)), {"a": nn.Conv2d(8, 8, 1)}, (8, 7, 5))
    model, program, masks, result, _ = packed(case, net, randomized)
    assert [op_name(n) for n in result.nodes][-1] == ("max_pool2x2" if taken else "max_pool2d")
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


UPSAMPLINGS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "by scale": (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), True),
    "to a size": (lambda y: F.interpolate(y, size=(14, 10), mode="bilinear"), True),
    "to another size": (lambda y: F.interpolate(y, size=(14, 11), mode="bilinear"), False),
    "by another scale": (lambda y: F.interpolate(y, size=None, scale_factor=3, mode="bilinear"), False),
    "from corner to corner": (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True), False),
    "of something else": (lambda y: F.interpolate(y - 1.0, scale_factor=2, mode="bilinear"), False),
}


@pytest.mark.parametrize("name", UPSAMPLINGS)
def test_upsampling_behind_a_packed_layer(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    upsampling, taken = UPSAMPLINGS[name]
    case: Case = (lambda m, x: upsampling(m.a(x)), {"a": nn.Conv2d(8, 8, 1)}, (8, 7, 5))
    model, program, masks, result, _ = packed(case, net, randomized)
    assert ("upsample_bilinear2x" in [op_name(n) for n in result.nodes]) == taken
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


def cat_of(run: Callable[[Any, Tensor], Tensor], **options: Any) -> Case:
    return run, {"a": nn.Conv2d(18, 8, 3, padding=1, **options), "b": nn.Conv2d(6, 8, 1)}, IMAGE


def side_by_side(x: Tensor) -> Tensor:
    return torch.cat((x, x.tanh(), x.relu()), 1)


def residual_into_parts(m: Any, x: Tensor) -> Tensor:
    return F.silu(m.a(side_by_side(x)) + m.b(x.tanh()))


CONCATENATIONS: dict[str, tuple[Case, int]] = {
    "its parts": (cat_of(lambda m, x: m.a(side_by_side(x))), 3),
    "no bias, an activation": (cat_of(lambda m, x: m.a(side_by_side(x)).relu(), bias=False), 3),
    "a residual": (cat_of(residual_into_parts), 4),
    "strided": (cat_of(lambda m, x: m.a(torch.cat((side_by_side(x)[:, 6:], x), -3)), stride=2), 2),
    "twice the same": (cat_of(lambda m, x: m.a(torch.cat((x, x, x), 1))), 3),
    "read elsewhere": (cat_of(lambda m, x: m.a(y := side_by_side(x)) + y.mean()), 1),
    "along the rows": (cat_of(lambda m, x: m.a(torch.cat((y := side_by_side(x), y), 2))), 1),
    "in groups": (cat_of(lambda m, x: m.a(side_by_side(x)), groups=2), 1),
    "more outputs than inputs": (
        (lambda m, x: m.a(torch.cat((x, x.tanh()), 1)), {"a": nn.Conv2d(12, 12, 1)}, IMAGE),
        1,
    ),
}


@pytest.mark.parametrize("name", CONCATENATIONS)
def test_a_concatenation_is_not_made(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    case, convs = CONCATENATIONS[name]
    model, program, masks, result, _ = packed(case, net, randomized)
    names = [op_name(n) for n in result.nodes]
    assert names.count("block_sparse_conv") == convs
    assert ("cat" in names) == (convs == 1 or name == "strided")
    assert "add" not in names or convs == 1
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


PERMUTATIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "to planes": (lambda m, x: m.a(x.tanh().permute(0, 3, 1, 2)), "channels_first"),
    "to planes that are added": (lambda m, x: m.a(y := x.tanh().permute(0, 3, 1, 2)) + y, "channels_first"),
    "to planes that are read elsewhere": (lambda m, x: m.a(y := x.tanh().permute(0, 3, 1, 2)) * y, "permute"),
    "from planes": (lambda m, x: m.a(x.mT.contiguous()).permute(0, -2, 3, 1).tanh(), "channels_last"),
    "rows and columns too": (lambda m, x: m.a(x.tanh().permute(0, 3, 2, 1)), "permute"),
}


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_a_way_to_another_layout(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    run, taken = PERMUTATIONS[name]
    model, program, masks, result, _ = packed((run, {"a": nn.Conv2d(8, 8, 1)}, (8, 8, 8)), net, randomized)
    assert taken in [op_name(n) for n in result.nodes]
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


def mlp(run: Callable[[Any, Tensor], Tensor], **options: Any) -> Case:
    return run, {"a": nn.Linear(8, 12, **options), "b": nn.Linear(12, 8)}, (5, 8)


MLPS: dict[str, tuple[Case, list[str]]] = {
    "with a residual": (mlp(lambda m, x: x + m.b(F.gelu(m.a(x)))), ["block_sparse_mlp"]),
    "without one": (mlp(lambda m, x: m.b(m.a(x)), bias=False), ["block_sparse_mlp"]),
    "an activation behind": (mlp(lambda m, x: m.b(m.a(x).relu()).relu()), ["block_sparse_gemm"] * 2),
    "an addition between": (mlp(lambda m, x: m.b(m.a(x) + m.a(x.tanh()))), ["tanh", *["block_sparse_gemm"] * 3]),
    "what is between is read": (mlp(lambda m, x: m.b(h := m.a(x)) + h[..., :8]), ["block_sparse_gemm"] * 2),
    "something between": (mlp(lambda m, x: m.b(m.a(x).tanh())), ["block_sparse_gemm", "tanh", "block_sparse_gemm"]),
}


@pytest.mark.parametrize("name", MLPS)
def test_two_matrices_one_behind_the_other(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    case, expected = MLPS[name]
    model, program, masks, result, _ = packed(case, net, randomized)
    found = [op_name(n) for n in result.nodes]
    assert [n for n in found if n.startswith("block_") or n == "tanh"] == expected
    values = {key[0]: t.numel() for key, t in result.tensors.items() if key.endswith("values")}
    assert result.macs == 5 * (values["a"] * (2 if "addition" in name else 1) + values["b"])
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


def attention(take: Callable[[Tensor], Any], order: tuple[int, ...] = (2, 0, 3, 1, 4)) -> Case:
    """Two heads of 4 on 5 tokens of width 6."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = take(m.a(x).view(-1, 5, 3, 2, 4).permute(*order))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    return run, {"a": nn.Linear(6, 24)}, TOKENS


PROJECTIONS: dict[str, tuple[Case, int]] = {
    "selected": (attention(lambda y: (y[0], y[1], y[2])), 3),
    "in another order": (attention(lambda y: (y[2], y[0], y[1])), 3),
    "from the end": (attention(lambda y: (y[-3], y[-2], y[-1])), 1),
    "unbound": (attention(lambda y: y.unbind(0)), 3),
    "unbound elsewhere": (attention(lambda y: y.unbind(1), (0, 2, 3, 1, 4)), 3),
    "one of them unread": (attention(lambda y: (y[0], y[0], y[2])), 1),
    "one of them read twice": (attention(lambda y: (y[0], y[1], y[1] + y[2])), 3),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_queries_keys_and_values(name: str, net: Any, randomized: Any, masked_outputs: Any) -> None:
    case, count = PROJECTIONS[name]
    model, program, masks, result, _ = packed(case, net, randomized)
    assert [op_name(n) for n in result.nodes].count("block_sparse_gemm") == count
    assert result.batch_is_dynamic
    reference = masked_outputs(model, program, masks)
    compare("masked = packed", reference, outputs_of(result.module(), program.example_inputs), 1e-10)


def test_projections_of_uneven_rows_stay_together(net: Any, randomized: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k = m.a(x).view(-1, 5, 2, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        return q @ k.transpose(-1, -2)

    result = packed((run, {"a": nn.Linear(6, 48)}, TOKENS), net, randomized, rows=16)[3]
    assert [op_name(n) for n in result.nodes].count("block_sparse_gemm") == 1


@pytest.mark.parametrize("outputs", [6, 12])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_layer_without_zeros(outputs: int, kernel: int, net: Any, randomized: Any) -> None:
    layer = nn.Conv2d(6, outputs, kernel, stride=2, padding=1, groups=6)
    model = randomized(net(lambda m, x: F.relu6(m.a(x)), a=layer))
    program = capture(model, (torch.randn(2, *IMAGE, dtype=torch.float64),))
    result = PackBlocks({"a.weight": DEPTHWISE})(program).program
    assert result.tensors["a.values"].shape == (outputs * kernel**2, 1)
    assert [op_name(n) for n in result.nodes if not op_name(n).startswith("sym_")] == ["block_sparse_conv"]
    assert result.macs == program.macs
    reference, outputs_packed = (outputs_of(p.module(), program.example_inputs) for p in (program, result))
    compare("program = packed", reference, outputs_packed, 1e-10)


def test_a_layer_that_lost_everything(net: Any, randomized: Any) -> None:
    _, program, _, _, _ = packed(CASES["3x3"], net, randomized)
    emptied = program.with_tensors({"a.weight": torch.zeros_like(program.tensors["a.weight"])})
    result = PackBlocks({"a.weight": Form(FormKind.PACKED, 4)})(emptied).program
    compare(
        "masked = packed",
        outputs_of(emptied.module(), program.example_inputs),
        outputs_of(result.module(), program.example_inputs),
        1e-12,
    )
    assert not result.tensors["a.values"].any()


@pytest.mark.parametrize(
    "case",
    [
        (lambda m, x: F.conv2d(x, m.a.weight, m.a.bias * 2), {"a": nn.Conv2d(6, 4, 1)}, IMAGE),
        only(nn.Conv2d(6, 8, 2, padding="same")),
        only(nn.Conv1d(6, 8, 3), (6, 9)),
    ],
    ids=["computed bias", "padding of unlike sides", "one dimension"],
)
def test_what_is_left_alone(case: Case, net: Any, randomized: Any) -> None:
    assert not packed(case, net, randomized)[4]
