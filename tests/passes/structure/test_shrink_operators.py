"""Slim equals masked for one operator at a time: what removable channels pass through, and what pins them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.analysis.index_rules.attention import einsum_terms
from slrc.passes.analysis.label_indices import label_indices
from slrc.sparsity.patterns import Channel

F = nn.functional
IMAGE, TOKENS, FLAT = (4, 4, 4), (5, 4), (4,)
Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module | nn.Parameter], tuple[int, ...]]


def image(run: Callable[[Any, Tensor], Tensor], out: int = 8, width: int = 8) -> Case:
    """`a` makes `width` channels, `run` turns them into `out`, `o` reads them; `b` is another like `a`."""
    layers = {"a": nn.Conv2d(4, width, 1), "b": nn.Conv2d(4, width, 1), "o": nn.Conv2d(out, 3, 1)}
    return lambda m, x: m.o(run(m, x)), layers, IMAGE


def tokens(run: Callable[[Any, Tensor], Tensor], out: int = 8, **more: nn.Module | nn.Parameter) -> Case:
    """The same for tokens of 8 features."""
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "o": nn.Linear(out, 3)}
    return lambda m, x: m.o(run(m, x)), {**layers, **more}, TOKENS


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def with_zeroed_part(y: Tensor) -> Tensor:
    y = y.clone()
    y[..., 2:4].zero_()
    y[..., 6:].fill_(0.5)
    return y


def with_replaced_part(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[..., 2:6] = m.b(x)[..., 4:]
    return y


def with_one_replaced(m: Any, x: Tensor) -> Tensor:
    """One position of five, all features."""
    y = m.a(x).clone()
    y[:, 2] = m.b(x)[:, 0]
    return y


def split_off_one(m: Any, x: Tensor) -> Tensor:
    """A part of one index stays; the other parts shrink."""
    query, key, value = m.a(x).split([1, 4, 3], dim=-1)
    return torch.cat([query.sigmoid() * key, F.relu(value)], -1)


def selective_kernels(m: Any, x: Tensor) -> Tensor:
    """Two paths, mixed by weights for each channel that add up to one."""
    paths = torch.stack([m.a(x), m.b(x)], 1)
    weights = m.w(paths.sum(1).mean((2, 3), keepdim=True)).view(-1, 2, 8, 1, 1).softmax(1)
    return m.o((paths * weights).sum(1))


def positions_of_heads(m: Any, x: Tensor) -> Tensor:
    """Heads in groups with convolutions of their own, back to heads: the same labels as before."""
    y = m.a(x).view(-1, 4, 2, 16)
    left, right = y.reshape(-1, 8, 4, 4).split([2, 6], 1)
    mixed = torch.cat([m.left(left), m.right(right)], 1).view(-1, 4, 2, 16)
    return m.o((y @ y.transpose(2, 3) @ mixed).reshape(-1, 8, 4, 4))


def windows(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unfold(2, 2, 2).unfold(3, 2, 2)
    return y.amax((4, 5))


ROWS = torch.tensor([4, 0, 2])


def put(y: Tensor, indices: Any, values: Tensor | float) -> Tensor:
    y = y.clone()
    y[indices] = values
    return y


def canvas(x: Tensor, cells: int = 7) -> Tensor:
    return x.new_zeros(x.shape[0], cells, 8)


def written_for_each_feature(x: Tensor, index: Tensor = ROWS) -> Tensor:
    return index[None, :, None].expand(x.shape[0], -1, 8)


REMOVABLE: dict[str, Case] = {
    "im2col": image(lambda m, x: F.unfold(m.a(x), 3, padding=1).view(-1, 72, 4, 4), out=72),
    "im2col of a strided window": image(lambda m, x: F.unfold(m.a(x), (2, 1), stride=2).view(-1, 16, 2, 2), out=16),
    "im2col and col2im": image(lambda m, x: F.fold(F.unfold(m.a(x), 2, stride=2) * 2, 4, 2, stride=2)),
    "col2im": image(lambda m, x: F.fold(m.a(x).flatten(2), 8, 2, stride=2), out=2),
    "windows of positions": image(windows),
    "selective kernels": (
        selective_kernels,
        {name: nn.Conv2d(i, o, 1) for name, i, o in (("a", 4, 8), ("b", 4, 8), ("w", 8, 16), ("o", 8, 3))},
        IMAGE,
    ),
    "convolutions on some heads each": (
        positions_of_heads,
        {
            "a": nn.Conv2d(4, 8, 1),
            "left": nn.Conv2d(2, 2, 3, padding=1, groups=2),
            "right": nn.Conv2d(6, 6, 5, padding=2, groups=6),
            "o": nn.Conv2d(8, 3, 1),
        },
        IMAGE,
    ),
    "normalised features": tokens(lambda m, x: F.normalize(m.a(x), dim=-1)),
    "mean, written out": image(lambda m, x: m.a(x) * m.a(x).mean(1, keepdim=True).expand(-1, 8, -1, -1)),
    "deviation of each channel": image(lambda m, x: m.a(x) * m.a(x).std((2, 3), keepdim=True)),
    "smooth maximum of each channel": image(lambda m, x: m.a(x) * m.a(x).logsumexp((2, 3), keepdim=True)),
    "norm by the statistics of its input": (
        lambda m, x: m.o(m.n(m.a(x))),
        {"a": nn.Conv2d(4, 8, 1), "n": nn.BatchNorm2d(8, track_running_stats=False), "o": nn.Conv2d(8, 3, 1)},
        IMAGE,
    ),
    "channel shuffle": image(lambda m, x: F.channel_shuffle(m.a(x), 2)),
    "nearest upsampling": image(lambda m, x: F.interpolate(m.a(x), scale_factor=2)),
    "exact upsampling": image(lambda m, x: F.interpolate(m.a(x), size=7, mode="nearest-exact")),
    "antialiased upsampling": image(lambda m, x: F.interpolate(m.a(x), size=7, mode="bicubic", antialias=True)),
    "upsampling of sequences": image(
        lambda m, x: F.interpolate(m.a(x).flatten(2), 64, mode="linear").view(-1, 8, 8, 8)
    ),
    "pooling of volumes": image(lambda m, x: F.adaptive_max_pool3d(m.a(x)[:, :, None], (1, 2, 2)).squeeze(2)),
    "sampling at a grid": (
        lambda m, x: m.o(F.grid_sample(m.a(x), torch.tanh(x[:, :2]).permute(0, 2, 3, 1), align_corners=False)),
        {"a": nn.Conv2d(4, 8, 1), "o": nn.Conv2d(8, 3, 1)},
        IMAGE,
    ),
    "grouped transposed convolution": (
        lambda m, x: m.o(m.t(m.a(x))),
        {"a": nn.Conv2d(4, 8, 1), "t": nn.ConvTranspose2d(8, 12, 2, 2, groups=2), "o": nn.Conv2d(12, 3, 1)},
        IMAGE,
    ),
    "depthwise transposed convolution": (
        lambda m, x: m.o(m.t(m.a(x))),
        {"a": nn.Conv2d(4, 8, 1), "t": nn.ConvTranspose2d(8, 8, 2, 2, groups=8), "o": nn.Conv2d(8, 3, 1)},
        IMAGE,
    ),
    "depthwise transposed convolution with two outputs each": (
        lambda m, x: m.o(m.t(m.a(x))),
        {"a": nn.Conv2d(4, 8, 1), "t": nn.ConvTranspose2d(8, 16, 2, 2, groups=8), "o": nn.Conv2d(16, 3, 1)},
        IMAGE,
    ),
    "zeroed part": tokens(lambda m, x: with_zeroed_part(m.a(x))),
    "replaced part": tokens(with_replaced_part),
    "one replaced position": tokens(with_one_replaced),
    "part of one index in a split": tokens(split_off_one, out=7),
    "index on a later dimension": tokens(lambda m, x: m.a(x)[:, torch.tensor([0, 3, 3])]),
    "index in front of a removable dimension": tokens(lambda m, x: m.a(x)[torch.tensor([1, 0])]),
    "indices apart": image(
        lambda m, x: (
            m.a(x).permute(0, 2, 1, 3)[:, torch.tensor([0, 2]), :, torch.tensor([1, 3])].permute(1, 2, 0)[..., None]
        )
    ),
    "indices side by side": image(lambda m, x: m.a(x)[:, :, torch.tensor([[0], [2]]), torch.tensor([[1, 3, 0]])]),
    "index select": tokens(lambda m, x: m.a(x).index_select(1, torch.tensor([4, 0]))),
    "gather": tokens(lambda m, x: m.a(x).gather(1, written_for_each_feature(x))),
    "gather by an index made of data": tokens(lambda m, x: m.a(x).gather(1, m.b(x).argsort(1))),
    "scatter": tokens(lambda m, x: canvas(x).scatter(1, written_for_each_feature(x), m.a(x)[:, :3])),
    "scatter by a repeated index": tokens(
        lambda m, x: m.b(x).scatter(1, ROWS[None, :, None].repeat(x.shape[0], 1, 8), m.a(x)[:, :3])
    ),
    "scatter of a number": tokens(lambda m, x: m.a(x).scatter(1, written_for_each_feature(x), 0.5)),
    "scatter add": tokens(
        lambda m, x: canvas(x).scatter_add(1, written_for_each_feature(x, torch.tensor([1, 6, 1, 0, 1])), m.a(x))
    ),
    "scatter reduce": tokens(
        lambda m, x: canvas(x).scatter_reduce(
            1, written_for_each_feature(x, torch.tensor([1, 6, 1])), m.a(x)[:, :3], "amax"
        )
    ),
    "put": tokens(lambda m, x: put(canvas(x), (slice(None), ROWS), m.a(x)[:, :3])),
    "put into columns, as pillars on a canvas": tokens(
        lambda m, x: put(x.new_zeros(8, 40), (slice(None), 3 * torch.arange(10)), m.a(x[:2]).flatten(0, 1).t()).t()
    ),
    "put in one place, broadcast": tokens(lambda m, x: put(m.a(x), (slice(None), ROWS), m.b(x)[:, :1])),
    "put by indices apart": image(
        lambda m, x: put(
            m.a(x).permute(0, 2, 1, 3), (slice(None), ROWS[1:], slice(None), ROWS[1:]), m.b(x).mean((2, 3))
        ).permute(0, 2, 1, 3)
    ),
    "added to": tokens(
        lambda m, x: m.b(x).index_put((torch.tensor([0, 0]),), m.a(x)[:1].expand(2, -1, -1), accumulate=True)
    ),
    "embedding": tokens(lambda m, x: m.a(x) + m.e(torch.arange(5)), e=nn.Embedding(7, 8)),
    "largest positions": tokens(lambda m, x: m.a(x).topk(2, dim=1)[0]),
    "sorted positions": tokens(lambda m, x: m.a(x).sort(dim=1, descending=True)[0]),
    "greatest of all positions": tokens(lambda m, x: m.a(x).max(dim=1)[0]),
    "greatest of all positions, kept": tokens(lambda m, x: m.a(x) - m.b(x).max(1, keepdim=True)[0]),
    "greater of two": tokens(lambda m, x: torch.max(m.a(x), m.b(x))),
    "flipped features": tokens(lambda m, x: torch.cat([m.a(x).flip(-1), m.a(x)], -1), out=16),
    "flipped positions": tokens(lambda m, x: m.a(x).flip(1)),
    "every feature twice": tokens(lambda m, x: m.a(x).repeat_interleave(2, -1), out=16),
    "every position twice": tokens(lambda m, x: m.a(x).repeat_interleave(2, 1)),
    "tiled": tokens(lambda m, x: m.a(x).tile(1, 2), out=16),
    "addcmul": tokens(lambda m, x: torch.addcmul(m.a(x), m.b(x), m.s, value=0.5), s=parameter(8)),
    "addcdiv": tokens(lambda m, x: torch.addcdiv(m.a(x), m.b(x), m.s.exp()), s=parameter(8)),
    "scale and shift by addcmul": tokens(lambda m, x: torch.addcmul(m.t, m.s, m.a(x)), s=parameter(8), t=parameter(8)),
    "lerp": tokens(lambda m, x: torch.lerp(m.a(x), m.b(x), 0.3)),
    "lerp by a tensor": tokens(lambda m, x: torch.lerp(m.a(x), m.b(x), m.s), s=parameter(8)),
    "where": tokens(lambda m, x: torch.where((m.a(x) > 0) & ~(m.b(x) > 1), m.a(x), m.b(x))),
    "power": tokens(lambda m, x: m.a(x) ** 2 @ (2 ** m.b(x)).transpose(1, 2), out=5),
    "clip and threshold": tokens(lambda m, x: F.threshold(m.a(x).clip(-1, 1).clamp_max(0.8), -0.5, 0.3)),
    "remainder": tokens(lambda m, x: m.a(x).remainder(1.5) + torch.atan2(m.b(x), m.a(x).exp())),
    "zeros of the same shape": tokens(lambda m, x: torch.cat([m.a(x), torch.zeros_like(m.b(x))], -1), out=16),
    "ones of the same shape": tokens(lambda m, x: (m.a(x) + torch.ones_like(m.b(x))) * torch.full_like(m.a(x), 0.5)),
    "zeros of a written size": tokens(lambda m, x: torch.cat([x.new_zeros(x.shape[0], 1, 8), m.a(x)], 1)),
    "ones of a written size": tokens(lambda m, x: m.a(x) * torch.ones(8, dtype=x.dtype) + x.new_full((5, 8), 0.5)),
    "running sum of features": tokens(lambda m, x: m.a(x).cumsum(-1)),
    "running sum of positions": tokens(lambda m, x: m.a(x).sigmoid().cumsum(1)),
    "weight on the right": tokens(lambda m, x: m.a(x) @ m.w, out=6, w=parameter(8, 6)),
    "weight transposed": tokens(lambda m, x: (m.a(x).flatten(0, 1) @ m.w.t()).view(-1, 5, 6), out=6, w=parameter(6, 8)),
    "weight on the left": tokens(lambda m, x: m.w @ m.a(x), w=parameter(6, 5)),
    "weight for each head": (
        lambda m, x: m.o((m.a(x).view(-1, 5, 2, 4).transpose(1, 2) @ m.w).transpose(1, 2).flatten(2)),
        {"a": nn.Linear(4, 8), "w": parameter(2, 4, 6), "o": nn.Linear(12, 3)},
        TOKENS,
    ),
    "product with a vector": tokens(lambda m, x: (m.a(x) @ m.s)[..., None] * m.b(x), s=parameter(8)),
    "addmm": (
        lambda m, x: m.o(torch.addmm(m.s, m.a(x), m.w)),
        {"a": nn.Linear(4, 8), "s": parameter(6), "w": parameter(8, 6), "o": nn.Linear(6, 3)},
        FLAT,
    ),
    "baddbmm": tokens(lambda m, x: torch.baddbmm(m.b(x), m.w.expand(x.shape[0], 5, 5), m.a(x)), w=parameter(1, 5, 5)),
    "einsum with the rest of the dimensions": tokens(
        lambda m, x: torch.einsum("...i,ij->...j", m.a(x), m.w), out=6, w=parameter(8, 6)
    ),
    "einsum without a result": tokens(lambda m, x: torch.einsum("bti,io", m.a(x), m.w).mT, out=6, w=parameter(8, 6)),
    "einsum with one head for all": tokens(
        lambda m, x: torch.einsum(
            "bthd,bshd->bths", m.a(x).view(-1, 5, 2, 4), m.b(x).view(-1, 5, 2, 4)[:, :, :1] * 2
        ).flatten(2),
        out=10,
    ),
    "lstm": (
        lambda m, x: m.o(m.r(m.a(x))[0]),
        {"a": nn.Linear(4, 8), "r": nn.LSTM(8, 6, batch_first=True), "o": nn.Linear(6, 3)},
        TOKENS,
    ),
    "two layers of an lstm in both directions": (
        lambda m, x: m.o(m.r(m.a(x))[0]),
        {"a": nn.Linear(4, 8), "r": nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), "o": nn.Linear(12, 3)},
        TOKENS,
    ),
    "gru without biases": (
        lambda m, x: m.o(m.r(m.a(x))[1][0]),
        {"a": nn.Linear(4, 8), "r": nn.GRU(8, 6, bias=False, batch_first=True), "o": nn.Linear(6, 3)},
        TOKENS,
    ),
    "plain recurrence from a learned state": (
        lambda m, x: m.o(m.r(m.a(x), m.h.expand(1, x.shape[0], 6).contiguous())[0]),
        {"a": nn.Linear(4, 8), "r": nn.RNN(8, 6, batch_first=True), "h": parameter(1, 1, 6), "o": nn.Linear(6, 3)},
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", REMOVABLE)
def test_slim_equals_masked(name: str, captured: Any, slim_equals_masked: Any) -> None:
    """At half of the width, and down to one index of every group."""
    model, program = captured(REMOVABLE[name])
    assert label_indices(program).unruled == {}
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False)
    assert any(where.tensor == "a.weight" for c in plan for where in c.members)
    assert all(c.keep < c.groups for c in plan)
    slim_equals_masked(model, program, plan)
    last = tuple(c.model_copy(update={"keep": 1}) for c in plan)
    slim_equals_masked(model, program, plan.model_copy(update={"constraints": last}))


PINNED: dict[str, tuple[Case, str]] = {
    "indexed": (tokens(lambda m, x: m.a(x)[..., torch.tensor([0, 2])], out=2), "indexed"),
    "gathered": (tokens(lambda m, x: m.a(x).gather(2, x.argsort(2).long()), out=4), "indexed"),
    "scattered from": (
        tokens(lambda m, x: canvas(x).scatter(2, torch.arange(7, -1, -1).expand(x.shape[0], 5, 8), m.a(x))),
        "indexed",
    ),
    "gathered for some features": (
        tokens(lambda m, x: m.a(x).gather(1, written_for_each_feature(x)[..., 2:]), out=6),
        "meets a fixed size in gather.default",
    ),
    "put into some features": (
        tokens(lambda m, x: put(m.a(x), (slice(None), slice(None), ROWS), 1.0)),
        "indexed",
    ),
    "put by a mask": (tokens(lambda m, x: put(m.a(x), x[..., 0] > 0, 1.0)), "no rule for index_put"),
    "used as an index": (tokens(lambda m, x: m.t[m.a(x).argmax(1) % 2], t=parameter(2, 8)), "used as an index"),
    "largest of the features": (tokens(lambda m, x: m.a(x).topk(3)[0], out=3), "compared by topk"),
    "greatest of all": (tokens(lambda m, x: m.a(x) - m.a(x).max()), "compared by max"),
    "any of the features": (tokens(lambda m, x: m.a(x) * (m.a(x) > 0).any(-1, keepdim=True)), "compared by any"),
    "numbered": (tokens(lambda m, x: m.a(x) + torch.arange(8)), "meets a fixed size in add.Tensor"),
    "running sum over what is not zero": (
        tokens(lambda m, x: m.a(x).sigmoid().cumsum(-1)),
        "summed over where removed indices are not zero",
    ),
    "divided by": (tokens(lambda m, x: m.a(x) / m.d, d=parameter(8)), "div where removed indices are zero"),
    "logarithm": (tokens(lambda m, x: m.a(x).abs().log()), "log where removed indices are zero"),
    "negative power": (tokens(lambda m, x: m.a(x) ** -2), "pow where removed indices are zero"),
    "deviation of the features": (tokens(lambda m, x: m.a(x) * m.a(x).std(-1, keepdim=True)), "reduced over by std"),
    "running product": (tokens(lambda m, x: m.a(x).cumprod(-1)), "no rule for cumprod"),
    "repeated by a tensor": (
        tokens(lambda m, x: m.a(x) + m.a(x).repeat_interleave(torch.tensor([2, 1, 0, 1] * 2), -1).sum()),
        "no rule for repeat_interleave",
    ),
    "in windows": (tokens(lambda m, x: m.a(x).unfold(2, 2, 2).flatten(2)), "taken in windows"),
    "one channel after col2im": (
        image(lambda m, x: F.fold(m.a(x).flatten(2), 8, 2, stride=2), out=1, width=4),
        "a part with one index only",
    ),
    "one feature after a gate": (
        (lambda m, x: m.o(F.glu(m.a(x))), {"a": nn.Linear(4, 2), "o": nn.Linear(1, 3)}, TOKENS),
        "a part with one index only",
    ),
    "diagonal": (
        tokens(lambda m, x: torch.einsum("bii->bi", m.a(x).mT @ m.b(x))),
        "no rule for einsum",
    ),
    "state that does not start at zero": (
        (
            lambda m, x: m.o(m.r(x, torch.ones(1, x.shape[0], 6, dtype=x.dtype))[0]),
            {"r": nn.GRU(4, 6, batch_first=True), "o": nn.Linear(6, 3)},
            TOKENS,
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_cannot_go_is_pinned(name: str, captured: Any) -> None:
    case, reason = PINNED[name]
    labels = label_indices(captured(case)[1])
    if reason:
        assert {p.layer: p.reason for p in labels.pinned}["a"] == reason
    assert not any(group.name in ("a", "r.weight_ih_l0") for group in labels.groups)


def test_a_recurrent_unit_goes_from_every_gate_and_both_directions(captured: Any) -> None:
    _, program = captured(REMOVABLE["two layers of an lstm in both directions"])
    state = next(g for g in label_indices(program).groups if g.name != "a")
    assert state.units == 6
    rows = next(s for s in state.members if s.tensor == "r.weight_ih_l0")
    assert rows.index is not None
    assert rows.index[:4] == (0, 6, 12, 18)
    assert {s.tensor for s in state.followers} == {
        "o.weight",
        *(f"r.weight_hh_l{k}{way}" for k in (0, 1) for way in ("", "_reverse")),
        *(f"r.weight_ih_l1{way}" for way in ("", "_reverse")),
    }


@pytest.mark.parametrize(
    ("equation", "ranks", "terms", "out"),
    [
        ("ij,jk->ik", [2, 2], ["ij", "jk"], "ik"),
        ("b i j , b k j", [3, 3], ["bij", "bkj"], "ik"),
        ("...i,ij->...j", [4, 2], ["012i", "ij"], "012j"),
        ("...i,...i->...", [3, 1], ["01i", "i"], "01"),
        ("...i,ij", [2, 2], ["0i", "ij"], "0j"),
    ],
)
def test_letters_of_an_einsum(equation: str, ranks: list[int], terms: list[str], out: str) -> None:
    assert einsum_terms(equation, ranks) == (terms, out)
