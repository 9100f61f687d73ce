"""Attention, normalisation of groups and rearranged channels: what goes together, and slim equal to masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.ir.program import capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.analysis.label_indices import label_indices
from slrc.pipeline import structure
from slrc.sparsity.choices import Attention
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Channel

F = nn.functional
IMAGE, TOKENS = (4, 4, 4), (5, 4)
HEADS, HEAD_WIDTH = 3, 6
WIDTH = HEADS * HEAD_WIDTH
Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module | nn.Parameter], tuple[int, ...]]


def split_heads(y: Tensor, heads: int = HEADS) -> Tensor:
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def separate(m: Any, x: Tensor) -> Tensor:
    q, k, v = (split_heads(layer(x)) for layer in (m.q, m.k, m.v))
    return m.o(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(-1, 5, 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def selected(m: Any, x: Tensor) -> Tensor:
    qkv = m.qkv(x).view(-1, 5, 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0] * HEAD_WIDTH**-0.5, qkv[1], qkv[2]
    return m.o(merge_heads((q @ k.transpose(-2, -1)).softmax(-1) @ v))


def biased(m: Any, x: Tensor) -> Tensor:
    """A bias for each head, read from a table by position."""
    q, k, v = m.qkv(x).view(-1, 5, 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    position = torch.arange(5)[:, None] - torch.arange(5)[None] + 4
    bias = m.table[position.view(-1)].view(5, 5, HEADS).permute(2, 0, 1).unsqueeze(0)
    return m.o(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


def with_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(-1, 5, 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return m.o(merge_heads(torch.einsum("bhij,bhjd->bhid", weights, v)))


def normalised(m: Any, x: Tensor) -> Tensor:
    """Cosine attention: queries and keys of unit length."""
    q, k, v = (split_heads(layer(x)) for layer in (m.q, m.k, m.v))
    y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale).softmax(-1) @ v
    return m.o(merge_heads(y))


def grouped_query(m: Any, x: Tensor) -> Tensor:
    q, k, v = split_heads(m.q(x), 6), split_heads(m.k(x), 3), split_heads(m.v(x), 3)
    return m.o(merge_heads(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def qkv() -> dict[str, nn.Module | nn.Parameter]:
    return {"qkv": nn.Linear(4, 3 * WIDTH), "o": nn.Linear(WIDTH, 3)}


def q_k_v(queries: int = WIDTH, keys: int = WIDTH) -> dict[str, nn.Module | nn.Parameter]:
    layers = {"q": nn.Linear(4, queries), "k": nn.Linear(4, keys), "v": nn.Linear(4, keys)}
    return {**layers, "o": nn.Linear(queries, 3)}


ATTENTION: dict[str, Case] = {
    "separate q, k, v": (separate, q_k_v(), TOKENS),
    "fused qkv": (fused, qkv(), TOKENS),
    "selected from qkv": (selected, qkv(), TOKENS),
    "relative position bias": (biased, {**qkv(), "table": nn.Parameter(torch.zeros(9, HEADS))}, TOKENS),
    "einsum": (with_einsum, qkv(), TOKENS),
    "cosine": (normalised, {**q_k_v(), "scale": nn.Parameter(torch.ones(HEADS, 1, 1))}, TOKENS),
}
OTHERS: dict[str, Case] = {
    "group norm": (
        lambda m, x: m.o(F.relu(m.n(m.a(x)))),
        {"a": nn.Conv2d(4, 16, 1), "n": nn.GroupNorm(4, 16), "o": nn.Conv2d(16, 3, 1)},
        IMAGE,
    ),
    "instance norm": (
        lambda m, x: m.o(m.n(m.a(x))),
        {"a": nn.Conv2d(4, 8, 3, padding=1), "n": nn.InstanceNorm2d(8, affine=True), "o": nn.Conv2d(8, 3, 1)},
        IMAGE,
    ),
    "root mean square norm": (
        lambda m, x: x + m.o(F.silu(m.a(m.n(x))) * m.b(m.n(x))),
        {"n": nn.RMSNorm(4), "a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "o": nn.Linear(8, 4)},
        TOKENS,
    ),
    "pixel shuffle": (
        lambda m, x: m.o(F.pixel_shuffle(m.a(x), 2)),
        {"a": nn.Conv2d(4, 16, 1), "o": nn.Conv2d(4, 3, 1)},
        IMAGE,
    ),
    "pixel unshuffle": (
        lambda m, x: m.o(F.pixel_unshuffle(m.a(x), 2)),
        {"a": nn.Conv2d(4, 6, 1), "o": nn.Conv2d(24, 3, 1)},
        IMAGE,
    ),
    "gated linear unit": (lambda m, x: m.o(F.glu(m.a(x))), {"a": nn.Linear(4, 12), "o": nn.Linear(6, 3)}, TOKENS),
    "repeat": (
        lambda m, x: m.o(m.a(x).repeat(1, 2, 1, 1)),
        {"a": nn.Conv2d(4, 6, 1), "o": nn.Conv2d(12, 3, 1)},
        IMAGE,
    ),
    "stack": (
        lambda m, x: m.o(torch.stack([m.a(x), m.b(x)], 1).mean(1)),
        {"a": nn.Conv2d(4, 6, 1), "b": nn.Conv2d(4, 6, 1), "o": nn.Conv2d(6, 3, 1)},
        IMAGE,
    ),
    "roll of positions": (
        lambda m, x: m.o(torch.roll(m.a(x), (1, 2), (2, 3))),
        {"a": nn.Conv2d(4, 6, 1), "o": nn.Conv2d(6, 3, 1)},
        IMAGE,
    ),
    "token mixing": (
        lambda m, x: m.o((x.transpose(1, 2) + m.b(F.gelu(m.a(x.transpose(1, 2))))).transpose(1, 2)),
        {"a": nn.Linear(5, 8), "b": nn.Linear(8, 5), "o": nn.Linear(4, 3)},
        TOKENS,
    ),
    "norm over removed features": (
        lambda m, x: m.o(m.a(x)) * torch.linalg.vector_norm(m.a(x), dim=-1, keepdim=True),
        {"a": nn.Linear(4, 8), "o": nn.Linear(8, 3)},
        TOKENS,
    ),
}


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_slim_equals_masked(
    name: str, attention: Attention, keep: int, captured: Any, slim_equals_masked: Any
) -> None:
    model, program = captured(ATTENTION[name])
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False, attention=attention)
    assert {c.groups for c in plan} == {HEADS if attention is Attention.HEADS else HEAD_WIDTH}
    kept = tuple(c.model_copy(update={"keep": keep}) for c in plan)
    slim = slim_equals_masked(model, program, plan.model_copy(update={"constraints": kept}))
    width = keep * (HEAD_WIDTH if attention is Attention.HEADS else HEADS)
    assert tuple(slim.tensors["o.weight"].shape) == (3, width)


def test_query_heads_go_with_the_key_head_that_they_share(captured: Any, slim_equals_masked: Any) -> None:
    case: Case = (grouped_query, q_k_v(queries=6 * HEAD_WIDTH, keys=3 * HEAD_WIDTH), TOKENS)
    model, program = captured(case)
    plan = allocate_sparsity(program, Channel(), 0.3, keep_ends=False)
    assert [(c.groups, c.keep) for c in plan] == [(3, 2)]
    slim = slim_equals_masked(model, program, plan)
    assert {n: tuple(t.shape) for n, t in slim.tensors.items() if n.endswith("weight")} == {
        "q.weight": (4 * HEAD_WIDTH, 4),
        "k.weight": (2 * HEAD_WIDTH, 4),
        "v.weight": (2 * HEAD_WIDTH, 4),
        "o.weight": (3, 4 * HEAD_WIDTH),
    }


def repeated_keys(m: Any, x: Tensor) -> Tensor:
    """Keys and values written out for every query that shares them."""
    q, k, v = split_heads(m.q(x), 6), split_heads(m.k(x), 3), split_heads(m.v(x), 3)
    k, v = (y[:, :, None].expand(-1, 3, 2, 5, HEAD_WIDTH).reshape(-1, 6, 5, HEAD_WIDTH) for y in (k, v))
    return m.o(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def test_query_heads_go_with_a_key_head_that_is_repeated(captured: Any, slim_equals_masked: Any) -> None:
    case: Case = (repeated_keys, q_k_v(queries=6 * HEAD_WIDTH, keys=3 * HEAD_WIDTH), TOKENS)
    model, program = captured(case)
    plan = allocate_sparsity(program, Channel(), 0.3, keep_ends=False)
    assert [(c.groups, c.keep) for c in plan] == [(3, 2)]
    slim_equals_masked(model, program, plan)


def test_values_narrower_than_keys(captured: Any) -> None:
    """The kernel that attention runs by, and how its result lies in memory, depend on the widths."""
    model, program = captured((separate, q_k_v(), TOKENS))
    model, program = model.float(), capture(model.float(), (torch.randn(2, *TOKENS),))
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False, attention=Attention.WIDTH, skip=["v"])
    masks = Masks.project(plan, program.tensors)
    slim = structure(program, plan, masks)
    masks.apply_(dict(model.named_parameters()))
    x = torch.randn(3, *TOKENS)
    torch.testing.assert_close(slim.module()(x), model(x), atol=1e-4, rtol=1e-4)
    assert slim.tensors["q.weight"].shape != slim.tensors["v.weight"].shape


def test_multi_head_attention_of_torch(captured: Any, slim_equals_masked: Any) -> None:
    """Its view merges the heads with the batch: the width of a head is what can go."""
    layers = {"i": nn.Linear(4, 12), "a": nn.MultiheadAttention(12, 2, batch_first=True), "o": nn.Linear(12, 3)}
    case: Case = (lambda m, x: m.o(m.a(m.i(x), m.i(x), m.i(x), need_weights=False)[0]), layers, TOKENS)
    model, program = captured(case)
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False)
    widths = {c.members[0].tensor: c.groups for c in plan}
    assert widths["a.in_proj_weight"] == 6
    slim_equals_masked(model, program, plan)


@pytest.mark.parametrize("name", OTHERS)
def test_slim_equals_masked(name: str, captured: Any, slim_equals_masked: Any) -> None:
    model, program = captured(OTHERS[name])
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False)
    assert plan.constraints
    assert all(c.keep < c.groups for c in plan)
    slim_equals_masked(model, program, plan)


def test_a_group_of_a_group_norm_goes_whole(captured: Any) -> None:
    _, program = captured(OTHERS["group norm"])
    assert [(g.name, g.units) for g in label_indices(program).groups] == [("a", 4)]


@pytest.mark.parametrize(("multiple", "kept"), [(1, 5), (4, 8), (8, 8), (16, 10)])
def test_kept_widths_are_rounded_up(multiple: int, kept: int, captured: Any) -> None:
    case: Case = (lambda m, x: m.o(m.a(x)), {"a": nn.Linear(4, 10), "o": nn.Linear(10, 3)}, TOKENS)
    _, program = captured(case)
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False, round_to=multiple)
    assert [c.keep for c in plan] == [kept]
    assert ("rounded up" in plan.shortfall) == (kept > 5)


def test_a_head_that_is_wide_enough_needs_no_rounding(captured: Any) -> None:
    case: Case = (
        lambda m, x: separate(m, x),
        {**q_k_v(HEADS * 8, HEADS * 8)},
        TOKENS,
    )
    _, program = captured(case)
    plan = allocate_sparsity(program, Channel(), 0.6, keep_ends=False, round_to=8)
    assert [(c.groups, c.keep) for c in plan] == [(3, 1)]
