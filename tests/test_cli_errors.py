"""What the command line tells of an error, by where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from slrc.cli_errors import told_errors
from slrc.errors import WorkloadError

ENDED = "error: another process of this run has ended, or cannot be reached\n"
LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer")


def caused_by(cause: Exception) -> Exception:
    error = WorkloadError("`loss` failed", hint="look at it")
    error.__cause__ = cause
    return error


def told(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code and what stands on stderr."""
    with pytest.raises(SystemExit) as stopped, told_errors(debug=False):
        raise error
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        torch.distributed.DistNetworkError("the client socket has timed out"),
        torch.distributed.DistStoreError("wait timeout"),
        LOST,
        caused_by(LOST),
        caused_by(caused_by(torch.distributed.DistBackendError("NCCL error"))),
    ],
    ids=repr,
)
def test_a_process_that_cannot_be_reached_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = told(error, capsys)
    assert code == 1
    assert said.startswith(ENDED)
    assert "--resume" in said


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("expected backend gloo or nccl"), "internal error: RuntimeError: expected backend gloo or nccl"),
        (ValueError(str(LOST)), "internal error: ValueError"),
        (WorkloadError("`loss` of nccl_bench.py failed"), "`loss` of nccl_bench.py failed"),
        (caused_by(RuntimeError("no module gloo")), "`loss` failed"),
    ],
    ids=repr,
)
def test_words_alone_tell_of_no_other_process(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert told(error, capsys)[1].startswith(f"error: {says}")


def test_one_process_has_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert told(LOST, capsys)[1].startswith("error: internal error: RuntimeError: [/pytorch")


ONE_OF_TWO = """
import torch, torch.distributed as distributed
from torch import nn
from slrc.cli_errors import told_errors
with told_errors(debug=False):
    distributed.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank={rank}, world_size=2)
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    distributed.barrier()
    if {rank}:
        os._exit(3)
    {exchange}
"""


@pytest.mark.parametrize("exchange", ["distributed.barrier()", "model(torch.ones(1, 2)).sum().backward()"])
def test_gloo_loses_another_process(exchange: str, start_process: Callable[..., Any], tmp_path: Path) -> None:
    started = [
        start_process(ONE_OF_TWO.format(rank=rank, exchange=exchange), tmp_path, WORLD_SIZE="2") for rank in (0, 1)
    ]
    first, second = (process.finish() for process in started)
    assert second.code == 3
    assert first.code == 1
    assert ENDED in first.err
