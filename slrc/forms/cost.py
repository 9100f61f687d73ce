"""What a form costs where it cannot be timed: a share of the dense layer's time that grows with the work it keeps.

`share = fixed + slope · density`, fitted by `benchmarks/sparse_latency.py --fit` to what the layers of its networks
took on x86-64 with AVX2, and written down here: packed layers of seven networks, split and grouped ones of ResNet-50.
It decides for processors that a model is cross-compiled for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slrc.forms.form import DENSE, DEPTHWISE_INT8, FLOAT32, IN_FLOAT, Form, FormKind, kept_channels
from slrc.forms.packed_int8 import int8_density
from slrc.forms.packed_weight import block_density

FITTED: dict[tuple[FormKind, str], tuple[float, float]] = {
    (FormKind.PACKED, "1x1"): (0.09, 1.01),
    (FormKind.PACKED, "window"): (0.09, 1.05),
    (FormKind.PACKED, "depthwise"): (0.00, 0.87),
    (FormKind.PACKED, "linear"): (0.21, 0.94),
    (FormKind.SPLIT, "1x1"): (0.17, 1.00),
    (FormKind.SPLIT, "window"): (0.05, 1.00),
    (FormKind.SPLIT, "linear"): (0.17, 1.00),
    (FormKind.GROUPED, "1x1"): (0.12, 1.04),
    (FormKind.GROUPED, "window"): (0.03, 1.01),
    (FormKind.PACKED_INT8, "1x1"): (0.15, 0.78),
    (FormKind.PACKED_INT8, "window"): (0.07, 0.95),
    (FormKind.PACKED_INT8, "linear"): (0.15, 0.78),
    (FormKind.PACKED_INT8, "depthwise"): (0.00, 0.36),
}
"""`(fixed, slope)` by the form and the kind of layer; split linear layers are taken to be as 1×1 convolutions.

A depthwise layer does the same work in both its forms: its slope is the share alone. Shares of int8 layers are of the
dense int8 layer's time, fitted to `benchmarks/results/int8_kernel_latency.json`; linear ones are taken to be as 1×1
convolutions. That of depthwise ones is of the layers there together, with VNNI.
"""
IN_FLOAT_FACTOR = 1.8
"""How many times as long a dense layer takes in float32 as in int8, on x86-64 with AVX2."""


def layer_kind(weight: Tensor, groups: int = 1) -> str:
    """Return `linear`, `depthwise`, `1x1` or `window` for a weight `(out, in/groups, *kernel)`."""
    if weight.dim() == 2:
        return "linear"
    if groups > 1 and weight.shape[1] == 1:
        return "depthwise"
    return "1x1" if weight[0, 0].numel() == 1 else "window"


def density_of(weight: Tensor, form: Form, groups: int = 1) -> float:
    """Return the share of a dense layer's multiply-accumulates that a form does."""
    if form.kind is FormKind.PACKED or form == DEPTHWISE_INT8:
        return block_density(weight, form.size, groups)
    if form.kind is FormKind.PACKED_INT8:
        return int8_density(weight, form.size, groups)
    return 1.0 if form in (DENSE, FLOAT32) else float(kept_channels(weight, form.size).float().mean())


def cheapest_form(weight: Tensor, candidates: Sequence[Form], groups: int = 1) -> Form:
    """Return the form that is expected to be the fastest, of those of an int8 layer where `float32` is one."""
    slower = IN_FLOAT_FACTOR if FLOAT32 in candidates else 1.0

    def share(form: Form) -> float:
        if form == DENSE:
            return 1.0
        fixed, slope = (0.0, 1.0) if form == FLOAT32 else FITTED[form.kind, layer_kind(weight, groups)]
        return (fixed + slope * density_of(weight, form, groups)) * (slower if form.kind in IN_FLOAT else 1.0)

    return min(candidates, key=share)
