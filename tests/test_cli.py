"""The command line: results on stdout, progress and errors on stderr, 2 for a user's mistake and never a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import slrc
from slrc import cli
from slrc.measuring.clock import Clock, Timing
from slrc.measuring.timing import BLOCKS, Budget
from slrc.options import options, planning_options

pytestmark = pytest.mark.usefixtures("quick_timing")


Run = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload_source: str) -> Path:
    """A workload file in a fresh current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tinynet.py"
    path.write_text(workload_source)
    return path


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli") / "build"


@pytest.fixture
def compiled(run: Run, model: Path, output: Path) -> Path:
    """The output folder of one compile, made once; read-only."""
    if not output.exists():
        result = run("compile", model, "--pattern", "channel", "--epochs", 1, "--threads", 1, "--out", output)
        assert result.code == 0, result.err
    return output


def test_compile_prints_the_result_on_stdout_and_progress_on_stderr(run: Run, model: Path) -> None:
    result = run("compile", model, "--pattern", "columns:2", "--sparsity", 0.5, "--epochs", 1, "--out", "my[bold]build")
    assert result.code == 0, result.err
    assert result.out.startswith("tinynet: columns:2 at ")
    for word in ("accuracy", "parameters", "multiply-accumulates", "latency, ort"):
        assert word in result.out
    assert result.out.rstrip().endswith("report: my[bold]build/report.html")
    assert "gradual epoch 1/1" in result.err
    assert "epoch" not in result.out
    assert "accuracy" not in result.err
    assert Path("my[bold]build/report.html").exists()


def test_long_paths_are_printed_whole(run: Run, compiled: Path, tmp_path: Path) -> None:
    file = tmp_path / ("a" * 100) / ("b" * 110 + ".py")
    file.parent.mkdir()
    assert f"wrote {file}; next: slrc compile {file}\n" == run("init", file).out


