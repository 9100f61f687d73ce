"""Capture, what a program tells about its layers, and how it is rewritten."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import slrc
from slrc.errors import CaptureError
from slrc.ir import tracing
from slrc.ir.nodes import op_name
from slrc.ir.program import Program, capture
from slrc.ir.tracing import source_line
from slrc.verify import compare, outputs_of

F = nn.functional


class Net(nn.Module):
    """Two convolutions and a classifier, with a dropout that must not survive capture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 6, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.conv(self.stem(x)).mean((2, 3))))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.stem[1].running_mean)
    nn.init.uniform_(net.stem[1].running_var, 0.5, 2)
    return net


@pytest.fixture
def program(model: Net) -> Program:
    return capture(model, (torch.randn(2, 3, 8, 8),), "net")


def test_names_are_those_of_the_module(model: Net, program: Program) -> None:
    assert program.name == "net"
    assert program.parameter_names == {name for name, _ in model.named_parameters()}
    assert program.tensors.keys() == {*program.parameter_names, *(name for name, _ in model.named_buffers())}
    assert all(torch.equal(program.tensors[name], tensor) for name, tensor in model.named_parameters())


def test_the_program_computes_what_the_model_does(model: Net, program: Program) -> None:
    compare(
        "model = program",
        outputs_of(model.eval(), program.example_inputs),
        outputs_of(program.module(), program.example_inputs),
        1e-6,
    )


def test_capture_leaves_the_model_alone(model: Net) -> None:
    model.train()
    model.stem[0].weight.requires_grad_(False)
    model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stride = model.conv.weight.stride()
    captured = capture(model, (torch.randn(2, 3, 8, 8, requires_grad=True),))
    with torch.no_grad():
        captured.tensors["head.bias"].add_(1)
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.0.weight"]
    assert model.conv.weight.stride() == stride
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "dropout" not in {op_name(node) for node in captured.nodes}


def test_module_shares_nothing_with_the_program(program: Program) -> None:
    module = program.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(bool(program.tensors[name].any()) for name in program.parameter_names if "1.bias" not in name)


