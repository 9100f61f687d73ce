"""What processes started by tests have imported already: all of a compile, much of which torch imports late."""

import tempfile
from pathlib import Path

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import torch
from torch import nn

import slrc.api
import slrc.cli
import slrc.reporting.page
import slrc.reporting.tables  # noqa: F401
from slrc.backends.onnx_export import export_onnx
from slrc.ir.program import capture

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    export_onnx(capture(nn.Linear(2, 2), (torch.zeros(2, 2),)), Path(folder) / "model.onnx")
