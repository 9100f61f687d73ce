"""Layer norms and RMS norms over a dimension that is pruned, and means over one: statistics of the full width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrc.errors import PlanError
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.passes.allocation.allocate_sparsity import allocate_sparsity
from slrc.passes.allocation.check_plan import checked_plan
from slrc.passes.analysis.label_indices import label_indices
from slrc.passes.structure.shrink_channels import ShrinkChannels
from slrc.sparsity.choices import Attention, LayerNorm
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import Channel
from slrc.sparsity.plans import Plan
from slrc.verify import outputs_of

F = nn.functional
IMAGE, TOKENS, WIDTH = (4, 4, 4), (5, 4), 8
Layers = dict[str, nn.Module | nn.Parameter]
Case = tuple[Callable[[Any, Tensor], Tensor], Layers, tuple[int, ...]]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def tokens(run: Callable[[Any, Tensor], Tensor], **more: nn.Module | nn.Parameter) -> Case:
    """`a` makes 8 features of each token, `run` goes on from them, `o` reads them."""
    return lambda m, x: m.o(run(m, m.a(x))), {"a": nn.Linear(4, WIDTH), "o": nn.Linear(WIDTH, 3), **more}, TOKENS


def image(run: Callable[[Any, Tensor], Tensor], **more: nn.Module | nn.Parameter) -> Case:
    """The same for channels."""
    layers: Layers = {"a": nn.Conv2d(4, WIDTH, 1), "o": nn.Conv2d(WIDTH, 3, 1), **more}
    return lambda m, x: m.o(run(m, m.a(x))), layers, IMAGE


def stream(m: Any, y: Tensor) -> Tensor:
    y = y + m.d(F.gelu(m.c(m.n(y))))
    return m.k(y)


def with_class_token(m: Any, y: Tensor) -> Tensor:
    y = torch.cat([m.token.expand(y.shape[0], -1, -1), y], dim=1) + m.position
    return m.n(y)[:, 0]


def merged_patches(m: Any, y: Tensor) -> Tensor:
    y = y.permute(0, 2, 3, 1)
    y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], dim=-1)
    return m.c(m.n(y)).permute(0, 3, 1, 2)


def channels_last(m: Any, y: Tensor) -> Tensor:
    return m.n(m.d(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def spatial_gate(m: Any, y: Tensor) -> Tensor:
    """The gating unit of gMLP: a half of the features, mixed over tokens, times the other."""
    left, right = y.chunk(2, dim=-1)
    return m.e(left * m.mix(m.n(right).transpose(1, 2)).transpose(1, 2))


def response_norm(m: Any, y: Tensor) -> Tensor:
    """The global response norm of ConvNeXt-v2."""
    size = y.norm(p=2, dim=(2, 3), keepdim=True)
    return y + (m.shift + m.scale * (y * (size / (size.mean(dim=1, keepdim=True) + 1e-6))))


LAYER_NORM = {"n": nn.LayerNorm(WIDTH)}
NORMS: dict[str, Case] = {
    "layer norm": tokens(lambda m, y: m.n(y), n=nn.LayerNorm(WIDTH)),
    "layer norm, eps": tokens(lambda m, y: m.n(y), n=nn.LayerNorm(WIDTH, eps=0.1)),
    "layer norm without a shift": tokens(lambda m, y: m.n(y), n=nn.LayerNorm(WIDTH, bias=False)),
    "layer norm without parameters": tokens(lambda m, y: F.layer_norm(y, (WIDTH,))),
    "layer norm with a shift only": tokens(lambda m, y: F.layer_norm(y, (WIDTH,), None, m.p), p=parameter(WIDTH)),
    "rms norm": tokens(lambda m, y: m.n(y), n=nn.RMSNorm(WIDTH)),
    "rms norm, eps": tokens(lambda m, y: m.n(y), n=nn.RMSNorm(WIDTH, eps=0.1)),
    "rms norm without a scale": tokens(lambda m, y: m.n(y), n=nn.RMSNorm(WIDTH, eps=0.1, elementwise_affine=False)),
    "one norm after another": tokens(lambda m, y: m.k(m.n(y)), n=nn.LayerNorm(WIDTH), k=nn.RMSNorm(WIDTH)),
    "one norm twice": tokens(lambda m, y: m.n(F.gelu(m.n(y))), n=nn.RMSNorm(WIDTH)),
    "residual stream": tokens(
        stream, n=nn.LayerNorm(WIDTH), c=nn.Linear(WIDTH, 12), d=nn.Linear(12, WIDTH), k=nn.LayerNorm(WIDTH)
    ),
    "class token and positions": tokens(
        with_class_token, n=nn.LayerNorm(WIDTH), token=parameter(1, 1, WIDTH), position=parameter(1, 6, WIDTH)
    ),
    "merged patches": image(merged_patches, n=nn.LayerNorm(4 * WIDTH), c=nn.Linear(4 * WIDTH, WIDTH)),
    "channels last": image(channels_last, d=nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), **LAYER_NORM),
    "gate over tokens": tokens(
        spatial_gate, n=nn.LayerNorm(WIDTH // 2), mix=nn.Linear(5, 5), e=nn.Linear(WIDTH // 2, WIDTH)
    ),
    "squeezed": image(lambda m, y: m.n(y.mean((2, 3), keepdim=True).squeeze())[..., None, None], n=nn.RMSNorm(WIDTH)),
}
MEANS: dict[str, Case] = {
    "mean over channels": image(lambda m, y: y * torch.sigmoid(y.mean(1, keepdim=True))),
    "mean over everything": image(lambda m, y: y * y.relu().mean((1, 2, 3), keepdim=True)),
    "mean, then squeezed": image(lambda m, y: y * y.mean((1, 2, 3), keepdim=True).squeeze()[:, None, None, None]),
    "mean of two at once": tokens(lambda m, y: y * torch.cat([y, 2 * y], dim=-1).mean(-1, keepdim=True)),
    "greatest and least": image(lambda m, y: y * (y.amax(1, keepdim=True) - 2 * y.amin(1, keepdim=True))),
    "global response norm": image(response_norm, shift=parameter(1, WIDTH, 1, 1), scale=parameter(1, WIDTH, 1, 1)),
}
PINNED: dict[str, tuple[Case, str]] = {
    "after a sigmoid": (
        tokens(lambda m, y: m.n(y.sigmoid()), **LAYER_NORM),
        "normalised over by layer_norm where removed indices are not zero",
    ),
    "after mixing tokens with a bias": (
        tokens(lambda m, y: m.n(m.mix(y.transpose(1, 2)).transpose(1, 2)), mix=nn.Linear(5, 5), **LAYER_NORM),
        "normalised over by layer_norm where removed indices are not zero",
    ),
    "over tokens too": (
        tokens(lambda m, y: m.n(y), n=nn.LayerNorm((5, WIDTH))),
        "normalised over by layer_norm",
    ),
    "mean after a sigmoid": (
        tokens(lambda m, y: y * y.sigmoid().mean(-1, keepdim=True)),
        "reduced over by mean",
    ),
    "greatest after a sigmoid": (
        tokens(lambda m, y: y * y.sigmoid().amax(-1, keepdim=True)),
        "reduced over by amax",
    ),
}


def narrow(program: Program, sparsity: float = 0.5, **options: Any) -> Plan:
    return allocate_sparsity(program, Channel(), sparsity, keep_ends=False, layer_norm=LayerNorm.NARROW, **options)


@pytest.mark.parametrize("keep", [1, 5])
@pytest.mark.parametrize("name", NORMS)
def test_a_narrowed_norm_equals_the_masked_one(name: str, keep: int, captured: Any, slim_equals_masked: Any) -> None:
    model, program = captured(NORMS[name])
    plan = narrow(program)
    kept = tuple(c.model_copy(update={"keep": min(keep, c.groups - 1)}) for c in plan)
    slim = slim_equals_masked(model, program, plan.model_copy(update={"constraints": kept}))
    assert len(slim.tensors["a.weight"]) < WIDTH


@pytest.mark.parametrize("name", ["layer norm", "rms norm"])
def test_a_norm_that_is_kept_pins(name: str, captured: Any) -> None:
    _, program = captured(NORMS[name])
    labels = label_indices(program)
    assert next(p for p in labels.pinned if p.layer == "a").reason.startswith("normalised over by")


@pytest.mark.parametrize("layer_norm", LayerNorm)
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_fewer_equals_the_masked_one(
    name: str, layer_norm: LayerNorm, captured: Any, slim_equals_masked: Any
) -> None:
    model, program = captured(MEANS[name])
    plan = allocate_sparsity(program, Channel(), 0.6, keep_ends=False, layer_norm=layer_norm)
    slim = slim_equals_masked(model, program, plan)
    assert len(slim.tensors["a.weight"]) == plan.constraints[0].keep < WIDTH


@pytest.mark.parametrize("name", PINNED)
def test_what_is_not_zero_pins(name: str, captured: Any) -> None:
    case, reason = PINNED[name]
    _, program = captured(case)
    labels = label_indices(program, layer_norm=LayerNorm.NARROW)
    assert [(p.layer, p.reason) for p in labels.pinned if p.layer == "a"] == [("a", reason)]


@pytest.mark.parametrize("attention", Attention)
def test_queries_and_keys_are_normalised_by_head(attention: Attention, captured: Any, slim_equals_masked: Any) -> None:
    def heads(m: Any, y: Tensor) -> Tensor:
        q, k, v = (layer(y).unflatten(-1, (3, 6)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.p(F.scaled_dot_product_attention(m.n(q), m.n(k), v).transpose(1, 2).flatten(2))

    layers: Layers = {name: nn.Linear(WIDTH, 18) for name in "qkv"}
    case = tokens(heads, **layers, n=nn.RMSNorm(6), p=nn.Linear(18, WIDTH))
    model, program = captured(case)
    plan = narrow(program, attention=attention)
    slim = slim_equals_masked(model, program, plan)
    assert len(slim.tensors["q.weight"]) < 18


def test_features_and_tokens_go_from_one_norm(captured: Any, slim_equals_masked: Any) -> None:
    """A shift is added at removed tokens too, so that what comes out is not zero there."""

    def run(m: Any, x: Tensor) -> Tensor:
        mixed = m.n(m.mix(m.a(x).transpose(1, 2)).transpose(1, 2))
        return m.p(m.o(mixed.transpose(1, 2)).transpose(1, 2))

    layers: Layers = {"a": nn.Linear(4, WIDTH), "mix": nn.Linear(5, 6, bias=False), "n": nn.LayerNorm(WIDTH)}
    layers |= {"o": nn.Linear(6, 3), "p": nn.Linear(WIDTH, 2)}
    model, program = captured((run, layers, TOKENS))
    plan = narrow(program)
    assert {c.name: c.groups for c in plan} == {"a": WIDTH, "mix": 6}
    slim_equals_masked(model, program, plan)


def test_a_scale_that_two_norms_share(captured: Any, slim_equals_masked: Any) -> None:
    """The first normalises what is pruned, the second what is not the same group: both see one parameter."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(m.n(m.a(x)) + m.n(m.b(x)))

    layers: Layers = {"a": nn.Linear(4, WIDTH), "b": nn.Linear(4, WIDTH), "n": nn.RMSNorm(WIDTH, eps=0.1)}
    model, program = captured((run, {**layers, "o": nn.Linear(WIDTH, 3)}, TOKENS))
    slim = slim_equals_masked(model, program, narrow(program))
    assert slim.tensors["n.weight"].shape == (4,)


