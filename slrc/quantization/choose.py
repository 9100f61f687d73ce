"""Choosing how a program is rounded: ranges, rewrites and layers that stay in float, by what held inputs say."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.fx import GraphModule, Interpreter

from slrc.errors import ConfigError
from slrc.forms.form import Forms, in_float, int8_blocks
from slrc.forms.quantization import Quantization, Range, Scheme
from slrc.ir.program import Program
from slrc.options import Int8Settings
from slrc.passes.forms.split_columns import split_weights
from slrc.passes.quantization.find_places import find_places, quantizable_weights, values_to_observe
from slrc.passes.quantization.insert_quantizers import InsertQuantizers, QuantizeBiases
from slrc.progress import Quiet, Reporter
from slrc.quantization.equalize import corrected_biases, equalized
from slrc.quantization.observe import Observed, observe
from slrc.quantization.ranges import RangeMethod, range_of
from slrc.reconstruction.calibration import Inputs
from slrc.reconstruction.errors import divergence, output_tensors

HELD = 4
"""One of so many batches is held: it tells what is best, and has no say in the ranges."""
BETTER = 0.98
"""A rewrite is taken where it leaves less than this share of the loss."""


class LayerLoss(BaseModel):
    """What rounding one layer alone moves the outputs by, and whether the layer stays in float for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    loss: float
    in_float: bool


