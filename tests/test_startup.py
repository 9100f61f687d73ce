"""What `slrc --help` and `import slrc` load: nobody should wait for torch to read a list of options."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "accelerate",
    "jinja2",
    "matplotlib",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "rich",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
}


@pytest.mark.parametrize(
    "code",
    ["import slrc; slrc.__version__", "import sys; sys.argv[1:] = ['--help']; import slrc.cli; slrc.cli.main()"],
    ids=["import", "help"],
)
def test_heavy_packages_are_not_loaded(code: str) -> None:
    listed = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stderr.split())
    assert "slrc" in loaded
    assert not loaded & HEAVY
