"""What is timed: a network or a part of one, its layers in their forms, under a name for its content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from slrc.backends import Target, get_backend
from slrc.forms.cost import density_of
from slrc.forms.form import Form, Forms
from slrc.ir.program import Program
from slrc.passes.analysis.cut_segments import Segment
from slrc.pipeline import apply_forms, pack_layers, split_layers
from slrc.quantization.choose import rounded_anyhow


@dataclass(frozen=True)
class Formed:
    """A structured program and the forms of its layers on a target.

    What `is_part` of a network stands between other layers: on an int8 target its inputs come in integers and its
    outputs go as such, so that a layer in float32 takes what it costs to go there and back.
    """

    program: Program
    forms: Forms = field(default_factory=dict)
    is_part: bool = False


@dataclass(frozen=True)
class Job:
    """A program to time: a name for its content, how to make it, and its flattened inputs.

    `emit` is a faster way to write what `make` returns as an artifact into an existing folder, where there is one.
    """

    digest: str
    make: Callable[[], Formed]
    inputs: Sequence[Tensor]
    emit: Callable[[Path], None] | None = None

    def program(self, target: Target) -> Program:
        """Return the program that is emitted."""
        return to_be_timed(self.make(), target)

    @staticmethod
    def of_whole(program: Program, forms: Forms | None = None) -> Job:
        """Return the job of a whole program, with its layers dense or in their forms."""
        given, inputs = forms or {}, program.flat_inputs()
        contents = []
        for weight, form in given.items():
            layer = program.layers[weight]
            density = density_of(layer.outputs_first(program.tensors[weight]), form, layer.groups)
            contents.append((weight, form_content(form, density)))
        return Job(digest(program.graph_module, inputs, *contents), lambda: Formed(program, given), inputs)

    @staticmethod
    def of_segment(segment: Segment) -> Job:
        """Return the job of a segment as it is."""
        name = digest(segment.module, segment.inputs)
        return Job(name, lambda: Formed(segment.program(), is_part=True), segment.inputs)


def form_content(form: Form, density: float) -> str:
    """Return what a form makes of a weight as far as its time depends on it."""
    return f"{form} {density:.2f}"


def to_be_timed(formed: Formed, target: Target) -> Program:
    """Return what is emitted of a program to be timed: for an int8 target one that rounds.

    Its scales are whatever suits the example inputs: times do not depend on them.
    """
    program, forms = formed.program, formed.forms
    if not target.is_integer:
        return apply_forms(program, forms)
    split = split_layers(program, forms)
    rounded = rounded_anyhow(split, get_backend(target).scheme, forms, round_ends=formed.is_part)
    return pack_layers(rounded, forms)


def digest(module: GraphModule, inputs: Sequence[Tensor], *others: object) -> str:
    """Return a name for what a graph module does on inputs, and for `others`.

    It is the same for two that differ in nothing but the values of their tensors.
    """
    tensors = [*module.parameters(), *module.buffers(), *inputs]
    kinds = [f"{t.dtype}{tuple(t.shape)}" for t in tensors]
    return short(f"{module.graph}{kinds}{others}")


def short(text: str) -> str:
    """Return a name for a text, fit for a file's."""
    return sha256(text.encode()).hexdigest()[:24]