class Calibration(BaseModel):
    """How a program was rounded.

    Losses are how far the outputs move on held inputs: the divergence of probabilities in nats for logits, else the
    mean squared difference as a share of the variance. `tried` has those of all that was tried, by what it was.
    `layers` are empty unless it was asked which of them hurt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: str
    samples: int
    ranges: str
    equalized: bool
    biases_corrected: bool
    loss: float
    tried: Mapping[str, float]
    layers: tuple[LayerLoss, ...] = ()
    skipped: tuple[str, ...] = ()
    quantized_layers: int


@dataclass(frozen=True)
class Quantized:
    """A program in floating point as it was rewritten for rounding, how it is rounded, and how that was found.

    `spared` are layers that stay in float since they are named, or since rounding them hurts.
    """

    source: Program
    quantization: Quantization
    scheme: Scheme
    calibration: Calibration
    spared: tuple[str, ...] = ()

    def program(self, *, biases: bool = True) -> Program:
        """Return the program that rounds; with `biases` as it is emitted, without for training."""
        return _rounded(self.source, self.scheme, self.quantization, biases=biases)


@dataclass(frozen=True)
class _Way:
    """A program as it was rewritten for rounding, what its values are, and their ranges.

    With `corrects`, the biases of layers that are rounded make up for it; a layer that stays in float keeps its own.
    """

    source: Program
    seen: Mapping[str, Observed]
    ranges: Mapping[str, Range]
    corrects: bool = False


@dataclass
class _Search:
    """Rounds a program in many ways. `layers` are the weights of each layer, more than one where it is split."""

    program: Program
    scheme: Scheme
    inputs: Sequence[Inputs]
    settings: Int8Settings
    logits: bool | None
    layers: Mapping[str, Sequence[str]]
    blocks: Mapping[str, int]
    tried: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held = list(self.inputs[::HELD])
        self.held = held
        self.observed_on = [b for i, b in enumerate(self.inputs) if i % HELD] or held
        self.outputs = self._run(self.program.graph_module)
        self.seen = self.observe(self.program)

    def observe(self, program: Program) -> Mapping[str, Observed]:
        names = values_to_observe(program.graph_module, self.scheme, packed=self.blocks)
        return observe(program, names, self.observed_on)

    def way(self, source: Program, seen: Mapping[str, Observed], method: str) -> _Way:
        chosen = RangeMethod(method)
        ranges = {n: range_of(s, chosen, self.scheme, self.settings.percentile) for n, s in seen.items()}
        return _Way(source, seen, ranges)

    def biases(self, way: _Way, skipped: Sequence[str]) -> dict[str, torch.Tensor]:
        return corrected_biases(way.source, way.seen, self._weights(skipped))

    def rounding(self, way: _Way, skipped: Sequence[str]) -> tuple[Program, Quantization]:
        """Return the program in floating point and what is rounded of it where some layers are skipped."""
        biases = self.biases(way, skipped) if way.corrects else {}
        source = way.source.with_tensors(biases) if biases else way.source
        return source, Quantization(ranges=way.ranges, skipped=self._weights(skipped), blocks=self.blocks)

    def module(self, way: _Way, skipped: Sequence[str]) -> GraphModule:
        source, quantization = self.rounding(way, skipped)
        return rounding_module(source, self.scheme, quantization)

    def loss(self, way: _Way, skipped: Sequence[str], what: str = "") -> float:
        found = self._moved(self.module(way, skipped))
        if what:
            self.tried[what] = found
        return found

    def _weights(self, layers: Sequence[str]) -> tuple[str, ...]:
        return tuple(weight for layer in layers for weight in self.layers[layer])

    def _moved(self, module: GraphModule) -> float:
        pairs = zip(self.outputs, self._run(module), strict=True)
        parts = [divergence(a, b, self.logits) for a, b in pairs]
        return sum(parts) / len(parts)

    def _run(self, module: GraphModule) -> list[list[torch.Tensor]]:
        with torch.no_grad():
            return [output_tensors(Interpreter(module).run(*batch)) for batch in self.held]


def rounding_module(program: Program, scheme: Scheme, quantization: Quantization) -> GraphModule:
    """Return a module that runs a program rounded, made without exporting it anew."""
    module = copy.deepcopy(program.graph_module)
    InsertQuantizers(scheme, quantization).edit(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def rounded_anyhow(
    program: Program, scheme: Scheme, forms: Forms | None = None, *, round_ends: bool = False
) -> Program:
    """Return a program rounded by the extremes of its values on its example inputs: to be timed.

    Layers have the forms that they are to have; with `round_ends` inputs and outputs are rounded too.
    """
    given = forms or {}
    quantization = Quantization(ranges={}, skipped=in_float(given), blocks=int8_blocks(given), round_ends=round_ends)
    places = find_places(
        program.graph_module, scheme, quantization.skipped, packed=quantization.blocks, round_ends=round_ends
    ).values
    names = {p.value for p in places} | {p.like for p in places}
    seen = observe(program, names, [program.flat_inputs()])
    quantization = quantization.model_copy(update={"ranges": {n: s.limits for n, s in seen.items()}})
    return _rounded(program, scheme, quantization)


def _rounded(program: Program, scheme: Scheme, quantization: Quantization, *, biases: bool = True) -> Program:
    """Apply both transforms to a program that is exported once."""

    def edit(module: GraphModule) -> bool:
        modified = InsertQuantizers(scheme, quantization).edit(module)
        return (biases and scheme.integer_bias and QuantizeBiases().edit(module)) or modified

    return program.rewrite(edit)[0]


def quantize(
    program: Program,
    scheme: Scheme,
    inputs: Sequence[Inputs],
    settings: Int8Settings,
    *,
    skip: Sequence[str] = ("auto",),
    forms: Forms | None = None,
    logits: bool | None = None,
    acceptable: Callable[[nn.Module], bool] | None = None,
    reporter: Reporter | None = None,
) -> Quantized:
    """Find how a program loses least by rounding.

    1. Ranges by minimum and maximum, by percentile and by squared error are tried on held inputs; the best is taken.
    2. So are equalised channels and corrected biases, see `slrc.quantization.equalize`. Biases are corrected where
       their layer is rounded.
    3. With `skip` of `auto`, if outputs move by more than `settings.loss`, or `acceptable` refuses, layers stay in
       float: those that move the outputs most when they alone are rounded, as few of them as will do.

    Args:
        program: in floating point, with its batch norms folded and its layers in their forms.
        scheme: of the target.
        inputs: calibration batches, one of four is held.
        settings: what to try.
        skip: `auto`, `none`, or globs of layers' names.
        forms: of the program's layers, of which those in floating point are not rounded.
        logits: as for `output_divergences`.
        acceptable: says whether a rounding module will do, in place of `settings.loss`.
        reporter: where progress goes.

    Raises:
        ConfigError: a name in `skip` is that of no layer.
        WorkloadError: a value is not finite.
    """
    reporter = reporter or Quiet()
    layers = _layers(program, forms or {})
    named = named_layers(skip, list(layers))
    given = tuple(x for x in layers if x in {*in_float(forms or {}), *named})
    search = _Search(program, scheme, inputs, settings, logits, layers, int8_blocks(forms or {}))
    methods = [str(m) for m in RangeMethod] if settings.ranges == "best" else [settings.ranges]
    ways = {m: search.way(program, search.seen, m) for m in methods}
    losses = {m: search.loss(way, given, m) for m, way in ways.items()}
    method = min(losses, key=lambda m: losses[m])
    way, loss, is_equalized = ways[method], losses[method], False
    if settings.equalize is not False and (tensors := equalized(program, search.seen)):
        source = program.with_tensors(tensors)
        other = search.way(source, search.observe(source), method)
        found = search.loss(other, given, f"{method}, equalized")
        if settings.equalize or found < BETTER * loss:
            way, loss, is_equalized = other, found, True
    if settings.correct_bias is not False and search.biases(way, given):
        other = replace(way, corrects=True)
        found = search.loss(other, given, f"{method}, biases corrected")
        if settings.correct_bias or found < BETTER * loss:
            way, loss = other, found
    table, skipped, spared = tuple[LayerLoss, ...](), given, tuple[str, ...]()
    if skip[0] == "auto":

        def will_do(left_out: Sequence[str]) -> bool:
            if acceptable is not None:
                return acceptable(search.module(way, [*given, *left_out]))
            return search.loss(way, [*given, *left_out]) <= settings.loss

        table, spared = _spare(search, way, given, will_do, reporter)
        skipped = (*given, *spared)
        loss = search.loss(way, skipped) if spared else loss
    source, quantization = search.rounding(way, skipped)
    calibration = Calibration(
        scheme=scheme.name,
        samples=sum(len(b[0]) if b[0].dim() else 1 for b in inputs),
        ranges=method,
        equalized=is_equalized,
        biases_corrected=way.corrects,
        loss=loss,
        tried=search.tried,
        layers=table,
        skipped=skipped,
        quantized_layers=len(layers) - len(skipped),
    )
    return Quantized(source, quantization, scheme, calibration, (*named, *spared))


def _layers(program: Program, forms: Forms) -> dict[str, list[str]]:
    """Return the weights of each layer that has an integer form, by its own weight's name before it was split."""
    whole, found = split_weights(forms), dict[str, list[str]]()
    for weight in quantizable_weights(program.graph_module):
        found.setdefault(whole.get(weight, weight), []).append(weight)
    return found


