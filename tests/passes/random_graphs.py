"""Random small graphs of the operators that the index rules know, as hypothesis draws them.

They are the same in every run. `SLRC_EXAMPLES=1000` draws more of them, `SLRC_SEED=7` others, `SLRC_SEED=random` others
every time.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

EXAMPLES = int(os.environ.get("SLRC_EXAMPLES", "32"))
_ASKED = os.environ.get("SLRC_SEED", "0")
SEED = random.SystemRandom().randrange(2**32) if _ASKED == "random" else int(_ASKED)
ACTIVATIONS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "clamp": lambda x: torch.clamp(x, -2.0, -0.5),
    "plus_one": lambda x: x + 1.0,
    "halved_sigmoid": lambda x: torch.sigmoid(x) * 0.5,
}
WINDOWS = ((2, 2), (1, 1), (3, 2, 1, 1), (4, 2, 1), (3, 1, 1))
"""Kernels, strides, paddings and output paddings of transposed convolutions that enlarge an image by their stride."""


@dataclass(frozen=True)
class Step:
    """One operator: the positions of its operands among the values so far, and its options."""

    op: str
    operands: tuple[int, ...]
    options: tuple[Any, ...] = ()


Shape = tuple[int, ...]
"""A value's shape without the batch: `(c, h, w)`, `(t, f)` or `(f,)`."""


