"""Where roundings stand, under each scheme, and what the passes that place them leave alone."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from torch import Tensor, nn

from slrc import pipeline
from slrc.forms.quantization import ASYMMETRIC, SYMMETRIC, Quantization, Range, Scheme
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.passes.quantization.find_places import Place, find_places, quantizable_weights, values_to_observe
from slrc.passes.quantization.insert_quantizers import InsertQuantizers, QuantizeBiases


class Block(nn.Module):
    """A convolution with a ReLU6, a residual block on it, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.a(nn.functional.pad(x, (0, 1, 0, 1))))
        return self.head((self.b(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return pipeline.baseline(capture(Block().eval(), (torch.randn(2, 4, 6, 6),)))


def added(program: Program) -> str:
    return next(n.name for n in program.nodes if op_name(n) == "add" and n.meta["val"].dim() == 4)


def rounded(program: Program, scheme: Scheme, high: float = 6.0, skipped: tuple[str, ...] = ()) -> Program:
    places = find_places(program.graph_module, scheme, skipped).values
    ranges = {
        p.like: Range(0.0, high) if "hardtanh" in p.like or "relu6" in p.like else Range(-3.0, 3.0) for p in places
    }
    return InsertQuantizers(scheme, Quantization(ranges=ranges, skipped=skipped))(program).program


def test_everywhere_what_integer_operators_return_is_rounded(program: Program) -> None:
    found = find_places(program.graph_module, ASYMMETRIC)
    assert len(found.layers) == 3
    clipped = next(p.value for p in found.values if "tanh" in p.value or "relu6" in p.value or "clamp" in p.value)
    # The pad belongs to the convolution; the logits are no integers.
    assert found.values == (
        Place("x", "x", found.values[0].readers),
        Place(clipped, clipped),
        Place("conv2d_1", "conv2d_1"),
        Place(added(program), added(program)),
        Place("mean", "mean"),
    )


def test_for_a_compiler_what_layers_read_and_what_is_added(program: Program) -> None:
    found = {p.value: p.readers for p in find_places(program.graph_module, SYMMETRIC).values}
    clipped = next(name for name in found if name not in ("x", "mean") and "pad" not in name)
    assert found[clipped] == ("conv2d_1", added(program))
    assert "conv2d_1" not in found
    assert added(program) not in found


@pytest.mark.parametrize(("high", "stays"), [(6.0, 0), (5.0, 0), (7.0, 1)])
def test_a_relu6_is_dropped_where_the_integers_clip_alike(program: Program, high: float, stays: int) -> None:
    names = [op_name(n) for n in rounded(program, ASYMMETRIC, high).nodes]
    assert sum(n in ("relu6", "hardtanh", "clamp") for n in names) == stays


def test_symmetric_integers_keep_the_activation_and_the_bias(program: Program) -> None:
    nodes = list(rounded(program, SYMMETRIC).nodes)
    assert sum(op_name(n) in ("relu6", "hardtanh", "clamp") for n in nodes) == 1
    biases = [n.args[2] for n in nodes if op_name(n) in ("conv2d", "linear")]
    assert all(b.op == "get_attr" for b in biases)  # type: ignore[union-attr]


def test_biases_are_rounded_in_steps_of_input_times_weight(program: Program) -> None:
    once = QuantizeBiases()(rounded(program, ASYMMETRIC))
    assert once.modified
    tensors = once.program.tensors
    steps = tensors["x_scale"] * tensors["a.scale"]
    torch.testing.assert_close(tensors["a.bias_scale"], steps)
    assert not QuantizeBiases()(once.program).modified


def test_a_program_that_rounds_is_left_alone(program: Program) -> None:
    once = rounded(program, ASYMMETRIC)
    assert not InsertQuantizers(ASYMMETRIC, Quantization(ranges={}))(once).modified


def test_a_skipped_layer_reads_and_returns_floats(program: Program) -> None:
    found = rounded(program, ASYMMETRIC, skipped=("b.weight",))
    layer = next(n for n in found.nodes if op_name(n) == "conv2d" and str(n.args[1].target) == "b.weight")  # type: ignore[union-attr]
    assert [op_name(user) for user in layer.users] == ["add"]


def test_tied_weights_share_their_scale() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    program = capture(Tied().eval(), (torch.randn(2, 4),))
    places = find_places(program.graph_module, ASYMMETRIC).values
    quantization = Quantization(ranges={p.like: Range(-2.0, 2.0) for p in places})
    found = InsertQuantizers(ASYMMETRIC, quantization)(program).program
    assert sum(name.endswith("layer.scale") for name in found.tensors) == 1


def test_a_packed_layer_adds_itself_what_is_rounded_before_it(program: Program) -> None:
    found = find_places(program.graph_module, ASYMMETRIC, packed={"b.weight"})
    values = [p.value for p in found.values]
    assert "conv2d_1" not in values
    assert Place(added(program), added(program)) in found.values
    first = find_places(program.graph_module, ASYMMETRIC, packed={"a.weight"})  # nothing is added to what it returns
    assert first == find_places(program.graph_module, ASYMMETRIC)


def test_the_ends_of_a_part_are_rounded_for_all_that_reads_them(program: Program) -> None:
    weights = ("a.weight", "b.weight", "head.weight")
    assert not find_places(program.graph_module, ASYMMETRIC, weights).values
    found = find_places(program.graph_module, ASYMMETRIC, weights, round_ends=True)
    (out,) = program.graph_module.graph.output_node().all_input_nodes
    assert found.values == (Place("x", "x"), Place(out.name, out.name))
    ranges = {"x": Range(-1.0, 1.0), out.name: Range(-1.0, 1.0)}
    quantization = Quantization(ranges=ranges, skipped=weights, round_ends=True)
    part, modified = InsertQuantizers(ASYMMETRIC, quantization)(program)
    assert modified
    assert [op_name(n) for n in part.nodes if op_name(n)].count("fake_quantize") == 2


class Shortcuts(nn.Module):
    """Blocks with an identity, a projection before and one after the layers, and pools and pads that layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.before, self.after, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x) + nn.functional.max_pool2d(x, 3, 1, 1))
        y = self.before(x)
        x = torch.relu(self.b(x) + y)
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return self.head((self.c(x) + self.after(x)).mean((2, 3)))


class ReadTwice(nn.Module):
    """A sum of linear layers, of which another layer reads one operand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.a(x)
        y = self.b(x)
        z = self.c(r)
        return self.head(r + y), z


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)
@pytest.mark.parametrize("model", [Shortcuts, ReadTwice])
def test_whatever_stays_in_float_the_ranges_are_known(model: type[nn.Module], scheme: Scheme) -> None:
    shape = (2, 4, 6, 6) if model is Shortcuts else (2, 4)
    program = pipeline.baseline(capture(model().eval(), (torch.randn(shape),)))
    module, weights = program.graph_module, quantizable_weights(program.graph_module)
    choices = list(chain.from_iterable(combinations(weights, n) for n in range(len(weights) + 1)))
    for packed in ((), *((w,) for w in weights), tuple(weights)):
        known = values_to_observe(module, scheme, packed=packed)
        for skipped in choices:
            places = find_places(module, scheme, skipped, packed=packed).values
            assert {name for p in places for name in (p.value, p.like)} <= known, (packed, skipped)
