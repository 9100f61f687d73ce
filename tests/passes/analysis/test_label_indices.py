"""Which indices go together, for small models whose groups a person can check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from slrc.ir.program import capture
from slrc.passes.analysis.index_rules import RULES
from slrc.passes.analysis.label_indices import IndexLabels, label_indices
from slrc.sparsity.slices import Slice


def labels_of(model: nn.Module, *shape: int) -> IndexLabels:
    torch.manual_seed(0)
    return label_indices(capture(model, (torch.randn(2, *shape),)))


def text(where: Slice) -> str:
    index = "" if where.index is None else f" at {' '.join(map(str, where.index))}"
    return f"{where.tensor}[{where.dim}]{index}"


def groups(labels: IndexLabels) -> dict[str, tuple[int, list[str], list[str]]]:
    """Units, members and followers of every group, by its name."""
    return {g.name: (g.units, [*map(text, g.members)], [*map(text, g.followers)]) for g in labels.groups}


def reasons(labels: IndexLabels) -> dict[str, str]:
    return {p.layer: p.reason for p in labels.pinned}


def test_chain_with_batch_norm(net: Any) -> None:
    model = net(
        lambda m, x: m.b(torch.relu(m.n(m.a(x)))), a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), b=nn.Conv2d(4, 5, 1)
    )
    labels = labels_of(model, 3, 6, 6)
    members = ["a.weight[0]", "a.bias[0]", "n.weight[0]", "n.bias[0]"]
    assert groups(labels) == {"a": (4, members, ["b.weight[1]"])}
    assert reasons(labels) == {"b": "an output of the model"}
    assert labels.unruled == {}


def test_residual_addition_couples_both_sides(net: Any) -> None:
    conv = [nn.Conv2d(3 if i == 0 else 4, 4, 1, bias=False) for i in range(3)]
    model = net(lambda m, x: m.c(m.b(m.a(x)) + m.a(x)), a=conv[0], b=conv[1], c=conv[2])
    assert groups(labels_of(model, 3, 4, 4)) == {
        "a": (4, ["a.weight[0]", "b.weight[0]"], ["b.weight[1]", "c.weight[1]"])
    }


def test_addition_of_the_input_pins(net: Any) -> None:
    model = net(lambda m, x: m.b(m.a(x) + x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 2, 1))
    labels = labels_of(model, 4, 4, 4)
    assert groups(labels) == {}
    assert reasons(labels)["a"] == "meets a fixed size in add.Tensor"


def test_depthwise_goes_with_its_input(net: Any) -> None:
    model = net(
        lambda m, x: m.c(m.d(m.a(x))),
        a=nn.Conv2d(3, 4, 1, bias=False),
        d=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        c=nn.Conv2d(4, 2, 1),
    )
    assert groups(labels_of(model, 3, 4, 4)) == {"a": (4, ["a.weight[0]", "d.weight[0]", "d.bias[0]"], ["c.weight[1]"])}


def test_depthwise_with_a_multiplier_takes_all_its_outputs(net: Any) -> None:
    model = net(
        lambda m, x: m.c(m.d(m.a(x))),
        a=nn.Conv2d(3, 2, 1, bias=False),
        d=nn.Conv2d(2, 4, 1, groups=2, bias=False),
        c=nn.Conv2d(4, 2, 1),
    )
    assert groups(labels_of(model, 3, 4, 4)) == {"a": (2, ["a.weight[0]", "d.weight[0]"], ["c.weight[1]"])}


def test_depthwise_on_the_input_is_pinned(net: Any) -> None:
    model = net(lambda m, x: m.c(m.d(x)), d=nn.Conv2d(4, 4, 3, groups=4), c=nn.Conv2d(4, 2, 1))
    assert reasons(labels_of(model, 4, 4, 4))["d"] == "depthwise over a fixed number of channels"


def test_grouped_convolution_couples_the_same_place_of_every_group(net: Any) -> None:
    model = net(
        lambda m, x: m.c(m.g(m.a(x))),
        a=nn.Conv2d(3, 4, 1, bias=False),
        g=nn.Conv2d(4, 6, 1, groups=2, bias=False),
        c=nn.Conv2d(6, 2, 1),
    )
    assert groups(labels_of(model, 3, 4, 4)) == {
        "a": (2, ["a.weight[0] at 0 2 1 3"], ["g.weight[1]"]),
        "g": (3, ["g.weight[0] at 0 3 1 4 2 5"], ["c.weight[1] at 0 3 1 4 2 5"]),
    }


def test_flatten_gives_every_channel_its_features(net: Any) -> None:
    model = net(lambda m, x: m.f(m.a(x).flatten(1)), a=nn.Conv2d(3, 4, 1), f=nn.Linear(16, 2))
    assert groups(labels_of(model, 3, 2, 2)) == {"a": (4, ["a.weight[0]", "a.bias[0]"], ["f.weight[1]"])}


def test_concatenation_places_its_parts_one_after_another(net: Any) -> None:
    model = net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 2, 1, bias=False),
        b=nn.Conv2d(3, 3, 1, bias=False),
        c=nn.Conv2d(5, 2, 1),
    )
    assert groups(labels_of(model, 3, 2, 2)) == {
        "a": (2, ["a.weight[0]"], ["c.weight[1] at 0 1"]),
        "b": (3, ["b.weight[0]"], ["c.weight[1] at 2 3 4"]),
    }


def test_a_value_concatenated_with_itself_lies_twice_in_its_consumer(net: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(torch.cat([y, y], 1))

    model = net(run, a=nn.Conv2d(3, 2, 1, bias=False), c=nn.Conv2d(4, 2, 1))
    assert groups(labels_of(model, 3, 2, 2)) == {"a": (2, ["a.weight[0]"], ["c.weight[1] at 0 2 1 3"])}


def test_halves_with_consumers_of_their_own_are_groups_of_their_own(net: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return m.b(left) + m.c(right)

    model = net(run, a=nn.Conv2d(3, 4, 1, bias=False), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(2, 2, 1))
    assert groups(labels_of(model, 3, 2, 2)) == {
        "a": (2, ["a.weight[0] at 0 1"], ["b.weight[1]"]),
        "a#2": (2, ["a.weight[0] at 2 3"], ["c.weight[1]"]),
    }


def test_halves_are_not_interchangeable_even_with_one_consumer(net: Any) -> None:
    """Or all units of the pooled half could be pruned, and nothing be left to pool."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(torch.cat([nn.functional.max_pool2d(y[:, :2], 3, 1, 1), y[:, 2:]], 1))

    model = net(run, a=nn.Conv2d(3, 4, 1, bias=False), c=nn.Conv2d(4, 2, 1))
    assert {name: units for name, (units, *_) in groups(labels_of(model, 3, 4, 4)).items()} == {"a": 2, "a#2": 2}


