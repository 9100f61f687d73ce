"""Which operators a stored program may name, and what is asked of their operands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from slrc.errors import OutputError
from slrc.ir.graph_values import find_operator
from slrc.ir.operators import ASSERTIONS, NAMES, is_functional
from slrc.ir.program import Program, capture
from slrc.passes.analysis.index_rules import RULES
from slrc.verify import outputs_of

aten = torch.ops.aten

FAMILIES = """
    aten._assert_tensor_metadata.default aten._native_batch_norm_legit.no_stats
    aten._native_batch_norm_legit_no_training.default aten._to_copy.default aten._unsafe_view.default
    aten.adaptive_avg_pool2d.default aten.add.Tensor aten.addcmul.default aten.arange.default aten.arange.start
    aten.argmax.default aten.avg_pool2d.default aten.bitwise_not.default aten.cat.default aten.clamp.default
    aten.clamp_min.default aten.clone.default aten.col2im.default aten.conv2d.default aten.conv2d.padding
    aten.conv_transpose2d.input aten.copy.default aten.cos.default aten.cumsum.default aten.div.Tensor
    aten.div.Tensor_mode aten.einsum.default aten.embedding.default aten.empty.memory_format aten.eq.Scalar
    aten.exp.default aten.expand.default aten.fill.Scalar aten.fill.Tensor aten.gelu.default aten.group_norm.default
    aten.gru.input aten.gru_cell.default aten.hardsigmoid.default aten.hardswish.default aten.hardtanh.default
    aten.im2col.default aten.index.Tensor aten.layer_norm.default aten.leaky_relu.default
    aten.linalg_vector_norm.default aten.linear.default aten.lstm.input aten.lstm_cell.default aten.masked_fill.Scalar
    aten.matmul.default aten.max.dim aten.max_pool2d.default aten.max_pool2d_with_indices.default
    aten.max_unpool2d.default aten.mean.default aten.mean.dim aten.mul.Tensor aten.ne.Scalar aten.neg.default
    aten.new_zeros.default aten.pad.default aten.permute.default aten.pow.Scalar aten.pow.Tensor_Scalar
    aten.relu.default aten.repeat.default aten.repeat_interleave.self_int aten.rnn_tanh.input aten.rnn_tanh_cell.default
    aten.roll.default aten.rsub.Scalar aten.scaled_dot_product_attention.default aten.select.int
    aten.select_scatter.default aten.sigmoid.default aten.silu.default aten.sin.default aten.slice.Tensor
    aten.slice_scatter.default aten.softmax.int aten.split.Tensor aten.split_with_sizes.default aten.squeeze.dim
    aten.stack.default aten.sub.Tensor aten.sum.default aten.sum.dim_IntList aten.sym_size.int aten.tanh.default
    aten.topk.default aten.transpose.int aten.triu.default aten.type_as.default aten.unbind.int aten.unfold.default
    aten.unsqueeze.default aten.upsample_bicubic2d.vec aten.upsample_bilinear2d.vec aten.upsample_nearest2d.vec
    aten.view.default aten.zero.default aten.zeros.default aten.zeros_like.default operator.getitem operator.mul
"""
"""What exported models of torchvision and timm are made of, recurrent networks, transformers and a U-Net."""

REFUSED = """
    set_.source_Tensor set_.source_Storage_storage_offset set_.default set.source_Tensor set.source_Storage
    resize_.default resize.default resize_as_.default as_strided.default as_strided_.default as_strided_copy.default
    _sparse_coo_tensor_unsafe.default _sparse_csr_tensor_unsafe.default _sparse_compressed_tensor_unsafe.default
    _unsafe_index.Tensor _unsafe_index_put.default _unsafe_masked_index.default segment_reduce.default
    _nested_view_from_buffer.default _nested_tensor_from_tensor_list.default _reshape_alias.default from_file.default
    save.default warn.default _foobar.default _test_parallel_materialize.default fbgemm_pack_gemm_matrix_fp16.default
    _wrapped_linear_prepack.default _embedding_bag.default embedding_bag.default rand.default randn.default
    randint.default randperm.default bernoulli.default multinomial.default normal_functional.default add_.Tensor
    relu_.default zero_.default index_put_.default add.out relu.out cat.out _native_batch_norm_legit.default
    record_stream.default requires_grad_.default data.default _fused_sgd_.default _foreach_add_.List
    _make_per_tensor_quantized_tensor.default mkldnn_linear.default _cudnn_rnn.default sparse_coo_tensor.size
    empty_strided.default new_empty_strided.default _efficientzerotensor.default pin_memory.default to_mkldnn.default
