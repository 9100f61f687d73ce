"""Both networks, stretch by stretch: values are those of a whole run, kept once where equal and dropped when read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Node

import slrc
from slrc.ir.program import Program
from slrc.reconstruction.observe import first_uses, operands
from slrc.reconstruction.side_by_side import SideBySide


def values_of(program: Program, x: Tensor) -> dict[str, Tensor]:
    """What the program's layers compute in a run of their own."""
    found: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[n.name] = value
            return value

    with torch.no_grad():
        Recorder(program.graph_module).run(x)
    return found


def test_values_are_those_of_whole_runs(residual_net: Callable[[], nn.Module]) -> None:
    x = torch.randn(6, 4, 8, 8)
    workload = slrc.Workload(model=residual_net(), example_inputs=(x[:1],))
    program = slrc.capture(workload)
    changed = program.tensors["conv1.weight"] * 0.5
    dense, pruned = values_of(program, x), values_of(program.with_tensors({"conv1.weight": changed}), x)
    layers = list(first_uses(program).values())
    both = SideBySide(program, [[x[:4]], [x[4:]]], layers)
    assert [s.layer for s in both.stretches] == layers
    met = []
    for number, (_, layer) in enumerate(both.stretches):
        source, weight = operands(layer)
        for batch in both.run(number):
            part = slice(0, 4) if batch == 0 else slice(4, 6)
            torch.testing.assert_close(both.dense(batch, layer), dense[layer.name][part])
            torch.testing.assert_close(both.pruned(batch, source), pruned[source.name][part])
        met.append(both.differs(source))
        if str(weight.target) == "conv1.weight":
            both.replace(weight, changed)
    assert met == [False, False, True, True, True, True, True]


def test_only_what_is_still_read_is_kept(residual_net: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 4, 8, 8)
    program = slrc.capture(slrc.Workload(model=residual_net(), example_inputs=(x[:1],)))
    both = SideBySide(program, [[x]], list(first_uses(program).values()))
    for number, (_, layer) in enumerate(both.stretches):
        list(both.run(number))
        later = {n for nodes, other in both.stretches[number + 1 :] for n in [*nodes, other]}
        read = {n for node in later for n in node.all_input_nodes} | {layer, *layer.all_input_nodes}
        assert set(both._dense[0]) <= read
        assert len(both._dense[0]) <= 3  # the layer, its input, and a residual


def test_what_is_added_later_is_computed_before_the_layer() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.relu(self.a(x)))
            return y + x.flip(1).sin()

    x = torch.randn(3, 4)
    program = slrc.capture(slrc.Workload(model=Late(), example_inputs=(x,)))
    first, second = SideBySide(program, [[x]], list(first_uses(program).values())).stretches
    assert [n.name for n in first.nodes] == ["flip", "sin"]
    assert [n.name for n in second.nodes] == ["relu"]