def test_an_rms_norm_is_narrowed_again(captured: Any, masked_outputs: Any) -> None:
    model, program = captured(NORMS["rms norm, eps"])
    first = narrow(program, 0.25)
    slim = ShrinkChannels(first, Masks.project(first, program.tensors))(program).program
    second = narrow(slim, 0.5)
    again = ShrinkChannels(second, Masks.project(second, slim.tensors))(slim).program
    assert [len(p.tensors["a.weight"]) for p in (program, slim, again)] == [8, 6, 3]
    whole = Masks.project(narrow(program, 5 / 8), program.tensors)
    reference = masked_outputs(model, program, whole)
    torch.testing.assert_close(outputs_of(again.module(), program.example_inputs), reference)


def test_a_layer_norm_is_narrowed_once(captured: Any) -> None:
    _, program = captured(NORMS["layer norm"])
    plan = narrow(program)
    slim = ShrinkChannels(plan, Masks.project(plan, program.tensors))(program).program
    labels = label_indices(slim, layer_norm=LayerNorm.NARROW)
    assert [(p.layer, p.reason) for p in labels.pinned if p.layer == "a"] == [("a", "reduced over by mean")]


def test_a_layer_norm_becomes_operators_and_an_rms_norm_stays(captured: Any) -> None:
    for name, expected in (("layer norm", set()), ("rms norm", {"rms_norm"})):
        _, program = captured(NORMS[name])
        plan = narrow(program)
        slim = ShrinkChannels(plan, Masks.project(plan, program.tensors))(program).program
        assert {op_name(n) for n in slim.nodes} & {"layer_norm", "rms_norm"} == expected


