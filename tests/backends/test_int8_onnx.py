"""What int8 nodes mean, in a runtime without the kernels: exact integers, rounded as the module says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from int8_layers import QLayer, qmodel, quantized_weight, random_qconv, random_qgemm
from kernel_models import exact_options

from slrc.forms.packed_int8 import PackedInt8, int8_density
from slrc.forms.packed_weight import block_density
from slrc.sparsity.patterns import parse_pattern
from slrc.sparsity.projection import project


def run(layers: dict[str, QLayer]) -> list[np.ndarray]:
    model = qmodel(layers, functions=True)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), exact_options(), providers=["CPUExecutionProvider"])
    return session.run(None, {key: x for name, layer in layers.items() for key, x in layer.feed(name).items()})


def test_functions_compute_exact_integers() -> None:
    seeds = [*range(40)]
    layers = {f"n{s}_": (random_qconv if s % 3 else random_qgemm)(np.random.default_rng(s)) for s in seeds}
    endings = {"", "residual", "float", "residual_float"}
    kinds = endings | {"_".join(filter(None, ("leakyrelu", ending))) for ending in endings}
    assert {layer.emitted.op_type.partition("_")[2] for layer in layers.values()} == kinds
    for (name, layer), y in zip(layers.items(), run(layers), strict=True):
        assert y.dtype == layer.expected.dtype
        np.testing.assert_array_equal(y, layer.expected, err_msg=name)


def test_only_blocks_that_are_not_zero_are_packed() -> None:
    weight = torch.zeros(16, 8, 3, 3, dtype=torch.int8)
    weight[8:, 4:, 1, 2] = 5
    weight[3, 1, 0, 0] = -127
    packed = PackedInt8.of(weight, 8)
    assert packed.columns.tolist() == [0, 14]
    assert packed.row_pointers.tolist() == [0, 1, 2]
    assert packed.values.shape == (2, 8, 4)
    assert packed.values[0].count_nonzero() == 1
    assert packed.values[0, 3, 1] == -127
    assert (packed.values[1] == 5).all()
    assert int8_density(weight, 8) == pytest.approx(2 * 32 / weight.numel())


def test_a_block_row_of_zeros_keeps_one_block() -> None:
    packed = PackedInt8.of(torch.zeros(6, 5, dtype=torch.int8), 4)
    assert packed.row_pointers.tolist() == [0, 1, 2]
    assert packed.columns.tolist() == [0, 0]


@pytest.mark.parametrize("weight", [torch.zeros(8, 8), torch.full((8, 8), -128, dtype=torch.int8)])
def test_weights_are_symmetric_bytes(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="−127 to 127"):
        PackedInt8.of(weight, 8)


def test_a_weight_pruned_to_8x4_is_packed_in_both_types() -> None:
    pattern, weight = parse_pattern("block:8x4"), torch.randn(16, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    groups = pattern.group_view(weight).shape[1]
    pruned = weight * project(pattern, weight, groups // 3)
    int8 = (pruned * 20).round().clamp(-127, 127).to(torch.int8)
    assert block_density(pruned, 8) == int8_density(int8, 8) == pytest.approx(1 / 3)


def test_a_network_pruned_to_8x1_packs_whole_quads() -> None:
    weight = quantized_weight(np.random.default_rng(0), (16, 12, 3, 3), 8, 0.9, cols=1)
    packed = PackedInt8.of(torch.from_numpy(weight), 8)
    assert packed.values.count_nonzero() == np.count_nonzero(weight)