"""


@pytest.mark.parametrize("name", REFUSED.split())
def test_what_does_more_than_compute_is_refused(name: str) -> None:
    packet, _, overload = name.partition(".")
    assert overload in getattr(aten, packet).overloads(), "not an operator of this torch: the test would say nothing"
    with pytest.raises(OutputError, match="unknown operator"):
        find_operator(f"aten.{name}")


def test_all_that_may_be_named_is_there_and_changes_nothing() -> None:
    for name in sorted(NAMES | ASSERTIONS):
        packet = getattr(aten, name)
        allowed = [o for o in packet.overloads() if is_functional(getattr(packet, o))]
        assert allowed, name
        for overload in allowed:
            found = find_operator(f"aten.{name}.{overload}")
            written = [a for a in found._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            assert not written, found


def test_what_the_label_rules_know_can_be_stored() -> None:
    known = {name for name in RULES if hasattr(aten, name)}
    assert len(known) > 200
    assert known <= NAMES


def test_the_operators_of_many_families_can_be_stored() -> None:
    names = FAMILIES.split()
    assert len(names) > 60
    for name in names:
        find_operator(name)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(12 if layer.bidirectional else 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Run(nn.Module):
    """A model from its forward and its tensors."""

    def __init__(self, run: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.run = run
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


STORABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)), (2, 5, 4)),
    "LSTM without biases, batch second": (lambda: Recurrent(nn.LSTM(4, 6, bias=False)), (5, 2, 4)),
    "LSTM with projections": (lambda: Recurrent(nn.LSTM(4, 8, proj_size=6, batch_first=True)), (2, 5, 4)),
    "GRU": (lambda: Recurrent(nn.GRU(4, 6, batch_first=True)), (2, 5, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), (2, 4, 5)),
    "weight norm of linear": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6), dim=1), (2, 4)),
    "group and instance norm": (
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)),
        (2, 4, 5),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "Fourier transform": (lambda: Run(lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x))), (2, 4, 4)),
    "filled tensor": (lambda: Run(lambda m, x: x + torch.empty(4, 4).fill_(-1.0).triu_(1)), (2, 4, 4)),
    "grid": (
        lambda: Run(
            lambda m, x: nn.functional.grid_sample(x, m.grid.expand(x.shape[0], 3, 3, 2)), grid=torch.rand(3, 3, 2)
        ),
        (2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", STORABLE)
def test_it_is_stored_and_read(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = STORABLE[name]
    program = capture(make().eval(), (torch.randn(shape),))
    program.save(tmp_path)
    results = [outputs_of(p.module(), program.example_inputs) for p in (program, Program.load(tmp_path))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def lstm(x: Tensor, *tensors: Tensor) -> Tensor:
    return aten.lstm.input(x, tensors[:2], tensors[2:], True, 1, 0.0, False, False, True)[0]


def normalize(x: Tensor, *tensors: Tensor) -> Tensor:
    return aten._native_batch_norm_legit_no_training.default(x, *tensors, 0.1, 1e-5)[0]


def with_batch_statistics(x: Tensor, *tensors: Tensor) -> Tensor:
    return aten._native_batch_norm_legit.no_stats(x, *tensors, True, 0.1, 1e-5)[0]


def weight_norm(x: Tensor, direction: Tensor, magnitude: Tensor) -> Tensor:
    return x @ aten._weight_norm_interface.default(direction, magnitude, 0)[0]


def attend(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return aten.scaled_dot_product_attention.default(x, keys, values)


SHAPES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    "lstm": (lstm, (2, 3, 4), [(1, 2, 6), (1, 2, 6), (24, 4), (24, 6), (24,), (24,)]),
    "batch norm": (normalize, (2, 8, 3), [(8,)] * 4),
    "batch statistics": (with_batch_statistics, (2, 8, 3), [(8,)] * 2),
    "weight norm": (weight_norm, (2, 8), [(8, 4), (8, 1)]),
    "attention": (attend, (1, 2, 4, 8), [(1, 2, 4, 8)] * 2),
}
UNSEEN = {
    "lstm": [(0, 1), (1, 1), (2, 0), (3, 0), (4, 0), (5, 0)],
    "batch norm": [(0, 0), (1, 0), (2, 0), (3, 0)],
    "batch statistics": [(0, 0), (1, 0)],
    "weight norm": [(0, 0), (1, 0)],
    "attention": [(0, 2), (1, 2)],
}
"""Operands, and which of their dimensions may be 1 for all that tracing sees: kernels read past their end."""


def store(name: str, shapes: list[tuple[int, ...]], folder: Path) -> Tensor:
    """Write a program of one operator; return what it is to give."""
    torch.manual_seed(0)
    run, shape, _ = SHAPES[name]
    tensors = {f"t{i}": torch.rand(s) for i, s in enumerate(shapes)}
    model = Run(lambda m, x: run(x, *(getattr(m, t) for t in tensors)), **tensors)
    with mock.patch("slrc.ir.program._try"):  # a call would read past the operands here already
        program = capture(model, (torch.rand(shape),))
    program.save(folder)
    return program.example_inputs[0]


@pytest.mark.parametrize("name", SHAPES)
def test_operands_that_fit(name: str, tmp_path: Path) -> None:
    x = store(name, SHAPES[name][2], tmp_path)
    assert all(torch.isfinite(y).all() for y in outputs_of(Program.load(tmp_path).module(), (x,)))


@pytest.mark.parametrize(("name", "operand", "dim"), [(name, *where) for name in UNSEEN for where in UNSEEN[name]])
def test_an_operand_that_a_kernel_would_read_past_is_refused(name: str, operand: int, dim: int, tmp_path: Path) -> None:
    shapes = [list(shape) for shape in SHAPES[name][2]]
    shapes[operand][dim] = 1
    store(name, [tuple(shape) for shape in shapes], tmp_path)
    with pytest.raises(OutputError, match="operands do not fit at `"):
        Program.load(tmp_path)


MODES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "interpolation": lambda m, x: aten.grid_sampler_3d.default(x, m.grid, 7, 0, True),
    "padding": lambda m, x: aten.grid_sampler_3d.default(x, m.grid, 0, -1, True),
}


@pytest.mark.parametrize("name", MODES)
def test_a_number_that_leaves_the_result_unset_is_refused(name: str, tmp_path: Path) -> None:
    with mock.patch("slrc.ir.program._try"):
        capture(Run(MODES[name], grid=torch.rand(2, 3, 3, 3, 3)), (torch.rand(2, 4, 3, 3, 3),)).save(tmp_path)
    with pytest.raises(OutputError, match="operands do not fit at `"):
        Program.load(tmp_path)


def test_an_input_is_never_written_to(tmp_path: Path) -> None:
    def count(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return x + m.calls

    capture(Run(count, calls=torch.zeros(4)), (torch.rand(4),)).save(tmp_path)
    path = tmp_path / "graph.json"
    text = path.read_text()
    writes = '"op": "aten.copy_.default", "args": [{"tensor": "calls"}'
    assert writes in text
    path.write_text(text.replace(writes, writes.replace('{"tensor": "calls"}', '{"input": 0}')))
    with pytest.raises(OutputError, match="writes to what is no tensor of the program"):
        Program.load(tmp_path)
