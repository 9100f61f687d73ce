"""The slim program computes what the masked model computes, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from slrc.errors import PlanError
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.structure.apply_masks import ApplyMasks
from slrc.passes.structure.fold_batch_norm import FoldBatchNorm
from slrc.passes.structure.shrink_channels import ShrinkChannels
from slrc.sparsity.choices import Allocation
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Channel
from slrc.sparsity.plans import Plan
from slrc.verify import compare, outputs_of

F = nn.functional
IMAGE, TOKENS, FLAT = (4, 4, 4), (5, 4), (4,)
Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], tuple[int, ...]]


def conv(i: int, o: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, options.pop("kernel_size", 1), **options)


def tied() -> dict[str, Any]:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    return {"i": nn.Linear(4, 6), "a": a, "b": b, "o": nn.Linear(6, 3)}


def halves(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    return m.b(left) + m.c(right)


def glu(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, -1)
    return m.o(left * torch.sigmoid(right))


def gate(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(y * torch.sigmoid(m.up(torch.relu(m.down(y.mean((2, 3), keepdim=True))))))


def shuffle(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(y.view(-1, 2, 4, 4, 4).transpose(1, 2).reshape(-1, 8, 4, 4))


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = (q @ k.transpose(2, 3)).softmax(-1) @ v
    return m.o(y.transpose(1, 2).flatten(2))


def pooled_half(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(torch.cat([F.max_pool2d(y[:, :4], 3, 1, 1), y[:, 4:]], 1))


def both(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(torch.cat([y, y], 1))


def one_channel_gate(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(y * torch.sigmoid(m.g(y)))


def written_widths(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).view(2, 8, 16).reshape(2, 128)
    return m.o(F.relu(m.b(y)).view(2, 6, 1, 1).expand(2, 6, 4, 4))


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = torch.relu(m.a(x))
    return m.b(y) * m.o(y)


CASES: dict[str, Case] = {
    "chain": (lambda m, x: m.o(F.relu(m.n(m.a(x)))), {"a": conv(4, 8), "n": nn.BatchNorm2d(8), "o": conv(8, 3)}, IMAGE),
    "batch norm without scale": (
        lambda m, x: m.o(m.n(m.a(x))),
        {"a": conv(4, 8), "n": nn.BatchNorm2d(8, affine=False), "o": conv(8, 3)},
        IMAGE,
    ),
    "residual": (
        lambda m, x: m.o(m.b(F.relu(m.a(x))) + m.a(x)),
        {"a": conv(4, 8), "b": conv(8, 8), "o": conv(8, 3)},
        IMAGE,
    ),
    "depthwise": (
        lambda m, x: m.o(m.d(m.a(x))),
        {"a": conv(4, 8), "d": conv(8, 16, groups=8, kernel_size=3), "o": conv(16, 3)},
        IMAGE,
    ),
    "grouped": (
        lambda m, x: m.o(m.g(m.a(x))),
        {"a": conv(4, 8), "g": conv(8, 12, groups=2), "o": conv(12, 3)},
        IMAGE,
    ),
    "strided, same padding": (
        lambda m, x: m.o(m.b(m.a(x))),
        {
            "a": conv(4, 8, kernel_size=3, stride=2, dilation=2, padding=2),
            "b": conv(8, 8, kernel_size=3, padding="same", groups=8),
            "o": conv(8, 3),
        },
        IMAGE,
    ),
    "transposed": (
        lambda m, x: m.o(m.t(m.a(x))),
        {"a": conv(4, 8), "t": nn.ConvTranspose2d(8, 6, 2, 2), "o": conv(6, 3)},
        IMAGE,
    ),
    "one dimension": (
        lambda m, x: m.o(F.avg_pool1d(m.a(x), 2)),
        {"a": nn.Conv1d(5, 8, 1), "o": nn.Conv1d(8, 3, 1)},
        TOKENS,
    ),
    "flatten": (lambda m, x: m.o(m.a(x).flatten(1)), {"a": conv(4, 8), "o": nn.Linear(128, 3)}, IMAGE),
    "squeeze": (
        lambda m, x: m.o(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()),
        {"a": conv(4, 8), "o": nn.Linear(8, 3)},
        IMAGE,
    ),
    "concatenation": (
        lambda m, x: m.o(torch.cat([m.a(x), x, m.b(x)], 1)),
        {"a": conv(4, 4), "b": conv(4, 6), "o": conv(14, 3)},
        IMAGE,
    ),
    "concatenated with itself": (both, {"a": conv(4, 6), "o": conv(12, 3)}, IMAGE),
    "halves": (halves, {"a": conv(4, 8), "b": conv(4, 3), "c": conv(4, 3)}, IMAGE),
    "a pooled half": (pooled_half, {"a": conv(4, 8), "o": conv(8, 3)}, IMAGE),
    "gated linear unit": (glu, {"a": nn.Linear(4, 12), "o": nn.Linear(6, 3)}, TOKENS),
    "used twice": (used_twice, {"a": conv(4, 8), "b": conv(8, 3), "o": conv(8, 3)}, IMAGE),
    "one-channel convolution": (
        one_channel_gate,
        {"a": conv(4, 8), "g": conv(8, 1, kernel_size=3, padding=1), "o": conv(8, 3)},
        IMAGE,
    ),
    "reshape that hard-codes its widths": (
        written_widths,
        {"a": conv(4, 8), "b": nn.Linear(128, 6), "o": conv(6, 3)},
        IMAGE,
    ),
    "squeeze and excitation": (
        gate,
        {"a": conv(4, 8), "down": conv(8, 4), "up": conv(4, 8), "o": conv(8, 3)},
        IMAGE,
    ),
    "channel shuffle": (shuffle, {"a": conv(4, 8), "o": conv(8, 3)}, IMAGE),
    "step slice beside a removable part": (
        lambda m, x: m.o(torch.cat([m.a(x)[:, ::2], m.b(x)], 1)),
        {"a": conv(4, 8), "b": conv(4, 6), "o": conv(10, 3)},
        IMAGE,
    ),
    "parts of one index": (
        lambda m, x: m.o(m.a(x)[:, :1] * m.a(x)[:, 1:2] * m.a(x)[:, 2:]),
        {"a": conv(4, 8), "o": conv(6, 3)},
        IMAGE,
    ),
    "clamped by a parameter": (
        lambda m, x: m.o(torch.clamp(m.a(x), min=m.low)),
        {"a": conv(4, 8), "low": nn.Parameter(torch.zeros(8, 1, 1)), "o": conv(8, 3)},
        IMAGE,
    ),
    "prelu": (lambda m, x: m.o(m.p(m.a(x))), {"a": conv(4, 8), "p": nn.PReLU(8), "o": conv(8, 3)}, IMAGE),
    "module called twice": (
        lambda m, x: m.o(m.a(F.relu(m.a(m.i(x))))),
        {"i": nn.Linear(4, 6), "a": nn.Linear(6, 6), "o": nn.Linear(6, 3)},
        TOKENS,
    ),
    "tied weights": (lambda m, x: m.o(m.b(F.relu(m.a(m.i(x))))), tied(), TOKENS),
    "attention": (attention, {name: nn.Linear(4 if name != "o" else 8, 8) for name in "qkvo"}, TOKENS),
    "layer norm around a wide layer": (
        lambda m, x: x + m.o(F.gelu(m.a(m.n(x)))),
        {"n": nn.LayerNorm(4), "a": nn.Linear(4, 8), "o": nn.Linear(8, 4)},
        TOKENS,
    ),
    "product over removed features": (
        lambda m, x: m.o(m.a(x) @ torch.sigmoid(m.b(x)).transpose(1, 2)),
        {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "o": nn.Linear(5, 3)},
        TOKENS,
    ),
    "computed weight": (
        lambda m, x: m.o(F.linear(m.a(x), torch.sigmoid(m.w))),
        {"a": nn.Linear(4, 8), "w": nn.Parameter(torch.zeros(6, 8)), "o": nn.Linear(6, 3)},
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_slim_equals_masked(name: str, captured: Any, slim_equals_masked: Any) -> None:
    model, program = captured(CASES[name])
    plan = allocate_sparsity(program, Channel(), 0.5, allocation=Allocation.GLOBAL, keep_ends=False)
    slim_equals_masked(model, program, plan)
    last = tuple(c.model_copy(update={"keep": 1}) for c in plan)
    slim_equals_masked(model, program, plan.model_copy(update={"constraints": last}))


def test_dict_output(captured: Any, slim_equals_masked: Any) -> None:
    """Its outputs are pinned, what lies before them is not; its keys stay."""

    def run(m: Any, x: Tensor) -> dict[str, Any]:
        y = F.relu(m.a(x))
        return {"logits": m.o(y), "more": {"features": m.f(y), "both": [m.o(y), x]}}

    case: Any = (run, {"a": conv(4, 8), "f": conv(8, 6), "o": conv(8, 3)}, IMAGE)
    model, program = captured(case)
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False)
    assert [(c.name, c.groups) for c in plan] == [("a", 8)]
    slim = slim_equals_masked(model, program, plan)
    out = slim.module()(*program.example_inputs)
    assert list(out) == ["logits", "more"]
    assert list(out["more"]) == ["features", "both"]
    assert out["more"]["features"].shape == (2, 6, 4, 4)


def chain(captured: Any, keep: int = 5) -> tuple[nn.Module, Program, Plan, Masks]:
    model, program = captured(CASES["chain"])
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False)
    plan = plan.model_copy(update={"constraints": tuple(c.model_copy(update={"keep": keep}) for c in plan)})
    return model, program, plan, Masks.project(plan, program.tensors)


def test_every_tensor_of_the_group_is_narrowed(captured: Any) -> None:
    _, program, plan, masks = chain(captured)
    slim, modified = ShrinkChannels(plan, masks)(program)
    assert modified
    assert {name: tuple(t.shape) for name, t in slim.tensors.items() if t.dim()} == {
        "a.weight": (5, 4, 1, 1),
        "a.bias": (5,),
        "n.weight": (5,),
        "n.bias": (5,),
        "n.running_mean": (5,),
        "n.running_var": (5,),
        "o.weight": (3, 5, 1, 1),
        "o.bias": (3,),
    }
    kept = masks.surviving_units(plan.constraints[0])
    assert torch.equal(slim.tensors["n.running_var"], program.tensors["n.running_var"][kept])
    assert slim.macs == (5 * 4 + 3 * 5) * 16


def test_nothing_pruned_is_left_alone(captured: Any) -> None:
    _, program, plan, masks = chain(captured, keep=8)
    slim, modified = ShrinkChannels(plan, masks)(program)
    assert not modified
    assert slim is program


def test_the_program_that_went_in_is_not_changed(captured: Any) -> None:
    _, program, plan, masks = chain(captured)
    before = {name: t.clone() for name, t in program.tensors.items()}
    ShrinkChannels(plan, masks)(program)
    assert all(torch.equal(t, before[name]) for name, t in program.tensors.items())
    assert program.tensors["a.weight"].shape[0] == 8


@pytest.mark.parametrize("example_batch", [1, 2])
def test_the_batch_stays_dynamic(net: Any, randomized: Any, masked_outputs: Any, example_batch: int) -> None:
    run, layers, shape = CASES["flatten"]
    model = randomized(net(run, **layers))
    program = capture(model, (torch.randn(example_batch, *shape, dtype=torch.float64),))
    plan = allocate_sparsity(program, Channel(), 0.5, keep_ends=False)
    masks = Masks.project(plan, program.tensors)
    slim = ShrinkChannels(plan, masks)(program).program
    assert slim.batch_is_dynamic
    other = (torch.randn(7, *shape, dtype=torch.float64),)
    masked = ApplyMasks(masks)(program).program
    compare("batch of 7", outputs_of(masked.module(), other), outputs_of(slim.module(), other), 1e-9)


def test_a_missing_tensor_is_reported(captured: Any) -> None:
    _, program, plan, masks = chain(captured)
    moved = plan.constraints[0].model_copy(update={"members": plan.constraints[0].members[2:]})
    assert moved.members[0].tensor == "n.weight"
    folded = FoldBatchNorm()(program).program
    with pytest.raises(PlanError, match=r"constraint `a`: the program has no tensor `n\.weight`"):
        ShrinkChannels(plan.model_copy(update={"constraints": (moved,)}), masks)(folded)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_whole_models(name: str, randomized: Any, slim_equals_masked: Any) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=4)
    state = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("weight") and t.dim() > 1}
    randomized(model).load_state_dict(state, strict=False)
    program = capture(model, (torch.randn(1, 3, 32, 32, dtype=torch.float64),))
    plan = allocate_sparsity(program, Channel(), 0.5)
    slim = slim_equals_masked(model, program, plan)
    assert slim.macs < 0.6 * program.macs
