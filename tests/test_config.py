"""Options from the command line and from TOML: which wins, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slrc.config import CompileConfig, make_config
from slrc.errors import ConfigError, PatternError
from slrc.methods.settings import MethodName
from slrc.options import Precision
from slrc.sparsity.choices import Allocation, Attention, LayerNorm
from slrc.sparsity.patterns import NM, Block


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "slrc.toml"
        path.write_text(text)
        return path

    return write


def test_defaults() -> None:
    config = make_config({})
    assert config == CompileConfig()
    assert config.pattern is None
    assert (config.sparsity, config.method, config.target, config.keep_ends) == (None, None, ("ort",), True)
    assert not config.permute


def test_every_option_from_a_file(toml: Any) -> None:
    config = make_config(
        {},
        toml("""
pattern = "block:8x1"
sparsity = 0.75
allocate = "global"
attention = "width"
layer-norm = "narrow"
permute = true
method = "admm"
epochs = 3
retrain-epochs = 2
updates-per-epoch = 5
probe-batches = 1
precision = "bf16"
target = ["ort", "tensorrt-rtx:sm86"]
skip = ["head", "blocks.*"]
keep-ends = false
threads = 2
seed = 7

[slr]
rho = 0.2
s0 = 0.02
M = 200
r = 0.2