def named_layers(skip: Sequence[str], weights: Sequence[str]) -> tuple[str, ...]:
    """Return the weights of the layers that `--int8-skip` names.

    Raises:
        ConfigError: a name is that of no layer.
    """
    globs = () if skip[0] in ("auto", "none") else skip
    names = {w.removesuffix(".weight"): w for w in weights}
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ConfigError(
                f"`--int8-skip {glob}` names no layer that runs in int8",
                hint=f"there are {', '.join(list(names)[:4])}, …: see `slrc inspect`",
            )
    return tuple(w for name, w in names.items() if any(fnmatch.fnmatch(name, glob) for glob in globs))


def _spare(
    search: _Search,
    way: _Way,
    given: Sequence[str],
    will_do: Callable[[Sequence[str]], bool],
    reporter: Reporter,
) -> tuple[tuple[LayerLoss, ...], tuple[str, ...]]:
    """Return what each layer alone moves the outputs by, and the fewest of the worst that will do in float."""
    distinct = [x for x in search.layers if x not in given]
    if not distinct or will_do(()):
        return (), ()
    alone = {}
    with reporter.task("layers alone in int8", len(distinct)) as task:
        for layer in distinct:
            alone[layer] = search.loss(way, [x for x in search.layers if x != layer])
            task.advance(layer)
    worst = sorted(distinct, key=lambda w: -alone[w])
    low, high = 0, len(distinct)  # with all of them in float nothing is lost
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if will_do(worst[:middle]) else (middle, high)
    spared = set(worst[:high])
    table = tuple(LayerLoss(name=w.removesuffix(".weight"), loss=alone[w], in_float=w in spared) for w in worst)
    return table, tuple(w for w in distinct if w in spared)