def test_a_part_of_one_index_stays(net: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(y[:, :1] * y[:, 1:2] * y[:, 2:])

    model = net(run, a=nn.Conv2d(3, 6, 1, bias=False), c=nn.Conv2d(4, 2, 1))
    labels = labels_of(model, 3, 4, 4)
    assert groups(labels) == {"a": (4, ["a.weight[0] at 2 3 4 5"], ["c.weight[1]"])}
    assert reasons(labels)["a"] == "a part with one index only"


def test_a_value_used_twice_has_both_consumers(net: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) * m.c(y)

    model = net(run, a=nn.Conv2d(3, 4, 1, bias=False), b=nn.Conv2d(4, 2, 1), c=nn.Conv2d(4, 2, 1))
    assert groups(labels_of(model, 3, 2, 2)) == {"a": (4, ["a.weight[0]"], ["b.weight[1]", "c.weight[1]"])}


def test_tied_weights_are_one_tensor(net: Any) -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = net(
        lambda m, x: m.o(m.b(torch.relu(m.a(m.i(x))))), i=nn.Linear(3, 4, bias=False), a=a, b=b, o=nn.Linear(4, 2)
    )
    [(units, members, followers)] = groups(labels_of(model, 3)).values()
    assert units == 4
    assert members[0] == "i.weight[0]"
    assert {where.partition(".")[0] for where in members[1:]} <= {"a", "b"}
    assert len(members) == 2
    assert len(followers) == 2


def test_a_module_called_twice_couples_its_input_with_its_output(net: Any) -> None:
    model = net(
        lambda m, x: m.o(m.a(torch.relu(m.a(m.i(x))))),
        i=nn.Linear(3, 4, bias=False),
        a=nn.Linear(4, 4),
        o=nn.Linear(4, 2),
    )
    assert groups(labels_of(model, 3)) == {
        "i": (4, ["i.weight[0]", "a.weight[0]", "a.bias[0]"], ["a.weight[1]", "o.weight[1]"])
    }


def test_squeeze_and_excitation_gate(net: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.o(y * torch.sigmoid(m.up(torch.relu(m.down(y.mean((2, 3), keepdim=True))))))

    layers = {"a": nn.Conv2d(3, 4, 1), "down": nn.Conv2d(4, 2, 1), "up": nn.Conv2d(2, 4, 1), "o": nn.Conv2d(4, 2, 1)}
    for layer in layers.values():
        layer.bias = None
    assert groups(labels_of(net(run, **layers), 3, 4, 4)) == {
        "a": (4, ["a.weight[0]", "up.weight[0]"], ["down.weight[1]", "o.weight[1]"]),
        "down": (2, ["down.weight[0]"], ["up.weight[1]"]),
    }


def test_a_convolution_with_one_output_is_pinned(net: Any) -> None:
    model = net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 2, 1))
    labels = labels_of(model, 3, 4, 4)
    assert groups(labels) == {}
    assert reasons(labels) == {"a": "it has one output only", "b": "an output of the model"}


