"""Operators that a stored program may name: those that compute tensors from tensors, and do nothing else.

A file may come from anywhere, and ATen has operators that read and write files, take pointers or storages, skip the
check of an index, or write to their arguments. So what may be looked up stands here by name; of a name's overloads
those that change an argument, or take a storage, are left out. Uninitialised tensors are here since models fill them.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload, OpOverloadPacket

_LAYERS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear bilinear embedding
    scaled_dot_product_attention _safe_softmax lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training instance_norm layer_norm native_layer_norm
    group_norm native_group_norm rms_norm _fused_rms_norm _weight_norm _weight_norm_interface dropout alpha_dropout
    feature_dropout feature_alpha_dropout matmul mm bmm mv dot vdot inner outer ger addmm addmv addbmm baddbmm addr
    einsum tensordot chain_matmul kron linalg_matmul linalg_vecdot linalg_multi_dot linalg_cross cross cdist
    _cdist_forward _euclidean_dist dist cosine_similarity pairwise_distance
"""
_POINTWISE = """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh
    atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu
    clamp clamp_max clamp_min clip complex conj conj_physical _conj _conj_physical copysign cos cosh deg2rad digamma div
    divide elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac frexp ge gelu
    glu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac imag
    isclose isfinite isinf isnan isneginf isposinf ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2
    log_sigmoid log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
    masked_fill maximum minimum mish mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal polar
    polygamma positive pow prelu _prelu_kernel rad2deg real reciprocal relu relu6 remainder resolve_conj resolve_neg
    round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square sub subtract
    tan tanh threshold true_divide trunc where xlogy __and__ __or__ __xor__ __lshift__ __rshift__ special_entr
    special_erf special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1 special_gammaln
    special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_logit special_ndtr
    special_ndtri special_round special_sinc special_xlog1py special_xlogy
"""
_REDUCTIONS = """
    all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff kthvalue
    logcumsumexp logsumexp _logcumsumexp max mean median min mode msort nanmean nanmedian nansum norm linalg_norm
    linalg_matrix_norm linalg_vector_norm frobenius_norm nuclear_norm prod quantile nanquantile softmax _softmax
    log_softmax _log_softmax special_softmax special_log_softmax special_logsumexp sort std std_mean sum topk trace
    trapezoid var var_mean det logdet slogdet inverse linalg_cholesky linalg_cholesky_ex linalg_det linalg_diagonal
    linalg_eigh linalg_eigvalsh linalg_inv linalg_inv_ex linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals matrix_exp
    matrix_power
"""
_SHAPES = """
    adjoint alias atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat channel_shuffle
    native_channel_shuffle chunk clone column_stack concat concatenate constant_pad_nd contiguous copy detach diag
    diag_embed diagflat diagonal diagonal_scatter dstack expand expand_as fill flatten flip fliplr flipud hsplit hstack
    im2col col2im lift_fresh lift_fresh_copy mH mT matrix_H meshgrid moveaxis movedim narrow numpy_T pad _pad_circular
    _pad_enum permute pixel_shuffle pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat
    replication_pad1d replication_pad2d replication_pad3d reshape reshape_as _reshape_copy roll rot90 row_stack select
    select_scatter slice slice_scatter split split_with_sizes squeeze stack sum_to_size swapaxes swapdims t tensor_split
    tile to _to_copy transpose tril triu type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsafe_split_with_sizes _unsafe_view unsqueeze view view_as view_as_complex view_as_real vsplit vstack zero
    sym_numel sym_size sym_stride item _local_scalar_dense
"""
_SELECTIONS = """
    bincount bucketize gather index index_add index_copy index_fill index_put index_reduce index_select isin
    masked_scatter masked_select nonzero nonzero_static one_hot repeat_interleave scatter scatter_add scatter_reduce
    searchsorted take take_along_dim
"""
_RESAMPLING = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d
    max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d
    max_unpool3d affine_grid_generator grid_sampler grid_sampler_2d grid_sampler_3d upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _fft_c2c _fft_c2r _fft_r2c fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft
    fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq
    fft_rfftn stft istft
"""
_CONSTANTS = """
    arange bartlett_window blackman_window empty empty_like empty_permuted eye full full_like hamming_window hann_window
    kaiser_window linspace logspace new_empty new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices
    triu_indices zeros zeros_like
"""
NAMES = frozenset(
    f"{_LAYERS} {_POINTWISE} {_REDUCTIONS} {_SHAPES} {_SELECTIONS} {_RESAMPLING} {_CONSTANTS}".split(),
)
"""Operators of ATen, without their overloads."""
ASSERTIONS = frozenset(
    {"_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size"}
)
"""What an exported graph says of its sizes and types: they return nothing."""
WRITE = "copy_"
"""The one operator that writes: an exported graph ends with it where the model changes a buffer of its own."""


def aten_operator(name: str, overload: str) -> OpOverload | None:
    """Return an operator of ATen that a stored program may name; `None` if it may not, or there is none."""
    if name not in NAMES | ASSERTIONS | {WRITE}:
        return None
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    found = getattr(packet, overload)
    return found if is_functional(found) or name == WRITE else None


def is_functional(operator: OpOverload) -> bool:
    """Whether an operator changes none of its arguments, and takes and gives values that a graph of tensors has."""
    schema = operator._schema
    values = [*schema.arguments, *schema.returns]
    writes = any(value.alias_info is not None and value.alias_info.is_write for value in values)
    opaque = any("Storage" in str(value.type) or "Stream" in str(value.type) for value in values)
    return not writes and not opaque