[admm]
rho = 0.3
"""),
    )
    assert config.pattern == Block(8, 1)
    assert (config.sparsity, config.allocate, config.method) == (0.75, Allocation.GLOBAL, MethodName.ADMM)
    assert (config.epochs, config.retrain_epochs, config.updates_per_epoch, config.probe_batches) == (3, 2, 5, 1)
    assert (config.attention, config.layer_norm) == (Attention.WIDTH, LayerNorm.NARROW)
    assert config.precision is Precision.BF16
    assert config.permute
    assert (config.target, config.skip) == (("ort", "tensorrt-rtx:sm86"), ("head", "blocks.*"))
    assert (config.keep_ends, config.threads, config.seed) == (False, 2, 7)
    assert (config.slr.rho, config.slr.s0, config.slr.M, config.slr.r) == (0.2, 0.02, 200.0, 0.2)
    assert config.admm.rho == 0.3


def test_a_plan_has_decided_what_to_prune(toml: Any) -> None:
    assert make_config({"plan": Path("plan.json")}, toml("epochs = 3")).plan == Path("plan.json")
    with pytest.raises(ConfigError, match="`--plan` and `--keep-ends` exclude each other"):
        make_config({"plan": Path("plan.json")}, toml("keep-ends = false"))


def test_the_command_line_wins(toml: Any) -> None:
    file = toml('sparsity = 0.75\nepochs = 3\npattern = "2:4"\n')
    config = make_config({"sparsity": 0.5, "epochs": 0}, file)
    assert (config.sparsity, config.epochs, config.pattern) == (0.5, 0, NM(2, 4))


def test_widths_are_rounded_as_the_targets_like_it_unless_a_number_is_given(toml: Any) -> None:
    assert make_config({}).round_to == "auto"
    assert make_config({"round_to": "16"}).round_to == 16
    assert make_config({"round_to": "auto"}, toml("round-to = 4")).round_to == "auto"


def test_one_name_will_do_for_a_list(toml: Any) -> None:
    config = make_config({}, toml('target = "ort"\nskip = "head"\n'))
    assert (config.target, config.skip) == (("ort",), ("head",))


def test_underscores_will_do_in_a_file(toml: Any) -> None:
    assert make_config({}, toml("retrain_epochs = 2")).retrain_epochs == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "option `--sparsity`: input should be less than 1, got 1.0"),
        ({"sparsity": -0.1}, "option `--sparsity`: input should be greater than or equal to 0, got -0.1"),
        ({"sparsity": float("nan")}, "option `--sparsity`: .*got nan"),
        ({"sparsity": "half"}, "option `--sparsity`: input should be a valid number.*got 'half'"),
        ({"epochs": -1}, "option `--epochs`: .*greater than or equal to 0, got -1"),
        ({"epochs": 1.5}, "option `--epochs`: input should be a valid integer.*got 1.5"),
        ({"retrain_epochs": -1}, "option `--retrain-epochs`: .*got -1"),
        ({"round_to": 0}, "option `--round-to`: expected a whole number from 1 on, or `auto`, got 0"),
        ({"round_to": "many"}, "option `--round-to`: expected a whole number from 1 on, or `auto`, got 'many'"),
        ({"updates_per_epoch": 0}, "option `--updates-per-epoch`: .*got 0"),
        ({"threads": 0}, "option `--threads`: .*greater than or equal to 1, got 0"),
        ({"seed": -1}, "option `--seed`: .*got -1"),
        ({"seed": 2**32}, "option `--seed`: .*less than 4294967296"),
        ({"precision": "fp8"}, "option `--precision`: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ({"layer_norm": "off"}, "option `--layer-norm`: input should be 'keep' or 'narrow', got 'off'"),
        (
            {"method": "sgd"},
            "option `--method`: input should be 'slr', .* or 'reconstruct', got 'sgd'",
        ),
        ({"allocate": "layer"}, "option `--allocate`: input should be 'uniform' or 'global', got 'layer'"),
        ({"latency_budget": 1.0}, "option `--latency-budget`: .*less than 1, got 1.0"),
        ({"latency_budget": True}, "option `--latency-budget`: input should be a number"),
        ({"speedup": 1}, "option `--speedup`: .*greater than 1, got 1"),
        ({"speedup": 2, "latency_budget": 0.5}, "`--speedup` and `--latency-budget` exclude each other"),
        ({"speedup": 2, "budget_metric": "error"}, '`budget-metric = "error"` weighs layers alone'),
        ({"latency_budget": 0.5, "sparsity": 0.5}, "`--sparsity` and `--latency-budget` exclude"),
        ({"speedup": 2, "allocate": "global"}, "`--allocate global` and `--speedup` exclude"),
        ({"speedup": 2, "pattern": "block:8x1", "permute": True}, "`--permute` and `--speedup` exclude"),
        ({"speedup": 2, "pattern": "2:4"}, "`--speedup` chooses how much is pruned, and `--pattern 2:4` prescribes it"),
        ({"pattern": "auto"}, "`--pattern auto` .* needs to know what to reach"),
        ({"target": ()}, "option `--target`: at least one target is needed"),
        ({"target": ("ort", "ort")}, "option `--target`: a target is given twice"),
        ({"pattern": 3}, "option `--pattern`: a pattern is a text such as 'channel' or 'block:8x1', got 3"),
        ({"slr": {"M": 0.5}}, r"option `slr\.M`: input should be greater than 1, got 0.5"),
        ({"sparsty": 0.5}, "there is no such option"),
    ],
)
def test_what_is_said_about_a_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(options)


@pytest.mark.parametrize(
    ("options", "example"),
    [
        ({"sparsity": 75}, "`--sparsity 0.75`"),
        ({"latency_budget": 2.0}, "`--latency-budget 0.5`"),
        ({"speedup": 0.5}, "`--speedup 2`"),
        ({"epochs": -1}, "`--epochs 10`"),
    ],
)
def test_a_number_out_of_range_has_a_hint(options: dict[str, Any], example: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(options)
    assert example in (caught.value.hint or "")


def test_an_unknown_pattern() -> None:
    with pytest.raises(PatternError, match="unknown pattern `blok`"):
        make_config({"pattern": "blok"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty = 0.5", r"`sparsty` in `.*slrc\.toml`: there is no such option"),
        ("sparsity = 2", r"`sparsity` in `.*slrc\.toml`: input should be less than 1, got 2"),
        ("epochs = true", r"`epochs` in `.*slrc\.toml`: input should be a number, got True"),
        ("[slr]\nr = 1.0", r"`slr\.r` in `.*slrc\.toml`: input should be less than 1, got 1.0"),
        ("[slr]\nrow = 1.0", r"`slr\.row` in `.*slrc\.toml`: there is no such option"),
        ("slr = 3", r"`slr` in `.*slrc\.toml`: "),
        ("epochs = ", r"configuration file `.*slrc\.toml` cannot be read: Invalid value"),
    ],
)
def test_what_is_said_about_a_wrong_file(toml: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({}, toml(text))


@pytest.mark.parametrize("pattern", ["channel", "columns:2", "block:8x2"])
def test_permute_is_for_blocks_of_one_column(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"`--permute` .* got `--pattern {pattern}`"):
        make_config({"permute": True, "pattern": pattern})


def test_known_options_are_listed_as_they_are_written() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"epoch": 3})
    assert "retrain-epochs" in (caught.value.hint or "")


def test_the_known_options_of_a_table_are_listed(toml: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({}, toml("[slr]\nrow = 1.0"))
    assert caught.value.hint == "known options: rho, s0, M, r, rho-growth, follow, tighten, hold"


def test_a_table_takes_names_as_they_are_listed(toml: Any) -> None:
    config = make_config({}, toml("[slr]\nrho-growth = 3.0\nfollow = false\n[ac-dc]\nphase = 2"))
    assert (config.slr.rho_growth, config.slr.follow, config.ac_dc.phase) == (3.0, False, 2)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        make_config({}, tmp_path / "none.toml")
    assert "--config" in (caught.value.hint or "")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "slrc.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_config({}, tmp_path / "slrc.toml")