class Unruled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cumprod(self.a(x), dim=1)
        return self.b(y)


def test_an_operator_without_a_rule_pins_with_its_source_line() -> None:
    labels = labels_of(Unruled(), 3)
    pinned = {p.layer: p for p in labels.pinned}
    assert pinned["a"].reason == "no rule for cumprod"
    assert "test_label_indices.py" in pinned["a"].source
    assert pinned["a"].source.endswith("y = torch.cumprod(self.a(x), dim=1)")
    assert [*labels.unruled] == ["cumprod"]


class Unknown(nn.Module):
    """Operators without a rule that return tuples, take lists, and make tensors of what could be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        left, right = torch.meshgrid(y[0], self.b(x)[0], indexing="ij")
        return self.c(left * right), torch.frexp(y).mantissa, torch.kron(y, y), torch.linalg.qr(y).Q


def test_operators_without_a_rule_pin_and_never_fail() -> None:
    labels = labels_of(Unknown(), 3)
    assert groups(labels) == {}
    assert {"meshgrid", "frexp", "kron", "linalg_qr"} <= set(labels.unruled)


def test_a_weight_that_is_multiplied_goes_with_what_it_reads_and_is_scored_by_what_it_makes(net: Any) -> None:
    layers = {"a": nn.Linear(3, 4, bias=False), "w": nn.Parameter(torch.ones(4, 5)), "o": nn.Linear(5, 2)}
    for run in (
        lambda m, x: m.o(m.a(x) @ m.w),
        lambda m, x: m.o(torch.einsum("ni,io->no", m.a(x), m.w)),
        lambda m, x: m.o((m.w.t() @ m.a(x).t()).t()),
    ):
        assert groups(labels_of(net(run, **layers), 3)) == {
            "a": (4, ["a.weight[0]"], ["w[0]"]),
            "w": (5, ["w[1]"], ["o.weight[1]"]),
        }


def test_a_product_of_weights_has_units_of_its_own(net: Any) -> None:
    layers = {"u": nn.Parameter(torch.ones(6, 4)), "v": nn.Parameter(torch.ones(4, 3))}
    labels = labels_of(net(lambda m, x: nn.functional.linear(x, m.u @ m.v), **layers), 3)
    assert {units for units, *_ in groups(labels).values()} == {4}


def test_an_unused_parameter_is_no_group(net: Any) -> None:
    model = net(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2), unused=nn.Parameter(torch.ones(6, 6)))
    assert [*groups(labels_of(model, 3))] == ["a"]


def test_a_step_slice_is_pinned(net: Any) -> None:
    model = net(lambda m, x: m.b(m.a(x)[:, ::2]), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(2, 2, 1))
    assert reasons(labels_of(model, 3, 4, 4))["a"] == "no rule for slice"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.o(m.a(x).softmax(-1)), "normalised over by softmax"),
        (lambda m, x: m.o(nn.functional.layer_norm(m.a(x), (8,))), "normalised over by layer_norm"),
        (lambda m, x: m.o(m.a(x)) + m.a(x).sigmoid().mean(-1, keepdim=True), "reduced over by mean"),
        (lambda m, x: m.o(m.a(x)) + m.a(x).sigmoid().sum(-1, keepdim=True), "reduced over by sum"),
        (lambda m, x: m.o(m.a(x)) + m.a(x)[..., 2:3], "a part with one index only"),
        (lambda m, x: m.o(m.a(x)) + m.a(x).select(-1, 2).unsqueeze(-1), "one index is selected"),
        (lambda m, x: m.o(nn.functional.pad(m.a(x), (1, -1))), "padded"),
    ],
)
def test_what_sees_single_indices_pins_them(net: Any, run: Any, reason: str) -> None:
    model = net(run, a=nn.Linear(4, 8), o=nn.Linear(8, 3))
    assert reasons(labels_of(model, 5, 4))["a"] == reason


NOT_ZERO = "summed over where removed indices are not zero"


@pytest.mark.parametrize(
    ("run", "removable"),
    [
        (lambda m, x: m.a(x) @ m.b(x).transpose(1, 2), True),
        (lambda m, x: m.a(x) @ torch.sigmoid(m.b(x)).transpose(1, 2), True),
        (lambda m, x: torch.sigmoid(m.a(x)) @ torch.sigmoid(m.b(x)).transpose(1, 2), False),
        (lambda m, x: (torch.sigmoid(m.a(x)) * 2) @ (torch.sigmoid(m.b(x)) * 2).transpose(1, 2), False),
        (lambda m, x: (m.a(x) + 1) @ (m.b(x) + 1).transpose(1, 2), False),
        (lambda m, x: m.a(x).clamp(-3, -1) @ m.b(x).clamp(max=-1).transpose(1, 2), False),
        (lambda m, x: m.a(x).clamp(-1, 1) @ m.b(x).clamp(min=-1).transpose(1, 2), True),
        (lambda m, x: (m.a(x) + m.position) @ torch.sigmoid(m.b(x)).transpose(1, 2), False),
        (lambda m, x: (m.a(x) + m.buffer) @ torch.sigmoid(m.b(x)).transpose(1, 2), False),
        (lambda m, x: (m.a(x) - m.b(x)) @ torch.sigmoid(m.b(x)).transpose(1, 2), True),
        (lambda m, x: nn.functional.linear(torch.sigmoid(m.a(x)), torch.sigmoid(m.b(x))[0]), False),
        (lambda m, x: nn.functional.linear(torch.sigmoid(m.a(x)), m.b(x)[0]), True),
    ],
)
def test_a_product_of_activations_needs_a_side_that_is_zero(net: Any, run: Any, removable: bool) -> None:
    """`a`, `b` give `(n, 5, 8)` tokens; their 8 features are summed over."""
    model = net(
        run,
        a=nn.Linear(4, 8),
        b=nn.Linear(4, 8),
        position=nn.Parameter(torch.ones(5, 1)),
    )
    model.register_buffer("buffer", torch.ones(8))
    labels = labels_of(model, 5, 4)
    assert ("a" in groups(labels)) == removable
    if not removable:
        assert reasons(labels)["a"] == NOT_ZERO


def test_a_bias_fills_the_removed_places_of_other_dimensions(net: Any) -> None:
    """The 8 features of `a` become tokens, to which `b` adds its bias before they are summed over."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.o(torch.sigmoid(y) @ m.b(y.transpose(1, 2)))

    for bias in (True, False):
        model = net(run, a=nn.Linear(4, 8), b=nn.Linear(5, 6, bias=bias), o=nn.Linear(6, 2))
        assert ("a" in groups(labels_of(model, 5, 4))) == (not bias)


