"""The output folder: what is never replaced, and what an interrupted run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from slrc.errors import OutputError
from slrc.workspace import Workspace

RUN = {"model": "model.py", "sparsity": 0.5, "skip": ("head",)}
REPORT = json.dumps({"schema_version": 1, "pattern": "channel", "sparsity": {}, "checks": []})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "build"


def unfinished(out: Path, run: dict[str, Any] = RUN) -> None:
    """A run that got as far as its first checkpoint."""
    workspace = Workspace(out, run)
    (workspace.checkpoints / "000000").mkdir(parents=True)
    workspace.keep_tensors("dense", {"w": torch.arange(3.0)})
    workspace.close()


def finished(out: Path, text: str) -> None:
    workspace = Workspace(out, RUN)
    (workspace.result / "report.json").write_text(REPORT)
    (workspace.result / "model.pt2").write_text(text)
    assert text not in [p.read_text() for p in out.glob("*.pt2")]
    workspace.publish()
    workspace.close()


def test_the_result_appears_whole(out: Path) -> None:
    finished(out, "first")
    assert (out / "model.pt2").read_text() == "first"
    assert [p.name for p in out.parent.iterdir()] == ["build"]


def test_an_older_output_is_replaced(out: Path) -> None:
    finished(out, "first")
    (out / "plan.json").touch()
    finished(out, "second")
    assert sorted(p.name for p in out.iterdir()) == ["model.pt2", "report.json"]
    assert (out / "model.pt2").read_text() == "second"


def test_a_users_file_in_an_older_output_is_not_lost(out: Path) -> None:
    finished(out, "first")
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(OutputError, match=r"build/notes\.txt` was not written by slrc, and would be lost"):
        Workspace(out, RUN)
    assert (out / "notes.txt").read_text() == "keep me"


def test_an_older_output_comes_back_if_the_new_one_cannot(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(out, "first")
    workspace = Workspace(out, RUN)
    result, rename = workspace.result, Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == result:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="No space left"):
        workspace.publish()
    assert (out / "model.pt2").read_text() == "first"


@pytest.mark.parametrize("name", ["thesis.tex", "report.json"])
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_foreign_folder_is_refused(out: Path, name: str, flags: dict[str, bool]) -> None:
    out.mkdir(parents=True)
    (out / name).write_text('{"not": "ours"}')
    with pytest.raises(OutputError, match="was not written by slrc") as caught:
        Workspace(out, RUN, **flags)
    assert "--out" in (caught.value.hint or "")
    assert (out / name).exists()
    assert [p.name for p in out.parent.iterdir()] == ["build"]


def test_a_file_in_the_way_is_refused(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("a file")
    with pytest.raises(OutputError, match="was not written by slrc"):
        Workspace(out, RUN)
    assert out.read_text() == "a file"


def test_the_root_folder_is_refused() -> None:
    with pytest.raises(OutputError, match="was not written by slrc"):
        Workspace(Path("/"), RUN)


def test_an_empty_folder_will_do(out: Path) -> None:
    out.mkdir(parents=True)
    finished(out, "first")
    assert (out / "model.pt2").exists()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_foreign_work_folder_is_refused(out: Path, flags: dict[str, bool]) -> None:
    work = out.with_name("build.work")
    work.mkdir(parents=True)
    (work / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"build\.work` exists and was not written by slrc"):
        Workspace(out, RUN, **flags)
    assert [p.name for p in work.iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_is_in_the_way(out: Path) -> None:
    unfinished(out)
    with pytest.raises(OutputError, match="an unfinished run lies in") as caught:
        Workspace(out, RUN)
    assert "--resume" in (caught.value.hint or "")
    assert "--overwrite" in (caught.value.hint or "")
    assert out.with_name("build.work").exists()


def test_resume_goes_on(out: Path) -> None:
    unfinished(out)
    workspace = Workspace(out, RUN, resume=True)
    assert workspace.resumed
    assert (workspace.checkpoints / "000000").exists()
    kept = workspace.keep_tensors("dense", {"w": torch.zeros(3)})
    assert torch.equal(kept["w"], torch.arange(3.0))


def test_overwrite_starts_anew(out: Path) -> None:
    unfinished(out)
    workspace = Workspace(out, {**RUN, "sparsity": 0.75}, overwrite=True)
    assert not workspace.resumed
    assert not workspace.checkpoints.exists()
    assert torch.equal(workspace.keep_tensors("dense", {"w": torch.zeros(3)})["w"], torch.zeros(3))


def test_resume_with_other_options_is_refused(out: Path) -> None:
    unfinished(out)
    with pytest.raises(OutputError, match=r"`sparsity` was 0\.5, now 0\.75") as caught:
        Workspace(out, {**RUN, "sparsity": 0.75}, resume=True)
    assert "same options" in (caught.value.hint or "")
    assert (out.with_name("build.work") / "checkpoints" / "000000").exists()
    assert Workspace(out, RUN, resume=True).resumed  # though the error above is still held


def test_nothing_to_resume(out: Path) -> None:
    with pytest.raises(OutputError, match="there is no unfinished run"):
        Workspace(out, RUN, resume=True)
    assert list(out.parent.iterdir()) == []


def test_another_run_is_at_work(out: Path) -> None:
    first = Workspace(out, RUN)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="another slrc run is at work"):
            Workspace(out, RUN, **flags)
    first.close()
    Workspace(out, RUN).close()


def test_an_early_failure_leaves_nothing(out: Path) -> None:
    workspace = Workspace(out, RUN)
    workspace.keep_tensors("dense", {"w": torch.zeros(3)})
    workspace.close()
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk(out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    workspace = Workspace(out, RUN)
    monkeypatch.setattr("slrc.workspace.save_file", full)
    with pytest.raises(OutputError, match=r"cannot write to .*No space left on device") as caught:
        workspace.keep_tensors("dense", {"w": torch.zeros(3)})
    assert "free some space" in (caught.value.hint or "")
    workspace.close()
    assert list(out.parent.iterdir()) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to"):
        Workspace(tmp_path / "file" / "build", RUN)


def test_a_damaged_file_of_an_interrupted_run(out: Path) -> None:
    unfinished(out)
    (out.with_name("build.work") / "dense.safetensors").write_bytes(b"damaged")
    workspace = Workspace(out, RUN, resume=True)
    with pytest.raises(OutputError, match=r"dense\.safetensors` cannot be read"):
        workspace.keep_tensors("dense", {"w": torch.zeros(3)})


@pytest.mark.parametrize("targets", [None, 3, [3], [None], [{}], [{"folder": ["notes"]}], {"folder": "notes"}])
def test_a_report_that_lists_its_targets_otherwise(out: Path, targets: object) -> None:
    finished(out, "old")
    (out / "report.json").write_text(json.dumps(json.loads(REPORT) | {"targets": targets}))
    (out / "notes").mkdir()
    with pytest.raises(OutputError, match="notes` was not written by slrc"):
        Workspace(out, RUN)


def test_a_run_that_its_launcher_restarts_begins_or_goes_on(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "build", RUN, restarted=True)
    first.checkpoints.mkdir()
    first.close()
    again = Workspace(tmp_path / "build", RUN, overwrite=True, restarted=True)
    assert again.resumed
    assert again.checkpoints.exists()
    again.close()
    with pytest.raises(OutputError, match="`sparsity` was"):
        Workspace(tmp_path / "build", {**RUN, "sparsity": 0.75}, restarted=True)