def test_a_module_can_be_trained_and_taken_back(program: Program) -> None:
    assert not any(p.requires_grad for p in program.module().parameters())
    module = program.module(trainable=True)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == program.parameter_names
    x = torch.randn(16, 3, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(module.train()(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    for trained in (program.with_tensors(module.state_dict()), capture(module, program.example_inputs)):
        assert all(torch.equal(trained.tensors[n], t) for n, t in module.state_dict().items())
        assert not torch.equal(trained.tensors["conv.weight"], program.tensors["conv.weight"])
        # Statistics of batch norm are those of the capture, in training mode too.
        assert torch.equal(trained.tensors["stem.1.running_mean"], program.tensors["stem.1.running_mean"])
        assert torch.equal(trained.module()(x), module(x))
        assert not any(p.requires_grad for p in trained.module().parameters())
        assert trained.layers.keys() == program.layers.keys()


def test_with_tensors_changes_a_copy(program: Program) -> None:
    before = program.tensors["conv.weight"].clone()
    changed = program.with_tensors({"conv.weight": torch.zeros(6, 8, 3, 3), "stem.1.running_mean": torch.ones(8)})
    assert not changed.tensors["conv.weight"].any()
    assert torch.equal(changed.tensors["stem.1.running_mean"], torch.ones(8))
    assert torch.equal(changed.tensors["head.weight"], program.tensors["head.weight"])
    assert torch.equal(program.tensors["conv.weight"], before)
    out, same = (outputs_of(p.module(), p.example_inputs)[0] for p in (changed, program))
    assert torch.allclose(
        out, changed.tensors["conv.bias"] @ changed.tensors["head.weight"].T + changed.tensors["head.bias"]
    )
    assert not torch.allclose(out, same)


@pytest.mark.parametrize("example_batch", [1, 2, 5])
def test_the_batch_is_dynamic(model: Net, example_batch: int) -> None:
    program = capture(model, (torch.randn(example_batch, 3, 8, 8),))
    assert program.batch_is_dynamic
    assert program.batch == 1
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(program.module()(x), model.eval()(x), atol=1e-5)


class Function(nn.Module):
    """A model that is one function of its inputs and a linear layer."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run
        self.layer = nn.Linear(4, 4)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self.layer, *inputs)


@pytest.mark.parametrize(
    ("run", "example_batch", "macs"),
    [
        (lambda layer, x: layer(x).view(2, 20), 2, 5 * 16),
        (lambda layer, x: layer(x.view(1, 5, 4)), 1, 5 * 16),
        (lambda layer, x: layer(torch.cat([torch.zeros(1, 1, 4), x], 1)), 1, 6 * 16),
        (lambda layer, x: layer(x) + torch.ones(2, 1, 1), 1, 5 * 16),
    ],
)
def test_a_batch_that_the_model_fixes_is_reported(run: Any, example_batch: int, macs: int) -> None:
    model = Function(run)
    program = capture(model, (torch.randn(example_batch, 5, 4),))
    assert not program.batch_is_dynamic
    assert program.batch == example_batch
    assert program.macs == macs
    [value] = [n.meta["val"] for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    assert value.shape == (example_batch, 5, 4)
    compare(
        "model = program",
        outputs_of(model, program.example_inputs),
        outputs_of(program.module(), program.example_inputs),
        1e-6,
    )


def test_an_input_without_a_batch_stays_as_it_is_beside_one_with(caplog: pytest.LogCaptureFixture) -> None:
    program = capture(Function(lambda layer, x, prior: layer(x) + prior), (torch.randn(2, 5, 4), torch.randn(1, 4)))
    shapes = [n.meta["val"].shape for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    assert shapes[1] == (1, 4)
    assert program.batch_is_dynamic
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]  # it would only puzzle


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_tied_parameters_count_once() -> None:
    program = capture(Tied(), (torch.randn(2, 4),))
    assert program.num_parameters == 16 + 4 + 4
    [layer] = program.layers.values()
    assert len(layer.nodes) == 2
    assert layer.macs == program.macs == 32


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.parametrize(
    ("model", "shapes", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), [(4, 5, 7)], 6 * 5 * 7 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2), [(4, 5, 7)], 6 * 2 * 3 * 4 * 9),
        (nn.Conv2d(4, 6, 1, groups=2), [(4, 5, 7)], 6 * 5 * 7 * 2),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), [(4, 5, 7)], 4 * 5 * 7 * 9),
        (nn.Conv1d(4, 6, 3), [(4, 8)], 6 * 6 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, 2), [(4, 5, 7)], 4 * 5 * 7 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), [(4, 5, 7)], 4 * 5 * 7 * 3 * 4),
        (nn.Linear(4, 6), [(4,)], 24),
        (nn.Linear(4, 6), [(5, 4)], 5 * 24),
        (Product(), [(5, 4), (4, 3)], 5 * 4 * 3),
        (Product(), [(2, 5, 4), (2, 4, 3)], 2 * 5 * 4 * 3),
        (Attention(), [(2, 5, 4), (2, 7, 4)], 2 * (5 * 7 * 4 + 5 * 7 * 4)),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_those_of_one_sample(model: nn.Module, shapes: list[tuple[int, ...]], macs: int, batch: int) -> None:
    program = capture(model, tuple(torch.randn(batch, *shape) for shape in shapes))
    assert program.macs == macs


def test_macs_of_a_known_model() -> None:
    program = capture(torchvision.models.resnet18(), (torch.randn(1, 3, 224, 224),))
    assert program.macs == 1_814_073_344
    assert program.num_parameters == 11_689_512


def test_layers_tell_shape_groups_and_ends() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    layers = [*capture(model, (torch.randn(2, 3, 8, 8),)).layers.values()]
    assert [layer.name for layer in layers] == ["0", "2", "3"]
    assert [layer.weight for layer in layers] == ["0.weight", "2.weight", "3.weight"]
    assert [layer.shape for layer in layers] == [(8, 3, 3, 3), (8, 1, 3, 3), (4, 8, 1, 1)]
    assert [layer.groups for layer in layers] == [1, 8, 1]
    assert [layer.is_depthwise for layer in layers] == [False, True, False]
    assert [layer.is_first for layer in layers] == [True, False, False]
    assert [layer.is_last for layer in layers] == [False, False, True]


class TwoEnds(nn.Module):
    """Two stems, a trunk whose result is only asked for its size, and two heads of which one feeds the other."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("left", "right", "trunk", "size", "head", "second"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(torch.relu(self.left(x) + self.right(y * 2)))
        head = self.head(z)
        return head.view(self.size(z).shape[0], 2, 2), torch.sigmoid(self.second(head))


def test_first_and_last_layers() -> None:
    layers = capture(TwoEnds(), (torch.randn(2, 4), torch.randn(2, 4))).layers.values()
    assert [layer.name for layer in layers if layer.is_first] == ["left", "right"]
    assert [layer.name for layer in layers if layer.is_last] == ["head", "second"]


class Stream(nn.Module):
    """Blocks that add to an embedding, and no head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_the_ends_of_a_stream_are_its_first_and_last_block() -> None:
    layers = capture(Stream(), (torch.zeros(2, 5, dtype=torch.long),)).layers.values()
    assert [layer.name for layer in layers if layer.is_first] == ["blocks.0.0"]
    assert [layer.name for layer in layers if layer.is_last] == ["blocks.2.2"]


class Named(nn.Module):
    """Inputs and a parameter that are called like operators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.pad = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 4)

    def forward(self, roll: Tensor, slice: Tensor, batch_norm: Tensor) -> Tensor:
        return self.head(torch.relu(self.linear(roll + slice) * self.pad + batch_norm))


def test_names_of_operators_are_names_like_others(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    workload = slrc.Workload(model=Named(), example_inputs=(x, x, x))
    program = slrc.capture(workload)
    plan = slrc.plan(program, "unstructured", 0.5, keep_ends=False)
    slim = slrc.structure(program, plan, slrc.Masks.project(plan, program.tensors))
    assert slrc.lower(slim, "ort", tmp_path).artifact.inputs == ("roll", "slice", "batch_norm")


class Frames(nn.Module):
    """Frames folded into the batch, eight for each video."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y.view(y.shape[0] // 8, 8, *y.shape[1:])
        y = torch.cat([y[:, 1:, :2], y[:, :1, :2]], 1)
        y = torch.cat([y, y, y, y], 2).view(x.shape[0], 8, *x.shape[2:])
        return self.head(y)


def test_frames_folded_into_the_batch() -> None:
    model, x = Frames(), torch.randn(16, 3, 4, 4)
    program = capture(model, (x,))
    assert program.macs > 0
    torch.testing.assert_close(program.module()(x), model(x))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        return self.head(adjacency @ x)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_input_may_have_no_batch(batch: int) -> None:
    model, adjacency = Graph(), torch.randn(10, 10)
    program = capture(model, (adjacency, torch.randn(batch, 10, 8)))
    assert program.batch_is_dynamic
    if batch == 1:  # else the first input may vary, too
        assert program.macs == 10 * 10 * 8 + 10 * 8 * 4
    x = torch.randn(5, 10, 8)
    torch.testing.assert_close(program.module()(adjacency, x), model(adjacency, x))


class Nested(nn.Module):
    """Dictionaries and tuples in the result, a constant, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0), persistent=False)
        self.register_buffer("scale", torch.arange(3.0) + 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x) * self.scale + self.shift + torch.tensor([3.0, 2.0, 1.0])
        return {"y": y, "rest": (y * 2, [y + 1])}


def test_nested_outputs_and_buffers() -> None:
    model = Nested()
    program = capture(model, (torch.randn(2, 4),))
    result = program.module()(*program.example_inputs)
    assert [*result] == ["y", "rest"]
    assert isinstance(result["rest"], tuple)
    compare(
        "model = program",
        outputs_of(model, program.example_inputs),
        outputs_of(program.module(), program.example_inputs),
        1e-6,
    )
    assert {"shift", "scale"} <= program.tensors.keys()
    assert program.parameter_names == {"layer.weight", "layer.bias"}
    changed = program.with_tensors({"shift": torch.full((3,), 9.0)})
    difference = changed.module()(*program.example_inputs)["y"] - result["y"]
    assert torch.allclose(difference, 9 - torch.arange(3.0).expand(2, 3), atol=1e-5)


def test_rewrite_drops_what_is_no_longer_used(program: Program) -> None:
    def skip_head(module: GraphModule) -> bool:
        [head] = [n for n in module.graph.nodes if op_name(n) == "linear"]
        head.replace_all_uses_with(head.args[0])
        return True

    shorter, modified = program.rewrite(skip_head)
    assert modified
    assert "linear" in {op_name(n) for n in program.nodes}
    assert "linear" not in {op_name(n) for n in shorter.nodes}
    assert program.tensors.keys() - shorter.tensors.keys() >= {"head.weight", "head.bias"}
    assert "conv.weight" in shorter.tensors
    assert shorter.batch_is_dynamic


def test_rewrite_that_changes_nothing_returns_the_same_program(program: Program) -> None:
    same, modified = program.rewrite(lambda module: False)
    assert same is program
    assert not modified


def test_operators_know_their_source_line(program: Program) -> None:
    [mean] = [node for node in program.nodes if op_name(node) == "mean"]
    assert "test_program.py" in source_line(mean)
    assert source_line(mean).endswith("return self.head(self.dropout(self.conv(self.stem(x)).mean((2, 3))))")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class WrongShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        text = "first line\nsecond line"
        raise ValueError(text)


@pytest.mark.parametrize(
    ("model", "line", "cause"),
    [
        (Branches(), "if x.sum() > 0:", "GuardOnDataDependentSymNode"),
        (WrongShape(), "return self.layer(x)", "RuntimeError"),
        (Raises(), "raise ValueError(text)", "ValueError: first line"),
    ],
)
def test_a_failed_capture_names_the_users_line(model: nn.Module, line: str, cause: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(2, 4),))
    assert "test_program.py:" in caught.value.message
    assert f"`{line}" in caught.value.message
    assert cause in caught.value.message
    assert "second line" not in caught.value.message
    assert caught.value.hint is not None