def test_attention_heads_are_removable_whole(net: Any) -> None:
    """Width 8 in two heads of 4: each head goes whole, in `q`, `k` and `v` alike."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return m.o(y.transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(8, 8, bias=False) for name in "qkvo"}
    found = groups(labels_of(net(run, **layers), 5, 8))
    assert found == {"q": (2, ["q.weight[0]", "k.weight[0]", "v.weight[0]"], ["o.weight[1]"])}


RESNET18 = {
    "conv1": 64,
    "layer1.0.conv1": 64,
    "layer1.1.conv1": 64,
    "layer2.0.conv1": 128,
    "layer2.0.conv2": 128,
    "layer2.1.conv1": 128,
    "layer3.0.conv1": 256,
    "layer3.0.conv2": 256,
    "layer3.1.conv1": 256,
    "layer4.0.conv1": 512,
    "layer4.0.conv2": 512,
    "layer4.1.conv1": 512,
}
"""The trunk of every stage is one group; the inner convolution of every block is a group of its own."""


def test_resnet18() -> None:
    labels = labels_of(torchvision.models.resnet18(), 3, 64, 64)
    assert {g.name: g.units for g in labels.groups} == RESNET18
    trunk_members = next(g.members for g in labels.groups if g.name == "layer2.0.conv2")
    trunk = [where.tensor for where in trunk_members if "conv" in where.tensor]
    assert trunk == ["layer2.0.conv2.weight", "layer2.1.conv2.weight"]
    assert "layer2.0.downsample.0.weight" in {w.tensor for w in trunk_members}
    assert reasons(labels) == {"fc": "an output of the model"}
    assert labels.unruled == {}


@pytest.mark.parametrize(
    ("name", "group_count", "units"),
    [("shufflenet_v2_x0_5", 33, 2080), ("squeezenet1_0", 25, 2976)],
)
def test_whole_models(name: str, group_count: int, units: int) -> None:
    labels = labels_of(getattr(torchvision.models, name)(), 3, 64, 64)
    assert (len(labels.groups), sum(g.units for g in labels.groups)) == (group_count, units)
    assert labels.unruled == {}
    assert set(reasons(labels).values()) == {"an output of the model"}


def test_an_error_of_a_rule_is_no_missing_rule(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(node: Any, table: Any) -> Any:
        raise KeyError("a bug of the rule's own")

    monkeypatch.setitem(RULES, "relu", broken)
    model = net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with pytest.raises(KeyError, match="a bug of the rule's own"):
        labels_of(model, 3)