def test_doctor_prints_tables_or_json_and_says_by_its_code_whether_a_check_failed(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrc.doctor.times.WHOLE", Budget(1e6, BLOCKS))  # there is no time for pruned networks
    result = run("doctor", model, "--threads", 1, "--seconds", 1000)
    assert result.code == 0, result.err
    for words in ("tinynet: examined in", "what can be pruned", "no time was left", "samples a second"):
        assert words in result.out
    broken = Path("broken.py")
    broken.write_text("import torchh\n")
    result = run("doctor", broken, "--json")
    assert result.code == 2
    found = json.loads(result.out)
    assert [f["check"] for f in found["findings"] if f["status"] == "fails"] == ["workload"]
    assert "broken.py:1: `import torchh`" in result.out


def test_compare_prints_a_table_and_writes_a_page(run: Run, compiled: Path, tmp_path: Path) -> None:
    result = run("compare", compiled, compiled, "--html", tmp_path / "both.html")
    assert result.code == 0, result.err
    for words in ("accuracy", "latency, ort", "pruned of each layer"):
        assert words in result.out
    assert (tmp_path / "both.html").read_text().startswith("<!DOCTYPE html>")
    assert result.err == f"page: {tmp_path / 'both.html'}\n"
    missing = run("compare", tmp_path)
    assert missing.code == 2
    assert "has no report.json" in missing.err


def test_a_sweep_says_what_is_wrong_before_it_begins(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("sweep", model, "--speedups", "fast")
    assert result.code == 2
    assert "speed-ups above 1" in result.err
    result = run("sweep", model, "--patterns", "2:4")
    assert result.code == 2
    assert "prescribes it" in result.err
    assert not Path("sweep").exists()
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = run("sweep", model)
    assert result.code == 2
    assert "pip install 'slrc[sweep]'" in result.err


def test_options_reach_the_compile(run: Run, model: Path) -> None:
    Path("slrc.toml").write_text("sparsity = 0.75\nepochs = 9\nretrain-epochs = 1\n[slr]\nrho = 0.2\n")
    arguments = ["--config", "slrc.toml", "--epochs", 1, "--method", "slr", "--precision", "bf16", "--seed", 3]
    result = run(
        "compile",
        model,
        *arguments,
        "--skip",
        0,
        "--prune-ends",
        "--threads",
        1,
        "--allocate",
        "global",
        "--layer-norm",
        "narrow",
    )
    assert result.code == 0, result.err
    config = json.loads(Path("build/report.json").read_text())["config"]
    assert (config["sparsity"], config["epochs"], config["retrain_epochs"], config["seed"]) == (0.75, 1, 1, 3)
    assert (config["precision"], config["allocate"], config["skip"]) == ("bf16", "global", ["0"])
    assert (config["keep_ends"], config["threads"], config["slr"]["rho"]) == (False, 1, 0.2)
    assert config["layer_norm"] == json.loads(Path("build/plan.json").read_text())["layer_norm"] == "narrow"


def test_a_compile_for_a_latency_shows_what_was_predicted(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def made_up(clock: Any, jobs: Any, budget: Any) -> tuple[Timing, ...]:
        return tuple(Timing(float(sum(t.numel() for t in job.program(clock.target).tensors.values()))) for job in jobs)

    monkeypatch.setattr(Clock, "times", made_up)  # nothing is timed: any machine gives this plan
    wanted = ["--pattern", "channel", "--speedup", 1.25, "--threads", 1, "--round-to", 1, "--prune-ends"]
    result = run("compile", model, *wanted, "--epochs", 1)
    assert result.code == 0, result.err
    assert "  predicted" in result.out
    (latency,) = json.loads(Path("build/report.json").read_text())["latency"]
    forecast = json.loads(Path("build/plan.json").read_text())["latency"]
    assert latency["predicted_ms"] == pytest.approx(forecast["predicted"] * latency["dense_ms"]["p50"])
    assert forecast["budget"] == 0.8
    assert forecast["predicted"] == pytest.approx(0.8, abs=0.15)


def test_init_writes_a_workload_that_can_be_inspected(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "starter.py"
    result = run("init", file)
    assert (result.code, result.err) == (0, "")
    assert f"slrc compile {file}" in result.out
    source = file.read_text()
    compile(source, str(file), "exec")
    file.write_text(source.replace("make_data(4000", "make_data(64").replace("make_data(1000", "make_data(32"))
    inspected = run("inspect", file)
    assert inspected.code == 0, inspected.err
    assert "multiply-accumulates" in inspected.out


def test_inspect_says_that_a_large_last_layer_is_pruned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(
        "import slrc, torch\nfrom torch import nn\n"
        "def workload():\n"
        "    return slrc.Workload(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 64)), (torch.randn(2, 4),))\n"
    )
    result = run("inspect", tmp_path / "wide.py", "--pattern", "block:8x1")
    assert result.code == 0, result.err
    assert "yes: a last layer with 83% of the parameters" in " ".join(result.out.split())


def test_what_is_piped_keeps_its_names_and_lines_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file = "a_layer_" * 12, tmp_path / "long.py"
    file.write_text(f"""
import slrc, torch
from torch import nn
def workload():
    layers = dict(first=nn.Linear(8, 8), {name}=nn.Linear(8, 8), last=nn.Linear(8, 2))
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return slrc.Workload(model, (torch.randn(1, 8),))
""")
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run("inspect", file)
    monkeypatch.delenv("COLUMNS")
    piped = run("inspect", file)
    assert narrow.code == piped.code == 0, piped.err
    assert (name in narrow.out, name in piped.out) == (False, True)
    assert max(map(len, narrow.out.splitlines())) <= 80


def test_inspect(run: Run, model: Path) -> None:
    result = run("inspect", model, "--pattern", "block:4x1", "--sparsity", 0.75, "--plan-out", "plan.json")
    assert result.code == 0, result.err
    for text in ("layers", "the first layer is left alone", "the final classifier", "block:4x1", "dynamic", "16x8x3x3"):
        assert text in result.out
    assert "plan: plan.json" in result.err
    plan = slrc.Plan.load(Path("plan.json"))
    assert [c.name for c in plan] == ["3"]
    assert not Path("build").exists()
    compiled = run("compile", model, "--plan", "plan.json", "--method", "magnitude", "--epochs", 0)
    assert compiled.code == 0, compiled.err
    assert slrc.Plan.load(Path("build/plan.json")).constraints == plan.constraints


def test_bench(run: Run, compiled: Path) -> None:
    result = run("bench", compiled, "--threads", 1)
    assert result.code == 0, result.err
    assert "latency, ort, 1 thread, batch 1" in result.out
    assert "timing ort" in result.err


def test_bench_as_json(run: Run, compiled: Path) -> None:
    result = run("bench", compiled, "--threads", 2, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    (latency,) = data["latency"]
    assert (data["model"], latency["target"], latency["threads"]) == ("tinynet", "ort", 2)
    assert latency["dense_ms"]["p50"] > 0
    assert data["environment"]["cpu"]


def test_targets(run: Run) -> None:
    result = run("targets")
    assert (result.code, result.err) == (0, "")
    for name in ("ort", "tensorrt", "tensorrt-rtx"):
        assert name in result.out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"slrc {slrc.__version__}\n", "")


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for name in ("compile", "inspect", "bench", "targets", "init"):
        assert name in result.out


def test_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "slrc", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == f"slrc {slrc.__version__}\n"


def assert_mistake(result: Any, message: str, hint: str) -> None:
    """Exit code 2, `error: …`, a blank line, `hint: …`; nothing on stdout, and no trace."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert message in errors[0]
    assert f"{errors[0]}\n\nhint: " in result.err
    assert hint in result.err.split("\n\nhint: ")[1]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--pattern", "blok:8x1"], "unknown pattern `blok:8x1`", "--pattern block:8x1"),
        (["--pattern", "4:2"], "pattern `4:2` cannot be used", "2:4"),
        (["--pattern", "2:4", "--sparsity", "0.75"], "sparsity 0.75 was asked", "leave `--sparsity` out"),
        (["--sparsity", "1.0"], "option `--sparsity`: input should be less than 1, got 1.0", "--sparsity 0.75"),
        (["--sparsity", "-0.1"], "option `--sparsity`: input should be greater than or equal to 0", "--sparsity 0.75"),
        (["--sparsity", "nan"], "option `--sparsity`: ", "--sparsity 0.75"),
        (["--target", "onnx"], "unknown target `onnx`", "slrc targets"),
        (["--target", "ort:fp16"], "`ort` takes a processor", "--target ort"),
        (["--skip", "layer9"], "`--skip layer9` matches no layer", "layers are named like"),
        (["--config", "none.toml"], "configuration file `none.toml` does not exist", "--config"),
        (["--plan", "none.json"], "plan `none.json` does not exist", "--plan"),
        (["--plan", "p.json", "--pattern", "2:4"], "`--plan` and `--pattern` exclude each other", "leave one out"),
        (["--plan", "p.json", "--skip", "x"], "`--plan` and `--skip` exclude each other", "leave one out"),
        (["--resume"], "there is no unfinished run of `build` to resume", "run without `--resume`"),
    ],
)
def test_mistakes_in_the_options(run: Run, model: Path, arguments: list[str], message: str, hint: str) -> None:
    assert_mistake(run("compile", model, *arguments), message, hint)
    assert sorted(p.name for p in Path().iterdir() if p.name != "__pycache__") == ["tinynet.py"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "-1"],
        ["--threads", "0"],
        ["--method", "sgd"],
        ["--precision", "fp8"],
        ["--allocate", "layer"],
        ["--target", "ort", "--target", "ort"],
    ],
)
def test_options_out_of_range(run: Run, model: Path, arguments: list[str]) -> None:
    result = run("compile", model, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: option `{arguments[0]}`: ")
    assert "Traceback" not in result.err


def test_an_unknown_option_in_a_file(run: Run, model: Path) -> None:
    Path("slrc.toml").write_text("sparsty = 0.5\n")
    result = run("compile", model, "--config", "slrc.toml")
    assert_mistake(result, "`sparsty` in `slrc.toml`: there is no such option", "sparsity")


def test_a_metric_that_turns_nan_is_told_at_once_and_at_the_end(run: Run, model: Path) -> None:
    good = 'lambda m: {"accuracy": (m(x).argmax(1) == y).float().mean().item()}'
    assert good in model.read_text()
    turned = 'lambda m, seen=[]: {"accuracy": float("nan") if seen else seen.append(1) or 0.5}'
    model.write_text(model.read_text().replace(good, turned))
    result = run("compile", model, "--pattern", "channel", "--epochs", 1, "--method", "gradual", "--threads", 1)
    assert_mistake(result, "`evaluate` returned nan for `accuracy` of the compiled model", "must be finite")
    assert result.err.index("epoch 1: loss") < result.err.index("note: a compile cannot end with a metric")


WORKLOAD_ERRORS = [
    ("    return slrc.Workload(", "    return 1 / 0\n    slrc.Workload(", "ZeroDivisionError", "--debug"),
    ("def workload():", "def make():", "has no function `workload`", "MODEL:function"),
    ("nn.Linear(16, 3),\n    )", "nn.Linear(16, 3))\n    model = Dict(model)", "got a dict with keys 'out'", "loss="),
    ("DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)", "[]", "yielded nothing", "loader"),
    ("DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)", "iter([(x, y)])", "read only once", "DataLoader"),
    ("(x[:1],)", "x[:1]", "must be a tuple of inputs, got a tensor", "(x,)"),
    (
        'lambda m: {"accuracy": (m(x).argmax(1) == y).float().mean().item()}',
        "lambda m: 1",
        "`evaluate` must",
        "accuracy",
    ),
]


@pytest.mark.parametrize(("old", "new", "message", "hint"), WORKLOAD_ERRORS, ids=[e[2] for e in WORKLOAD_ERRORS])
def test_mistakes_in_the_workload(run: Run, model: Path, old: str, new: str, message: str, hint: str) -> None:
    wrapper = "class Dict(nn.Sequential):\n    def forward(self, x):\n        return {'out': super().forward(x)}\n"
    source = model.read_text()
    assert old in source
    source = source.replace(old, new).replace("def workload", f"{wrapper}\n\ndef workload", 1)
    if "Dict(model)" in source:
        source = source.replace('evaluate=lambda m: {"accuracy": (m(x)', 'evaluate=lambda m: {"accuracy": (m(x)["out"]')
    model.write_text(source)
    result = run("compile", model, "--epochs", 1, "--pattern", "unstructured")
    assert result.code == 2, result.err
    assert_mistake(result, message, hint)
    assert not Path("build").exists()
    assert not Path("build.work").exists()


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("nowhere.py", "`nowhere.py` does not exist", "slrc init nowhere.py"),
        ("no_such_module:net", "module `no_such_module` cannot be imported", "import"),
        ("torchvision:resnet19", "`torchvision` has no model `resnet19`", "resnet18"),
        ("resnet50", "cannot tell what model `resnet50` is", "slrc init"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_a_model_that_is_not_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, spec: str, message: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_mistake(run(command, spec), message, hint)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_captured(run: Run, model: Path) -> None:
    source = model.read_text().replace(
        "model = nn.Sequential(",
        "class Branches(nn.Module):\n        def forward(self, x):\n            return x if x.sum() > 0 else -x\n"
        "    model = nn.Sequential(Branches(), ",
    )
    model.write_text(source)
    assert_mistake(run("inspect", model), "return x if x.sum() > 0 else -x", "control flow")


BAD_EXAMPLE = """
import torch
from torch import nn

import slrc


def workload():
    return slrc.Workload(nn.Linear(4, 4), example_inputs=(torch.randn(2, 5),))
"""


@pytest.mark.parametrize("command", ["inspect", "compile"])
def test_an_example_that_does_not_fit_is_one_error(run: Run, model: Path, command: str) -> None:
    model.write_text(BAD_EXAMPLE)
    result = run(command, model)
    assert_mistake(result, "fails on its example inputs at tinynet.py:9: `return slrc.Workload(", "(2, 5)")
    assert len(result.err.strip().splitlines()) == 3


@pytest.mark.parametrize("debug", [False, True])
def test_torch_speaks_only_with_debug(model: Path, debug: bool) -> None:
    """In a process of its own: the mistake is only found while tracing, behind pages of torch's log."""
    source = model.read_text().replace(
        "    model = nn.Sequential(",
        "    class Branches(nn.Module):\n        def forward(self, x):\n            return x if x.sum() < 1e9 else -x\n"
        "    model = nn.Sequential(Branches(), ",
    )
    model.write_text(source)
    command = [sys.executable, "-m", "slrc", "inspect", str(model), *(["--debug"] if debug else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "return x if x.sum() < 1e9 else -x" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    assert (len(done.stderr.strip().splitlines()) == 3) == (not debug)


def test_the_options_are_those_of_the_configuration() -> None:
    by_command = {c.name: {p.name: p for p in c.params} for c in typer.main.get_command(cli.app).commands.values()}
    fields = options()
    assert by_command["compile"].keys() == {
        *fields, "model", "config", "out", "resume", "overwrite", "debug"
    }  # fmt: skip
    assert by_command["inspect"].keys() == {*planning_options(), "target", "threads", "model", "plan_out", "debug"}
    for command in by_command.values():
        for name, field in fields.items():
            assert name not in command or command[name].help == field.description


def test_a_foreign_output_folder(run: Run, model: Path) -> None:
    Path("build").mkdir()
    Path("build/thesis.tex").touch()
    assert_mistake(run("compile", model), "`build` exists and was not written by slrc", "--out")
    assert [p.name for p in Path("build").iterdir()] == ["thesis.tex"]


def test_a_plan_of_another_model(run: Run, model: Path) -> None:
    assert run("inspect", model, "--pattern", "unstructured", "--plan-out", "plan.json").code == 0
    text = Path("plan.json").read_text()
    Path("plan.json").write_text(text.replace("3.weight", "layer3.0.conv2.weight"))
    result = run("compile", model, "--plan", "plan.json")
    assert_mistake(result, "the model has no tensor `layer3.0.conv2.weight`", "slrc inspect --plan-out")


def test_bench_of_what_is_no_output(run: Run, tmp_path: Path) -> None:
    assert_mistake(run("bench", tmp_path), "has no report.json", "slrc compile --out")
    assert_mistake(run("bench", tmp_path / "none"), "has no report.json", "slrc compile --out")


@pytest.mark.parametrize(
    "name", ["report.json", "inputs.safetensors", "ort/compiled/model.onnx", "ort/dense/manifest.json"]
)
def test_bench_of_a_damaged_output(run: Run, compiled: Path, tmp_path: Path, name: str) -> None:
    import shutil

    copy = shutil.copytree(compiled, tmp_path / "copy")
    (copy / name).write_bytes(b"damaged")
    result = run("bench", copy)
    assert (result.code, result.out) == (2, "")
    assert "error: " in result.err
    assert Path(name).name.split(".")[0] in result.err
    assert "Traceback" not in result.err


def test_init_does_not_replace_a_file(run: Run, model: Path) -> None:
    before = model.read_text()
    assert_mistake(run("init", model), "exists: it will not be replaced", "another name")
    assert model.read_text() == before


def test_init_into_a_folder_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = run("init", tmp_path / "none" / "model.py")
    assert result.code == 2
    assert "No such file or directory" in result.err


def test_plan_out_that_cannot_be_written(run: Run, model: Path) -> None:
    result = run("inspect", model, "--plan-out", "none/plan.json")
    assert result.code == 2
    assert "error: cannot write `none/plan.json`: No such file or directory" in result.err


@pytest.mark.parametrize("arguments", [["compile"], ["compile", "--nope"], ["nope"], ["bench"]])
def test_usage_errors(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err


def test_debug_shows_the_trace(run: Run, model: Path) -> None:
    model.write_text(model.read_text().replace("    return slrc.Workload(", "    return 1 / 0\n    slrc.Workload("))
    result = run("compile", model, "--debug")
    assert result.code == 2
    assert "Traceback (most recent call last)" in result.err
    assert "ZeroDivisionError: division by zero" in result.err
    assert "error: `workload()` in " in result.err


def test_a_bug_asks_for_a_report(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("slrc.api.compile", broken)
    result = run("compile", model)
    assert result.code == 1
    assert result.err.startswith("error: internal error: IndexError: list index out of range\n\nhint: this is a bug")
    assert "Traceback" not in result.err


def test_interrupted(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slrc.api.compile", stopped)
    result = run("compile", model)
    assert result.code == 130
    assert result.err.startswith("error: interrupted\n\nhint: `slrc compile --resume`")
