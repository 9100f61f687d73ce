"""Manifests: what they may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from slrc.backends.base import MANIFEST, Artifact, FileName
from slrc.backends.ort import OnnxRuntime
from slrc.errors import BackendError

ELSEWHERE = [
    "/tmp/evil.so",
    "../evil.so",
    "a/b.so",
    "..",
    ".",
    "",
    "a/",
    "C:\\evil.so",
    "a\\b.so",
    "C:evil.so",
    "a\nb",
    "a\0",
]


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("field", ["kernels", "model_file"])
def test_a_manifest_names_files_beside_it_only(field: str, name: str, tmp_path: Path) -> None:
    artifact = Artifact(target="ort", model_file="model.onnx", dynamic_batch=True, inputs=("x",), outputs=("y",))
    artifact.write(tmp_path)
    assert Artifact.read(tmp_path) == artifact
    data = json.loads((tmp_path / MANIFEST).read_text()) | {field: name}
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BackendError, match=f"field `{field}`: .*expected the bare name of a file or folder, got"):
        OnnxRuntime().load(tmp_path)


def test_bare_names_are_taken() -> None:
    for name in ("model.onnx", "libslrc_kernels_x86_64.so", "tensorrt-rtx-sm86", "..a", "é b"):
        assert TypeAdapter(FileName).validate_python(name) == name
    with pytest.raises(ValidationError):
        TypeAdapter(FileName).validate_python(None)