class GraphModel(nn.Module):
    """Runs a list of steps on an image of 4 channels; every value that no step uses gets a head of its own."""

    def __init__(self, steps: list[Step], shapes: list[Shape]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        count = 1
        for i, step in enumerate(steps):
            for name, layer in _layers(step, [shapes[k] for k in step.operands]).items():
                self.layers[f"{i}_{name}"] = layer
            count += 2 if step.op == "chunk" else 1
        used = {k for step in steps for k in step.operands}
        self.ends = [k for k in range(count) if k not in used]
        self.heads = nn.ModuleList(nn.Linear(_features(shapes[k], flat=k % 2 == 0), 3) for k in self.ends)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for i, step in enumerate(self.steps):
            result = self._run(i, step, [values[k] for k in step.operands])
            values += result if isinstance(result, tuple) else (result,)
        return [head(_pooled(values[k], flat=k % 2 == 0)) for k, head in zip(self.ends, self.heads, strict=True)]

    def _run(self, i: int, step: Step, xs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        x = xs[0]
        match step.op:
            case "conv" | "depthwise" | "transposed" | "norm" | "linear":
                return self.layers[f"{i}_layer"](x)
            case "twice":
                return self.layers[f"{i}_layer"](self.layers[f"{i}_layer"](x))
            case "scale":
                return x * self.layers[f"{i}_layer"].weight.flatten()
            case "bias":
                return x + self.layers[f"{i}_layer"].weight.flatten()
            case "activation":
                return ACTIVATIONS[step.options[0]](x)
            case "add":
                return xs[0] + xs[1]
            case "mul":
                return xs[0] * xs[1]
            case "cat":
                return torch.cat(xs, dim=1 if x.dim() == 4 else -1)
            case "chunk":
                return tuple(x.chunk(2, dim=1 if x.dim() == 4 else -1))
            case "slice":
                start, stop, stride = step.options
                return x[:, start:stop:stride] if x.dim() == 4 else x[..., start:stop:stride]
            case "gate":
                squeezed = x.mean((2, 3), keepdim=True)
                return x * torch.sigmoid(self.layers[f"{i}_up"](torch.relu(self.layers[f"{i}_down"](squeezed))))
            case "pool":
                return nn.functional.max_pool2d(x, 3, stride=1, padding=1)
            case "shuffle":
                n, c, h, w = x.shape
                return x.view(n, step.options[0], -1, h, w).transpose(1, 2).reshape(n, c, h, w)
            case "tokens":
                return x.flatten(2).transpose(1, 2)
            case "swap":
                return x.transpose(1, 2)
            case "heads":
                n, t, f = x.shape
                y = x.view(n, t, step.options[0], -1).permute(0, 2, 1, 3)
                return torch.relu(y).permute(0, 2, 1, 3).reshape(n, t, f)
            case "inner":
                return xs[0] @ xs[1].transpose(1, 2)
            case "outer":
                return xs[0].transpose(1, 2) @ xs[1]
            case "relative":
                dim = 1 if x.dim() == 4 else -1
                return x * x.mean(dim, keepdim=True) + x * x.amax(dim, keepdim=True)
            case "softmax":
                return x.softmax(-1)
            case "mean":
                return x.mean(1)
            case "flip":
                return x.flip(1, -1)
            case "interleave":
                return x.repeat_interleave(2, dim=1 if x.dim() == 4 else -1)
            case "overwrite":
                start, stop = step.options
                y = x.clone().movedim(1 if x.dim() == 4 else -1, 0)
                y[start:stop] = xs[1].movedim(1 if x.dim() == 4 else -1, 0)[start:stop] if len(xs) > 1 else 0.0
                return y.movedim(0, 1 if x.dim() == 4 else -1)
            case "addcmul":
                return torch.addcmul(xs[0], xs[1], xs[2], value=0.5)
            case "lerp":
                return torch.lerp(xs[0], xs[1], 0.3)
            case "cumsum":
                return x.cumsum(step.options[0])
            case "constant":
                shape = (-1, 1, 1) if x.dim() == 4 else (-1,)
                return x * torch.full((step.options[0],), 0.5, dtype=x.dtype).view(shape) + torch.ones_like(x)
            case "pad_with":
                return torch.cat([x, x.new_full(x.shape, step.options[0])], dim=1 if x.dim() == 4 else -1)
            case "im2col":
                n, c, h, w = x.shape
                return nn.functional.unfold(x, 2, stride=2).view(n, 4 * c, h // 2, w // 2)
            case "col2im":
                return nn.functional.fold(x.flatten(2), (2 * x.shape[2], 2 * x.shape[3]), 2, stride=2)
            case "resize":
                return nn.functional.interpolate(x, size=3, mode=step.options[0])
            case "weight":
                return x @ self.layers[f"{i}_layer"].weight.t()
            case "rows":
                return x[:, torch.tensor(step.options)]
            case "at_indices":
                return _at_indices(xs, *step.options)
            case "greatest":
                return x.max(1)[0]
            case "sort":
                return x.sort(1)[0]
            case "recurrent":
                return self.layers[f"{i}_layer"](x)[0]
        raise AssertionError(step.op)


def _at_indices(xs: list[Tensor], op: str, dim: int, at: tuple[int, ...], written: str, fill: float) -> Tensor:
    """Read `x (n, t, f)` at indices along a dimension, or write it there: to another value, or to a constant."""
    x = xs[0]
    base = xs[1] if len(xs) > 1 else x.new_full(x.shape[1:], fill).expand(x.shape[0], -1, -1)
    row = torch.tensor(at)
    if op == "index_select":
        return x.index_select(dim, row)
    source = x.narrow(dim, 0, len(at))
    if op == "index_put":
        y = base.clone()
        y[(slice(None),) * dim + (row,)] = source if written == "expand" else source[:, :1, :1]
        return y
    shape = [x.shape[0], -1, x.shape[2]] if dim == 1 else [x.shape[0], x.shape[1], -1]
    index = row[None, :, None] if dim == 1 else row[None, None]
    index = index.expand(shape) if written == "expand" else index.repeat([1 if n == -1 else n for n in shape])
    match op:
        case "gather":
            return x.gather(dim, index)
        case "scatter":
            return base.scatter(dim, index, source)
        case "scatter_add":
            return base.scatter_add(dim, index, source)
        case "scatter_value":
            return x.scatter(dim, index, fill)
    raise AssertionError(op)


def _layers(step: Step, shapes: list[Shape]) -> dict[str, nn.Module]:
    shape = shapes[0]
    match step.op, step.options:
        case "conv", (out, kernel, stride, groups, bias):
            return {"layer": nn.Conv2d(shape[0], out, kernel, stride, kernel // 2, groups=groups, bias=bias)}
        case "depthwise", (multiplier,):
            return {"layer": nn.Conv2d(shape[0], shape[0] * multiplier, 3, padding=1, groups=shape[0])}
        case "transposed", (out, groups, window):
            return {"layer": nn.ConvTranspose2d(shape[0], out, *window, groups=groups)}
        case "norm", (affine,):
            if len(shape) == 2:
                return {"layer": nn.LayerNorm(shape[1]) if affine else nn.RMSNorm(shape[1], eps=0.1)}
            norm = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
            return {"layer": norm(shape[0], affine=affine)}
        case "linear", (out, bias):
            return {"layer": nn.Linear(shape[-1], out, bias=bias)}
        case "weight", (out,):
            return {"layer": nn.Linear(shape[-1], out, bias=False)}
        case "recurrent", (out, both):
            return {"layer": nn.GRU(shape[-1], out, batch_first=True, bidirectional=both)}
        case "twice", ():
            return {"layer": nn.Linear(shape[-1], shape[-1])}
        case (("scale" | "bias"), ()):
            return {"layer": nn.Linear(shape[-1], 1)}
        case "gate", (width,):
            return {"down": nn.Conv2d(shape[0], width, 1), "up": nn.Conv2d(width, shape[0], 1)}
    return {}


def _features(shape: Shape, *, flat: bool) -> int:
    return int(np.prod(shape)) if flat else shape[0] if len(shape) == 3 else shape[-1]


def _pooled(x: Tensor, *, flat: bool) -> Tensor:
    if flat or x.dim() == 2:
        return x.flatten(1)
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Step], list[Shape]]:
    """Draw steps and the shapes of all values."""
    steps = [Step("conv", (0,), (draw(st.sampled_from([4, 6, 8])), 3, 1, 1, True))]
    shapes: list[Shape] = [(4, 4, 4), (steps[0].options[0], 4, 4)]
    for _ in range(draw(st.integers(2, 8))):
        at = draw(st.integers(max(1, len(shapes) - 4), len(shapes) - 1))
        step, results = draw(_steps(at, shapes))
        steps.append(step)
        shapes += results
    return steps, shapes


@st.composite
def _steps(draw: st.DrawFn, at: int, shapes: list[Shape]) -> tuple[Step, list[Shape]]:
    shape = shapes[at]
    rank, c = len(shape), shape[0] if len(shape) == 3 else shape[-1]
    alike = [k for k in range(1, len(shapes)) if shapes[k] == shape]
    ops = ["activation", "activation", "add", "mul", "cat", "norm"]
    ops += ["flip", "addcmul", "lerp", "cumsum", "constant", "overwrite", "relative"]
    ops += ["interleave", "pad_with"] if c <= 8 else []
    ops += ["chunk"] if c % 2 == 0 else []
    ops += ["slice"] if c > 1 else []
    if rank == 3:
        ops += ["conv", "conv", "conv", "depthwise", "gate", "pool"]
        ops += ["tokens"] if shape[1] * shape[2] <= 16 else []
        ops += ["transposed"] if shape[1] <= 4 else []
        ops += ["shuffle"] if c % 2 == 0 and c > 2 else []
        ops += ["resize"] if shape[1] > 1 else []
        ops += ["im2col"] if shape[1] % 2 == 0 and c <= 8 else []
        ops += ["col2im"] if c % 4 == 0 and shape[1] <= 4 else []
    else:
        ops += ["linear", "linear", "twice", "scale", "bias"]
    if rank == 2:
        ops += ["at_indices", "at_indices", "weight", "rows", "greatest", "sort", "recurrent"]
        ops += ["swap", "inner", "outer", "softmax", "mean"] + (["heads"] if c % 2 == 0 else [])
    op = draw(st.sampled_from(ops))
    width = draw(st.sampled_from([2, 4, 6, 8]))
    match op:
        case "conv":
            groups = draw(st.sampled_from([g for g in (1, 1, 2) if c % g == 0]))
            stride = draw(st.sampled_from([1, 2])) if shape[1] > 1 else 1
            kernel = draw(st.sampled_from([1, 3]))
            size = (shape[1] - 1) // stride + 1
            return Step(op, (at,), (width, kernel, stride, groups, draw(st.booleans()))), [(width, size, size)]
        case "depthwise":
            multiplier = draw(st.integers(1, 2))
            return Step(op, (at,), (multiplier,)), [(c * multiplier, *shape[1:])]
        case "transposed":
            groups = draw(st.sampled_from([g for g in (1, 2, c) if c % g == 0]))
            out = draw(st.sampled_from([groups, 2 * groups])) if groups == c else width
            window = draw(st.sampled_from(WINDOWS))
            return Step(op, (at,), (out, groups, window)), [(out, shape[1] * window[1], shape[2] * window[1])]
        case "linear":
            return Step(op, (at,), (width, draw(st.booleans()))), [(*shape[:-1], width)]
        case "norm":
            return Step(op, (at,), (draw(st.booleans()),)), [shape]
        case "gate":
            return Step(op, (at,), (width,)), [shape]
        case "activation":
            return Step(op, (at,), (draw(st.sampled_from(sorted(ACTIVATIONS))),)), [shape]
        case "add" | "mul":
            return Step(op, (at, draw(st.sampled_from(alike)))), [shape]
        case "cat":
            other = draw(st.sampled_from(alike))
            return Step(op, (at, other)), [(2 * c, *shape[1:]) if rank == 3 else (*shape[:-1], 2 * c)]
        case "chunk":
            half = (c // 2, *shape[1:]) if rank == 3 else (*shape[:-1], c // 2)
            return Step(op, (at,)), [half, half]
        case "slice":
            start = draw(st.integers(0, c - 1))
            stop = draw(st.integers(start + 1, c))
            stride = draw(st.sampled_from([1, 1, 1, 2]))
            left = len(range(start, stop, stride))
            return Step(op, (at,), (start, stop, stride)), [(left, *shape[1:]) if rank == 3 else (*shape[:-1], left)]
        case "shuffle" | "heads":
            return Step(op, (at,), (2,)), [shape]
        case "tokens":
            return Step(op, (at,)), [(shape[1] * shape[2], c)]
        case "swap":
            return Step(op, (at,)), [(shape[1], shape[0])]
        case "inner" | "outer":
            other = draw(st.sampled_from(alike))
            return Step(op, (at, other)), [(shape[0], shape[0]) if op == "inner" else (shape[1], shape[1])]
        case "mean" | "greatest":
            return Step(op, (at,)), [(shape[1],)]
        case "overwrite":
            start = draw(st.integers(0, c - 1))
            stop = draw(st.integers(start + 1, c))
            others = draw(st.sampled_from([(), (draw(st.sampled_from(alike)),)]))
            return Step(op, (at, *others), (start, stop)), [shape]
        case "lerp" | "addcmul":
            others = [draw(st.sampled_from(alike)) for _ in range(1 if op == "lerp" else 2)]
            return Step(op, (at, *others)), [shape]
        case "cumsum":
            return Step(op, (at,), (draw(st.integers(1, rank)),)), [shape]
        case "constant":
            return Step(op, (at,), (c,)), [shape]
        case "interleave" | "pad_with":
            options = (draw(st.sampled_from([0.0, 1.0])),) if op == "pad_with" else ()
            return Step(op, (at,), options), [(2 * c, *shape[1:]) if rank == 3 else (*shape[:-1], 2 * c)]
        case "im2col":
            return Step(op, (at,)), [(4 * c, shape[1] // 2, shape[2] // 2)]
        case "col2im":
            return Step(op, (at,)), [(c // 4, 2 * shape[1], 2 * shape[2])]
        case "resize":
            return Step(op, (at,), (draw(st.sampled_from(["nearest-exact", "bilinear"])),)), [(c, 3, 3)]
        case "weight":
            return Step(op, (at,), (width,)), [(*shape[:-1], width)]
        case "rows":
            rows = draw(st.lists(st.integers(0, shape[0] - 1), min_size=2, max_size=5))
            return Step(op, (at,), tuple(rows)), [(len(rows), shape[1])]
        case "at_indices":
            which = draw(
                st.sampled_from(["gather", "index_select", "scatter", "scatter_add", "scatter_value", "index_put"])
            )
            dim = draw(st.sampled_from([1, 1, 2]))
            most = shape[dim - 1]
            reads, adds = which in ("gather", "index_select"), which == "scatter_add"
            drawn = st.lists(st.integers(0, most - 1), min_size=1, max_size=most, unique=not reads and not adds)
            rows = draw(drawn)
            others = draw(st.sampled_from([(), (draw(st.sampled_from(alike)),)]))
            options = (
                which,
                dim,
                tuple(rows),
                draw(st.sampled_from(["expand", "repeat"])),
                draw(st.sampled_from([0.0, 1.0])),
            )
            read = tuple(len(rows) if d == dim - 1 else n for d, n in enumerate(shape))
            return Step(op, (at, *others), options), [read if reads else shape]
        case "recurrent":
            both = draw(st.booleans())
            return Step(op, (at,), (width, both)), [(shape[0], width * (2 if both else 1))]
    return Step(op, (at,)), [shape]
