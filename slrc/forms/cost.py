"""What a form costs where it cannot be timed: a share of the dense layer's time that grows with the work it keeps.

`share = fixed + slope · density`, fitted by `benchmarks/sparse_latency.py --fit` to what the layers of its networks
took on x86-64 with AVX2, and written down here: packed layers of seven networks, split and grouped ones of ResNet-50.
It decides for processors that a model is cross-compiled for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slrc.forms.form import DENSE, Form, FormKind, kept_channels
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
}
"""`(fixed, slope)` by the form and the kind of layer; split linear layers are taken to be as 1×1 convolutions.

A depthwise layer does the same work in both its forms: its slope is the share alone.
"""


def layer_kind(weight: Tensor, groups: int = 1) -> str:
    """Return `linear`, `depthwise`, `1x1` or `window` for a weight `(out, in/groups, *kernel)`."""
    if weight.dim() == 2:
        return "linear"
    if groups > 1 and weight.shape[1] == 1:
        return "depthwise"
    return "1x1" if weight[0, 0].numel() == 1 else "window"


def density_of(weight: Tensor, form: Form, groups: int = 1) -> float:
    """Return the share of a dense layer's multiply-accumulates that a form does."""
    if form.kind is FormKind.PACKED:
        return block_density(weight, form.size, groups)
    return 1.0 if form == DENSE else float(kept_channels(weight, form.size).float().mean())


def cheapest_form(weight: Tensor, candidates: Sequence[Form], groups: int = 1) -> Form:
    """Return the form that is expected to be the fastest."""

    def share(form: Form) -> float:
        if form == DENSE:
            return 1.0
        fixed, slope = FITTED[form.kind, layer_kind(weight, groups)]
        return fixed + slope * density_of(weight, form, groups)

    return min(candidates, key=share)
