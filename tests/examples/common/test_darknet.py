"""Darknet's networks: sizes, layers that look back, and both kinds of weights files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slrc.errors import WorkloadError

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from common.darknet import FULL, TINY, Darknet, Row, load_weights

WEIGHTS = Path(os.environ.get("SLRC_DATA", "missing")).expanduser() / "weights" / "coco_yolov3_tiny.safetensors"
SMALL: list[Row] = [
    *[("conv", 4, 3, 1), ("conv", 4, 1, 1), ("shortcut", -2), ("pool", 1), ("head",), ("yolo",)],
    *[("route", -4), ("pool", 2), ("upsample",), ("route", -1, 0), ("head",), ("yolo",)],
]


@pytest.mark.parametrize(("rows", "parameters", "heads"), [(TINY, 8_852_366, 2), (FULL, 61_949_149, 3)])
def test_networks_are_darknets(rows: list[Row], parameters: int, heads: int) -> None:
    with torch.device("meta"):
        model = Darknet(rows).eval()
        outputs = model(torch.empty(1, 3, 64, 96))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [tuple(y.shape) for y in outputs] == [(1, 255, 2 << i, 3 << i) for i in range(heads)]


def test_layers_look_back() -> None:
    torch.manual_seed(0)
    model = Darknet(SMALL).eval()
    x = torch.rand(1, 3, 8, 8)
    first, second = model(x)
    a = model.layers[0](x)
    b = model.layers[1](a) + a
    pooled = torch.nn.functional.max_pool2d(torch.nn.functional.pad(b, (0, 1, 0, 1), value=-1e9), 2, 1)
    torch.testing.assert_close(first, model.layers[4](pooled))
    up = torch.nn.functional.interpolate(torch.nn.functional.max_pool2d(b, 2), scale_factor=2)
    torch.testing.assert_close(second, model.layers[10](torch.cat([up, a], 1)))


def test_weights_by_name_and_in_darknets_order_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Darknet(SMALL)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    save_file({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "w.safetensors")
    values = []
    for number in (0, 1, 4, 10):
        layer = model.layers[number]
        norm = layer.bn
        first = [layer.conv.bias] if norm is None else [norm.bias, norm.weight, norm.running_mean, norm.running_var]
        values += [t.detach().numpy().ravel() for t in (*first, layer.conv.weight)]
    header = np.array([0, 2, 0, 5, 0], np.int32).tobytes()
    (tmp_path / "w.weights").write_bytes(header + np.concatenate(values).tobytes())
    for name in ("w.safetensors", "w.weights"):
        other = Darknet(SMALL)
        load_weights(other, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
        with pytest.raises(WorkloadError, match=f"{name}` does not fit the network"):
            load_weights(Darknet(SMALL[:-2]), tmp_path / name)


def test_published_weights_load() -> None:
    if not WEIGHTS.exists():
        pytest.skip("needs SLRC_DATA with weights")
    model = Darknet(TINY)
    load_weights(model, WEIGHTS)
    assert 0 < float(model.layers[0].bn.running_var.mean()) != 1
