"""The inputs on which steps are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slrc.ir.program import Program, capture
from slrc.probes import MOST_SAMPLES, FirstCall, make_probes


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor, options: dict[str, Tensor]) -> Tensor:
        return self.table(tokens).sum(dim=1) * options["scale"]


def embeds() -> tuple[nn.Module, Program]:
    model = Embeds()
    return model, capture(model, (torch.tensor([[3, 9, 5], [4, 4, 3]]), {"scale": torch.full((2, 1), 7.0)}))


def test_random_inputs_are_like_the_example() -> None:
    _, program = embeds()
    example, random, more = make_probes(program)
    assert example.inputs is program.example_inputs
    assert [random.name, more.name] == ["random", "random, batch 3"]
    for probe, batch in ((random, 2), (more, 3)):
        tokens, options = probe.inputs
        assert tokens.shape == (batch, 3)
        assert tokens.dtype == torch.int64
        assert 3 <= int(tokens.min()) <= int(tokens.max()) <= 9
        assert options["scale"].shape == (batch, 1)
        assert options["scale"].std() > 0
        program.module()(*probe.inputs)
    again = make_probes(program)[1]
    assert torch.equal(again.inputs[0], random.inputs[0])


def test_a_fixed_batch_stays() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 6).sum(dim=1)

    probes = make_probes(capture(Fixed(), (torch.zeros(2, 2, 3),)))
    assert [p.name for p in probes] == ["example", "random"]
    assert probes[1].inputs[0].shape == (2, 2, 3)


def seen(module: nn.Module, program: Program, *args: Any, **kwargs: Any) -> list[Any]:
    with FirstCall(module) as first:
        module(*args, **kwargs)
        module(*args, **kwargs)
    return first.probe(program)


def test_the_first_call_of_an_evaluation_is_kept() -> None:
    model, program = embeds()
    tokens, scale = torch.randint(0, 10, (20, 3)), torch.rand(20, 1)
    (probe,) = seen(model, program, tokens, options={"scale": scale})
    assert torch.equal(probe.inputs[0], tokens[:MOST_SAMPLES])
    assert torch.equal(probe.inputs[1]["scale"], scale[:MOST_SAMPLES])


def test_a_call_of_another_kind_is_no_probe() -> None:
    model, program = embeds()
    assert seen(model, program, torch.randint(0, 10, (20, 4)), {"scale": torch.rand(20, 1)}) == []
    with FirstCall(model) as never:
        pass
    assert never.probe(program) == []
