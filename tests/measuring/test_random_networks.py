"""Small random networks through every pattern: each form of each layer can be had on every target.

The cases are the same in every run. `SLRC_EXAMPLES=1000` draws 250 of them, for more targets.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slrc
from slrc.backends import Target, get_backend, parse_target
from slrc.backends.onnx_export import export_onnx
from slrc.errors import PlanError
from slrc.forms.form import DENSE, Forms
from slrc.ir.program import Program, capture
from slrc.measuring.choose_forms import choose_forms, form_candidates
from slrc.pipeline import apply_forms, structure
from slrc.sparsity.masks import Masks
from slrc.verify import compare, outputs_of

EXAMPLES = int(os.environ.get("SLRC_EXAMPLES", "16")) // 4  # each takes seconds
SEED = int(os.environ.get("SLRC_SEED", "0"))
PATTERNS = (
    *("unstructured", "block:4x1", "block:8x1", "block:16x1", "block:8x2", "columns:2", "columns:4", "channel", "2:4"),
)
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ReLU6, nn.Sigmoid, nn.Identity),
)
SIZE = 9
ORT, STOCK, AARCH64, RTX = (parse_target(t) for t in ("ort", "ort:stock", "ort:aarch64", "tensorrt-rtx:sm86"))


class SqueezeExcite(nn.Module):
    """Scales channels by what two layers make of their means: of one value a channel, so that rows vanish early."""

    def __init__(self, channels: int, hidden: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(self.gate(self.down(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.inner(x))


def network(draw: random.Random) -> nn.Module:
    """Draw a stem, some blocks and a head."""

    def activation() -> nn.Module:
        return draw.choice(ACTIVATIONS)()

    def norm(channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels)] if draw.random() < 0.4 else []

    def convolution(given: int, made: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        bias = draw.random() < 0.7
        layer = nn.Conv2d(given, made, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        return [layer, *norm(made), activation()]

    width = draw.choice((8, 16, 24, 32))
    layers = convolution(3, width, 3, draw.choice((1, 2)))
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(("plain", "depthwise", "grouped", "excite", "residual", "pool"))
        made = draw.choice((8, 16, 32, 64, 12))
        if kind == "plain":
            layers += convolution(width, made, draw.choice((1, 3)), draw.choice((1, 1, 2)))
            width = made
        elif kind == "depthwise":
            layers += [*convolution(width, width, 3, groups=width), *convolution(width, made)]
            width = made
        elif kind == "grouped":
            layers += convolution(width, width * 2, 3, groups=4)
            width *= 2
        elif kind == "excite":
            layers.append(SqueezeExcite(width, draw.choice((4, 8, 16)), activation()))
        elif kind == "residual":
            inner = nn.Sequential(*convolution(width, made), *convolution(made, width, 3))
            layers.append(Residual(inner, activation()))
        else:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
    hidden = draw.choice((16, 32))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, hidden), activation(), nn.Linear(hidden, 8)]
    return nn.Sequential(*layers, *head)


def drawn_forms(program: Program, target: Target, draw: random.Random) -> Forms:
    """Return a form of each layer, of those that it may have on a target."""
    candidates, lost = form_candidates(program, target)
    assert all("stock runtime" in reason for _, _, reason in lost)
    return {
        weight: form for weight, forms in candidates.items() if (form := draw.choice(forms[1:] * 3 + forms)) != DENSE
    }


def slim_network(case: int, draw: random.Random) -> Program:
    """Return a random network, pruned by magnitude in one shot."""
    torch.manual_seed(case)
    pattern, sparsity = PATTERNS[case % len(PATTERNS)], draw.uniform(0.5, 0.98)
    program = capture(network(draw), (torch.randn(draw.choice((1, 1, 2)), 3, SIZE, SIZE),), f"network {case}")
    try:
        asked = 0.5 if pattern == "2:4" else sparsity
        plan = slrc.plan(program, pattern, asked, keep_ends=draw.random() < 0.3, round_to=draw.choice((1, 8)))
    except PlanError:
        pytest.skip(f"{pattern} fits none of its layers")
    return structure(program, plan, Masks.project(plan, program.tensors))


def equal_when_emitted(slim: Program, forms: Forms, target: Target, folder: Path) -> None:
    """Apply forms, emit, and run what was emitted where it runs here, with and without kernels."""
    reference = outputs_of(slim.module(), slim.example_inputs)
    formed = apply_forms(slim, forms)
    compare(f"{target}: slim = formed", reference, outputs_of(formed.module(), slim.example_inputs), 1e-4)
    folder.mkdir()
    backend = get_backend(target)
    if target == AARCH64:  # its kernels take a minute to compile
        export_onnx(formed, folder / "model.onnx")
        return
    backend.lower(formed, target, folder, portable=False)
    if not backend.available(target).why_not_run:
        for stock in (False, True):
            outputs = backend.load(folder, threads=1, stock=stock)(*slim.flat_inputs())
            compare(f"{target}: slim = emitted", reference, outputs, 1e-4)


@pytest.mark.fuzz
@pytest.mark.parametrize("case", range(EXAMPLES))
def test_every_form_can_be_had(case: int, tmp_path: Path) -> None:
    draw = random.Random(f"{SEED} {case}")
    slim = slim_network(case, draw)
    equal_when_emitted(slim, drawn_forms(slim, ORT, draw), ORT, tmp_path / "ort")
    if "SLRC_EXAMPLES" in os.environ:
        equal_when_emitted(slim, drawn_forms(slim, STOCK, draw), STOCK, tmp_path / "stock")
        equal_when_emitted(slim, choose_forms(slim, AARCH64).forms, AARCH64, tmp_path / "aarch64")
        if find_spec("tensorrt_rtx") and case % 8 == 0:  # an engine takes seconds
            equal_when_emitted(slim, choose_forms(slim, RTX).forms, RTX, tmp_path / "rtx")


def test_no_form_fails_while_it_is_timed(quick_timing: None, tmp_path: Path) -> None:
    """Squeeze-and-excitation, whose layers lose whole outputs at once, and a head."""
    torch.manual_seed(0)
    gate = SqueezeExcite(64, 16, nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 64, 3), gate, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))
    program = capture(model, (torch.randn(1, 3, SIZE, SIZE),))
    plan = slrc.plan(program, "block:8x1", 0.9, keep_ends=False)
    slim = structure(program, plan, Masks.project(plan, program.tensors))
    assert choose_forms(slim, ORT, threads=1, cache=tmp_path).dropped == ()