def test_a_plan_remembers_the_option(captured: Any) -> None:
    _, program = captured(NORMS["layer norm"])
    plan = narrow(program)
    assert checked_plan(program, plan) == plan
    with pytest.raises(PlanError, match="constraint `a`: its tensors are not removable together"):
        checked_plan(program, plan.model_copy(update={"layer_norm": LayerNorm.KEEP}))


def test_a_great_mean_costs_no_accuracy(net: Any) -> None:
    """In single precision, where a mean of squares less a squared mean would lose all digits."""
    torch.manual_seed(0)
    run, layers, shape = tokens(lambda m, y: m.n(y), n=nn.LayerNorm(64))
    model = net(run, **{**layers, "a": nn.Linear(4, 64), "o": nn.Linear(64, 3)}).eval()
    with torch.no_grad():
        model.a.bias.add_(1000.0)
    program = capture(model, (torch.randn(2, *shape),))
    plan = narrow(program, 0.05)
    masks = Masks.project(plan, program.tensors)
    slim = ShrinkChannels(plan, masks)(program).program
    masked = {n: t.double() * masks.tensors.get(n, torch.ones(())) for n, t in program.tensors.items()}
    twin = net(run, **{**layers, "a": nn.Linear(4, 64), "o": nn.Linear(64, 3)}).double().eval()
    twin.load_state_dict(masked)
    reference = twin(program.example_inputs[0].double())
    torch.testing.assert_close(slim.module()(*program.example_inputs).double(), reference, rtol=1e-4, atol=1e-4)
