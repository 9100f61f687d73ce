"""Processes share out the evaluation: each sample counts once, and the metric is that of one process."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from slrc.training.batches import Dealt

SAMPLES = range(11)


class Samples(Dataset):
    """Remembers which samples were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


@pytest.mark.parametrize("count", [1, 3, 4, 6])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("even", [True, False])
def test_every_batch_is_in_one_share(count: int, processes: int, even: bool) -> None:
    batches, counted, lengths = list(range(count)), [], set()
    for index in range(processes):
        dealt = Dealt(batches, index, processes, even=even)
        for _ in range(2):  # again and again
            own = list(dealt)
        lengths.add(len(own))
        counted += own[: len(own) - dealt.has_stand_in]
        assert even or not dealt.has_stand_in
    assert sorted(counted) == batches
    assert len(lengths) == 1 or not even


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_reads_its_own_share_alone(shuffle: bool) -> None:
    """11 samples in batches of 2 are 6 batches for 4 processes: the last two have none in the second round."""
    everything, seen = Samples(), []
    for index in range(4):
        torch.manual_seed(0)  # as all processes do
        loader = DataLoader(everything, batch_size=2, shuffle=shuffle, collate_fn=list)
        everything.read.clear()
        dealt = Dealt(loader, index, 4, even=True)
        batches = list(dealt)
        assert len(batches) == 2
        assert everything.read == [i for batch in batches for i in batch]
        assert dealt.has_stand_in is (index >= 2)
        seen += [i for batch in batches[: 2 - dealt.has_stand_in] for i in batch]
    assert sorted(seen) == list(SAMPLES)


# 30 samples: in batches of 4 the last one is short, in batches of 6 and 30 the second process has one batch less.
SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slrc
from slrc.config import CompileConfig
from slrc.sparsity.plans import Plan
from slrc.training import loop, sharding
from slrc.training.evaluation import Evaluation

torch.set_num_threads(1)
seen = []


def loss(model, batch):
    x, y, ids = batch
    seen.extend(ids.tolist())
    return {"loss": (nn.functional.cross_entropy(model(x), y, reduction="sum"), len(x))}


def make(size, shuffle=False):
    torch.manual_seed(0)
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    return slrc.Workload(
        model=nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)),
        example_inputs=(x[:1],),
        train_batches=DataLoader(TensorDataset(x, y), batch_size=5),
        eval_batches=DataLoader(TensorDataset(x, y, torch.arange(30)), batch_size=size, shuffle=shuffle),
        evaluate_batch=loss,
    )


def metric(workload, sharded):
    accelerator = Accelerator(cpu=True)
    evaluation, model = Evaluation(workload, CompileConfig(), accelerator), workload.model
    if sharded:
        model = sharding.shard(evaluation.twin(model), accelerator)
    model[1].running_mean += int(os.environ.get("RANK", 0))  # as after a step with samples of its own
    seen.clear()
    return [evaluation.metric(model), list(seen)]


def curve(sharded):
    if sharded:
        os.environ[sharding.ASKED] = "true"
    config = CompileConfig(method="magnitude", epochs=1, distill=False)
    plan = Plan(sparsity_asked=0.0, sparsity=0.0, constraints=())
    return [r.metric for r in loop.train(make(7), plan, config).curve]


def main(distributed):
    kinds = (False, True) if distributed else (False,)
    return {
        **{f"{size} {sharded}": metric(make(size), sharded) for size in (4, 5, 6, 30) for sharded in kinds},
        "shuffled False": metric(make(4, shuffle=True), False),
        **{f"curve {sharded}": curve(sharded) for sharded in kinds},
    }
"""


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    module = ModuleType("one")
    exec(SCRIPT, module.__dict__)
    return module.main(distributed=False)


@pytest.fixture(scope="module")
def two(start_process: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"{SCRIPT}\nPath(os.environ['RANK']).write_text(json.dumps(main(distributed=True)))"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [start_process(code, folder, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"]
    done = [process.finish() for process in started]
    assert [d.code for d in done] == [0, 0], done
    return [json.loads(Path(folder / rank).read_text()) for rank in "01"]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [4, 5, 6, 30])
def test_two_processes_measure_what_one_does(
    one: dict[str, Any], two: list[dict[str, Any]], size: int, sharded: bool
) -> None:
    expected, _ = one[f"{size} False"]
    shares = [found[f"{size} {sharded}"] for found in two]
    assert [metric for metric, _ in shares] == [expected, expected]
    counted = [i for _, seen in shares for i in seen]
    if sharded:  # what stands in for a missing batch is run, and not counted
        assert len(counted) == 2 * size * -(-30 // size // 2) - (2 if size == 4 else 0)
    else:
        assert sorted(counted) == list(range(30))


def test_a_shuffled_set_is_shared_out_in_one_order(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    shares = [found["shuffled False"] for found in two]
    assert sorted(i for _, seen in shares for i in seen) == list(range(30))
    assert [metric for metric, _ in shares] == pytest.approx([one["4 False"][0]] * 2, rel=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_training_evaluates_so(one: dict[str, Any], two: list[dict[str, Any]], sharded: bool) -> None:
    curves = [found[f"curve {sharded}"] for found in two]
    assert curves[0] == curves[1]
    assert curves[0][0] == one["curve False"][0]
