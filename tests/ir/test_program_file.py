"""A program written and read again: the same results, and a clear error for whatever is not a program."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slrc
from slrc.backends.ort import OnnxRuntime
from slrc.errors import OutputError
from slrc.ir.graph_values import find_operator
from slrc.ir.program import Program, capture
from slrc.verify import outputs_of

F = nn.functional


class Net(nn.Module):
    """A model from its forward and its layers: `Net(lambda m, x: m.fc(x), fc=…)`; plain tensors become buffers."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer, persistent=not name.startswith("transient"))
            else:
                setattr(self, name, layer)
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def attention(m: Any, x: Tensor) -> Tensor:
    n, t, f = x.shape
    q, k, v = m.qkv(x).view(n, t, 3, 2, f // 2).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * t, f)
    return m.norm(m.out(y)).view(n, t, f) * float("1e-3") + x.masked_fill(x < 0, float("-inf")).softmax(-1)


def conv_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    nn.init.normal_(model[1].running_mean)  # type: ignore[arg-type]
    return model


def tied() -> nn.Module:
    model = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    return model


def buffers() -> nn.Module:
    layers = {"layer": nn.Linear(4, 3), "scale": torch.randn(3), "transient": torch.randn(3)}
    return Net(lambda m, x: m.layer(x) * m.scale + m.transient + torch.tensor([3.0, 2.0, 1.0]), **layers)


def containers(m: Any, x: Tensor, others: dict[str, Any], factor: float) -> Any:
    y = m.layer(x).to(torch.float64)
    return OrderedDict(y=y, rest=(y * factor, [y + others["b"], None])), {0: y.view(x.shape[0] * 2, 2)[1:]}, 3


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "convolution and batch norm": (conv_norm, lambda n: (torch.randn(n, 3, 6, 6),)),
    "two inputs": (
        lambda: Net(lambda m, x, y: m.a(x) + m.b(y), a=nn.Linear(4, 3), b=nn.Linear(5, 3)),
        lambda n: (torch.randn(n, 4), torch.randn(n, 5)),
    ),
    "attention": (
        lambda: Net(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), norm=nn.LayerNorm(8)),
        lambda n: (torch.randn(n, 5, 8),),
    ),
    "tied weights": (tied, lambda n: (torch.randn(n, 4),)),
    "buffers and constants": (buffers, lambda n: (torch.randn(n, 4),)),
    "embedding": (
        lambda: Net(lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(10, 6), head=nn.Linear(6, 2)),
        lambda n: (torch.arange(3 * n).view(n, 3) % 10,),
    ),
    "containers": (
        lambda: Net(containers, layer=nn.Linear(4, 4)),
        lambda n: (torch.randn(n, 4), {"a": None, "b": torch.randn(n, 4)}, 2.0),
    ),
    "half precision": (lambda: nn.Linear(4, 3).bfloat16(), lambda n: (torch.randn(n, 4).bfloat16(),)),
}


def structure_of(value: Any) -> Any:
    """Return containers as they are and leaves by their type."""
    if isinstance(value, (list, tuple)):
        return type(value), [structure_of(x) for x in value]
    if isinstance(value, dict):
        return type(value), {k: structure_of(x) for k, x in value.items()}
    return type(value) if isinstance(value, Tensor) else value


def assert_same(program: Program, other: Program, inputs: tuple[Any, ...]) -> None:
    results = [p.module()(*inputs) for p in (program, other)]
    assert structure_of(results[0]) == structure_of(results[1])
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(outputs_of(p.module(), inputs) for p in (program, other)), strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_program_read_again_is_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    program = capture(make(), inputs(2), name)
    program.save(tmp_path / "deep" / "folder")
    loaded = Program.load(tmp_path / "deep" / "folder")
    assert loaded.name == name
    used = [[n.target for n in p.nodes if n.users] for p in (program, loaded)]
    assert used[0] == used[1]
    assert loaded.batch_is_dynamic
    assert loaded.macs == program.macs
    assert loaded.num_parameters == program.num_parameters
    assert loaded.parameter_names == program.parameter_names
    assert loaded.tensors.keys() == program.tensors.keys()
    assert loaded.exported.graph_signature.user_inputs == program.exported.graph_signature.user_inputs
    assert loaded.module().state_dict().keys() == program.module().state_dict().keys()
    assert_same(program, loaded, loaded.example_inputs)
    assert_same(program, loaded, inputs(5))
    loaded.save(tmp_path / "again")
    assert_same(program, Program.load(tmp_path / "again"), inputs(3))