class Stripes(nn.Module):
    """A backbone of one layer."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.conv(x)}


def detector() -> nn.Module:
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    return RetinaNet(Stripes(), num_classes=2, anchor_generator=anchors, min_size=32, max_size=32, score_thresh=0.0)


class Detects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.detector = detector()

    def forward(self, x: Tensor) -> Tensor:
        return self.detector(x)[0]["boxes"]


@pytest.mark.parametrize(
    ("model", "line"), [(detector(), "torchvision/"), (Detects(), "test_program.py:")], ids=["torchvision's", "own"]
)
def test_a_whole_detector_is_told_to_stop_at_its_raw_heads(
    model: nn.Module, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.rand(1, 3, 32, 32),))
    assert line in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint is not None
    assert "class RawHeads" in caught.value.hint
    assert not "".join(capfd.readouterr())


def test_the_raw_heads_of_the_hint_are_captured() -> None:
    hint = tracing.RAW_HEADS.splitlines()
    code = "\n".join(line.removeprefix("    ") for line in hint if line.startswith("    "))
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    whole = detector()
    heads = names["RawHeads"]({"backbone": whole.backbone, "head": whole.head})
    assert capture(heads, (torch.rand(1, 3, 32, 32),)).batch_is_dynamic
    assert heads.state_dict().keys() == whole.state_dict().keys()


def test_a_long_line_of_torchs_is_cut() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not x.is_cpu or torch.compiler.is_exporting():
                raise ValueError(" + ".join(f"u{i}" for i in range(1000)))
            return x

    with pytest.raises(CaptureError) as caught:
        capture(Long(), (torch.randn(2, 4),))
    assert "ValueError: u0 + u1 + " in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = torch.nn.utils.weight_norm(nn.Linear(4, 2))
    model(torch.randn(2, 4))
    with pytest.raises(CaptureError, match="cannot be copied"):
        capture(model, (torch.randn(2, 4),))


def test_parameters_that_inference_does_not_use_are_not_counted() -> None:
    class WithAuxiliaryHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return (y, self.auxiliary(y)) if self.training else y

    assert capture(WithAuxiliaryHead(), (torch.randn(1, 4),)).num_parameters == 20