def test_a_batch_that_the_model_fixes_stays_fixed(tmp_path: Path) -> None:
    program = capture(Net(lambda m, x: m.layer(x).view(2, 20), layer=nn.Linear(4, 4)), (torch.randn(2, 5, 4),))
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert not loaded.batch_is_dynamic
    assert_same(program, loaded, program.example_inputs)


def test_a_buffer_that_the_model_writes(tmp_path: Path) -> None:
    def count(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return m.layer(x) + m.calls

    program = capture(Net(count, layer=nn.Linear(4, 4), calls=torch.zeros(1)), (torch.randn(2, 4),))
    program.save(tmp_path)
    modules = [p.module() for p in (program, Program.load(tmp_path))]
    for _ in range(2):
        results = [m(*program.example_inputs) for m in modules]
        assert torch.equal(*results)
    assert all(float(m.calls) == 2 for m in modules)


def test_a_model_of_torchvision(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    program = capture(models.resnet18(), (torch.randn(1, 3, 64, 64),), "resnet18")
    slim = slrc.structure(
        program, plan := slrc.plan(program, "channel", 0.5), slrc.Masks.project(plan, program.tensors)
    )
    slim.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert_same(slim, loaded, (torch.randn(3, 3, 64, 64),))
    assert {n: x.shape for n, x in loaded.layers.items()} == {n: x.shape for n, x in slim.layers.items()}


def test_what_was_read_can_be_compiled_further(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    program = capture(model, (torch.randn(1, 3, 6, 6),))
    program.save(tmp_path / "dense")
    loaded = Program.load(tmp_path / "dense")
    plans = [slrc.plan(p, "channel", 0.5, keep_ends=False, round_to=1) for p in (program, loaded)]
    assert plans[0] == plans[1]
    slim = slrc.structure(loaded, plans[1], slrc.Masks.project(plans[1], loaded.tensors))
    assert slim.num_parameters < program.num_parameters
    slim.save(tmp_path / "slim")
    slim = Program.load(tmp_path / "slim")
    x = torch.randn(4, 3, 6, 6)
    lowered = slrc.lower(slim, "ort", tmp_path / "ort")
    torch.testing.assert_close(OnnxRuntime().load(lowered.folder)(x), outputs_of(slim.module(), (x,)))
    assert_same(slim, capture(slim.module(trainable=True), slim.example_inputs), (x,))


def test_a_workload_of_a_program_that_was_read(tiny_workload: Callable[..., slrc.Workload], tmp_path: Path) -> None:
    slrc.compile(tiny_workload(), tmp_path / "first", sparsity=0.3, epochs=1, round_to=1, threads=1)
    slim = Program.load(tmp_path / "first" / "program")
    workload = tiny_workload(model=slim.module(trainable=True), example_inputs=slim.example_inputs)
    plan = slrc.plan(program := slrc.capture(workload), "channel", 0.5, round_to=1)
    trained = slrc.train(workload, plan, epochs=1)
    slimmer = slrc.structure(program, plan, trained)
    assert slimmer.num_parameters < slim.num_parameters < slrc.capture(tiny_workload()).num_parameters


SOURCE = """
import torch
from torch import nn

class TheirOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return {"logits": self.head(torch.relu(self.conv(x)).mean((2, 3)))}
"""
WRITE = """
import sys, torch, slrc
from slrc.ir.program import capture
from theirs import TheirOwn

torch.manual_seed(0)
program = capture(TheirOwn(), (torch.randn(2, 3, 6, 6),))
program.save("program")
torch.export.save(program.exported, "model.pt2")
x = torch.arange(3 * 3 * 6 * 6.0).view(3, 3, 6, 6).sin()
torch.save((x, program.module()(x)["logits"]), "expected.pt")
"""
READ = """
import sys, torch, slrc

x, expected = torch.load("expected.pt", weights_only=True)
assert torch.equal(slrc.Program.load("program").module()(x)["logits"], expected)
assert torch.equal(torch.export.load("model.pt2").module()(x)["logits"], expected)
assert "theirs" not in sys.modules
"""


def test_another_process_reads_it_without_the_users_code(start_process: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(SOURCE)
    for script in (WRITE, READ):
        done = start_process(f"sys.path.insert(0, '')\n{script}", tmp_path).finish()
        assert done.code == 0, done.err
        (tmp_path / "theirs.py").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a parameter, a buffer, and operators of every kind."""
    folder = tmp_path_factory.mktemp("program")
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.fc(x).view(x.shape[0] * 2, -1) * m.scale, fc=nn.Linear(4, 6), scale=torch.randn(3)
    )  # fmt: skip
    capture(model, (torch.randn(2, 4),), "net").save(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rename(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[: len(t) // 2], "cannot be read: "),
        (lambda t: "[" * 100_000, "cannot be read: |has schema version None"),
        (lambda t: "[]", "has schema version None, expected 1"),
        (lambda t: rename(t, '"schema_version": 1', '"schema_version": 2'), "has schema version 2, expected 1"),
        (lambda t: rename(t, '"nodes"', '"knots"'), "field `nodes`: Field required"),
        (lambda t: rename(t, "aten.linear.default", "aten.linear.nope"), "unknown operator `aten.linear.nope`"),
        (lambda t: rename(t, "aten.linear.default", "os.system"), "unknown operator `os.system`"),
        (lambda t: rename(t, "aten.linear.default", "aten.from_file.default"), "unknown operator `aten.from_file"),
        (lambda t: rename(t, "aten.linear.default", "operator.call"), "unknown operator `operator.call`"),
        (lambda t: rename(t, '{"node": "linear"}', '{"node": "later"}'), "there is no node `later` yet"),
        (lambda t: rename(t, '{"tensor": "fc.weight"}', '{"tensor": "nope"}'), "there is no tensor `nope` yet"),
        (lambda t: rename(t, '{"input": 0}, {"t', '{"input": 7}, {"t'), "there is no input `7` yet"),
        (lambda t: rename(t, '{"input": 0}, {"t', '{"inputs": 0}, {"t'), r'`{"inputs": 0}` is no value'),
        (lambda t: rename(t, '{"input": 0}, {"t', '{"input": []}, {"t'), "cannot be rebuilt: "),
        (lambda t: rename(t, '{"input": 0}, {"t', '{"dict": [1]}, {"t'), "cannot be rebuilt: "),
        (lambda t: rename(t, '{"input": 0}, {"t', '{"torch": "hub"}, {"t'), "is no value"),
        (lambda t: rename(t, '{"input": 0}, {"t', '{"float": "x"}, {"t'), "cannot be rebuilt: ValueError"),
        (lambda t: rename(t, '"inputs": {"tuple"', '"inputs": {"dict"'), "cannot be rebuilt: "),
        (lambda t: rename(t, "[6, 4]", "[6, 5]"), r"tensor `fc.weight`: expected \('float32', \(6, 5\)\), got"),
        (lambda t: rename(t, '"dtype": "float32"', '"dtype": "int8"'), "tensor `fc.weight`: expected"),
        (lambda t: rename(t, "fc.bias", "fc.offset"), "tensor `fc.offset`: expected .*, got none"),
        (lambda t: rename(t, '"shape": [3]', '"shape": [3], "same_as": "fc.weight"'), "`scale`: expected no such"),
        (lambda t: rename(t, "[null, 4]", "[null, 5]"), "expected inputs and outputs of shapes"),
        (lambda t: rename(t, '["input', '["a b", "input'), "cannot be rebuilt: "),
        (lambda t: rename(t, '"args": [{"node": "linear"}', '"args": [{"node": "sym_size_int"}'), "cannot be rebuilt"),
        (lambda t: rename(t, '"args": [{"input": 0}, 0]', '"args": [], "kwargs": {"f(": 1}'), "is not one it can have"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_read(folder: Path, edit: Callable[[str], str], message: str) -> None:
    path = folder / "graph.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(OutputError, match=message) as caught:
        Program.load(folder)
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        'a"]); import os; ("',
        "forward",
        "__class__",
        "__class__.x",
        "__deepcopy__",
        "fc.__call__",
        "__new.x",
        "graph",
        "code",
        "meta",
        "recompile.x",
        "",
        ".",
        "a..b",
        "fc.forward",
        "fc.bias",
        "a\nb",
        "é'",
    ],
)
def test_a_tensor_with_a_name_that_no_tensor_can_have(folder: Path, name: str) -> None:
    graph, weights = json.loads((folder / "graph.json").read_text()), load_file(folder / "weights.safetensors")
    entry = graph["tensors"].pop("scale")
    text = json.dumps({**graph, "tensors": {**graph["tensors"], name + "?": entry}}).replace(
        json.dumps("scale"), json.dumps(name)
    )
    (folder / "graph.json").write_text(text.replace(json.dumps(name + "?"), json.dumps(name)))
    weights = {name if n == "scale" else n: t for n, t in weights.items()}
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(OutputError, match=r"cannot be|expected"):
        Program.load(folder)


@pytest.mark.parametrize("file", ["graph.json", "weights.safetensors", "inputs.safetensors"])
def test_a_file_that_is_missing_or_cut_off(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    for size in (len(content) - 9, 20, 3, 0):
        (folder / file).write_bytes(content[:size])
        with pytest.raises(OutputError, match="cannot be read: "):
            Program.load(folder)
    (folder / file).write_bytes(b"\xff" * 64)
    with pytest.raises(OutputError, match="cannot be read: "):
        Program.load(folder)
    (folder / file).unlink()
    with pytest.raises(OutputError, match=f"has no file `{file}`"):
        Program.load(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(OutputError, match=r"has no file `graph\.json`"):
            Program.load(path)
    with pytest.raises(OutputError, match="cannot write to "):
        capture(nn.Linear(2, 2), (torch.randn(2, 2),)).save(tmp_path / "file")


@pytest.mark.parametrize(
    "name",
    [
        "aten.save.default",
        "aten.from_file.out",
        "aten.warn.default",
        "aten.__class__.default",
        "aten._dir.clear",
        "aten",
        "torch.hub.load",
        "builtins.eval",
        "math.__loader__",
        "operator.attrgetter",
        "aten.conv2d",
        "aten.conv2d.default.x",
    ],
)
def test_operators_that_are_never_looked_up(name: str) -> None:
    with pytest.raises(OutputError, match="unknown operator"):
        find_operator(name)


Pair = namedtuple("Pair", ["a", "b"])


@torch.library.custom_op("slrc_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, x: twice(m.fc(x)), "`slrc_tests.twice.default` is not one of the operators that can be"),
        (lambda m, x: Pair(m.fc(x), x), "a value of type .*Pair cannot be stored"),
        (
            lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (m.fc(x),)),
            "`.*cond` is not one of the operators",
        ),
        (lambda m, x: (m.fc(x) * m.complex).real, r"safetensors cannot hold `complex`, of torch\.complex128"),
    ],
)
def test_what_the_format_has_no_word_for(run: Callable[..., Any], message: str, tmp_path: Path) -> None:
    model = Net(run, fc=nn.Linear(4, 4), complex=torch.randn(4, dtype=torch.complex128))
    program = capture(model, (torch.randn(2, 4),))
    with pytest.raises(OutputError, match=message):
        program.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_timing")
def test_a_compile_writes_the_program_and_says_if_it_cannot(
    tiny_workload: Callable[..., slrc.Workload], tmp_path: Path
) -> None:
    slrc.compile(tiny_workload(), tmp_path / "out", pattern="channel", epochs=1, threads=1)
    loaded, exported = Program.load(tmp_path / "out" / "program"), torch.export.load(tmp_path / "out" / "model.pt2")
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(loaded.module()(x), exported.module()(x))

    layers = tiny_workload().model
    model = Net(lambda m, x: Pair(m.net(x), x.mean()), net=layers)
    workload = tiny_workload(model=model, train_batches=None, evaluate=None)
    report = slrc.compile(workload, tmp_path / "pair", pattern="channel", threads=1)
    assert not [name for name in ("program", "model.pt2") if (tmp_path / "pair" / name).exists()]
    assert [note for note in report.notes if "was not written" in note] == list(report.notes[-2:])
    assert slrc.Report.load(tmp_path / "pair") == report
