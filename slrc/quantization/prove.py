"""The proof that a file computes in integers what the program that rounds says, in steps of every rounded value.

Rounding is no continuous thing: of two sums that differ in the last bit one may be rounded up and one down, and what
comes behind differs by more and more. So every operator is compared on its own. The file is run with the integers of
all rounded values shown; the program is run beside it in float64, and each of its rounded values, computed from the
file's own integers before it, is compared with the file's and then replaced by it. Each may be one step off: sums are
exact in 32 bits, and only their scaling to the next steps is in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from slrc.backends.quantized_onnx import CODES, show_codes, write_packed_alone
from slrc.errors import VerificationError
from slrc.forms.quantize_ops import quantize
from slrc.ir.nodes import op_name
from slrc.ir.program import Program
from slrc.passes.quantization.insert_quantizers import ROUNDED
from slrc.probes import Probe
from slrc.verify import Check, compare, outputs_of

BOUND = 1
"""Steps that a rounded value may be off."""
OUTPUT_TOLERANCE = 1e-4
"""What outputs may be off, computed in floating point from the file's own last integers."""
SHOWN_TOLERANCE = 2e-2
"""What the file's outputs may change by where integers are shown: other operators may be fused otherwise."""


@dataclass
class _Steps(Interpreter):
    """Runs a rounding graph on the integers of a file, and counts by how many steps it would round otherwise."""

    graph_module: GraphModule
    codes: Mapping[str, Tensor]
    most: int = 0
    worst: str = ""
    differing: int = 0
    numbers: int = 0
    values: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__(self.graph_module)

    def run_node(self, n: Node) -> Any:
        if op_name(n) != ROUNDED or n.args[0].op == "get_attr":  # type: ignore[union-attr]
            return super().run_node(n)
        x, scale, *others = self.fetch_args_kwargs_from_env(n)[0]
        shown = CODES.format(n.name)
        if shown not in self.codes:
            raise VerificationError(
                f"the file does not round `{n.name}`", hint="this is a bug in slrc: please report it"
            )
        own, emitted = quantize(x, scale, *others), self.codes[shown].to(torch.int32)
        off = (own - emitted).abs()
        self.values, self.numbers = self.values + 1, self.numbers + off.numel()
        self.differing += int((off > 0).sum())
        if off.numel() and int(off.max()) > self.most:
            self.most, self.worst = int(off.max()), n.name
        return (emitted - others[0]).to(x.dtype) * scale


def prove_same(step: str, program: Program, other: Program, probes: Sequence[Probe]) -> Check:
    """Compare two programs that round alike, in float64: there they sum in any order and still round the same.

    Raises:
        VerificationError: their outputs differ.
    """
    exact = [_in_float64(p) for p in (program, other)]
    modules = [p.graph_module if m is None else m for p, m in zip((program, other), exact, strict=True)]
    checks = []
    for probe in probes:
        inputs = program.flatten(probe.inputs, {})
        given = inputs if None in exact else [_double(x) for x in inputs]
        one, two = (outputs_of(Interpreter(m).run, tuple(given)) for m in modules)
        checks.append(compare(step, one, two, OUTPUT_TOLERANCE))
    worst = max(checks, key=lambda c: c.max_rel_error)
    return worst.model_copy(update={"inputs": tuple(p.name for p in probes)})


def prove_integers(
    step: str,
    program: Program,
    file: Path,
    probes: Sequence[Probe],
    threads: int | None,
    kernels: Path | None = None,
) -> list[Check]:
    """Compare a program that rounds with the ONNX file that was made of it, on the CPU.

    With `kernels` the file runs with them. Its nodes of slrc are then run without, each on the integers that it read,
    and must return the same, bit by bit.

    Args:
        step: a name for the report and for errors.
        program: as it was emitted.
        file: its ONNX form.
        probes: the inputs.
        threads: of the runtime.
        kernels: the library of kernels.

    Raises:
        VerificationError: a value is off by more than one step, outputs by more than they may, or kernels differ from
            what the file says.
    """
    from slrc.backends.ort.run import OnnxRuntimeRunner

    plain = OnnxRuntimeRunner(file, threads, kernels)
    with tempfile.TemporaryDirectory() as folder:
        shown = show_codes(file, Path(folder) / file.name)
        showing = OnnxRuntimeRunner(Path(folder) / file.name, threads, kernels)
        functions = None
        if kernels is not None and shown.packed:
            OnnxRuntimeRunner(file, threads)  # any runtime has to take it
            reads = write_packed_alone(file, Path(folder) / "packed.onnx")
            functions = _Functions(step, reads, tuple(shown.packed), Path(folder) / "packed.onnx", threads)
    most = differing = numbers = values = 0
    checks, worst = [], ""
    exact = _in_float64(program)
    for probe in probes:
        inputs = program.flatten(probe.inputs, {})
        found = dict(zip(shown.outputs, showing(*inputs), strict=True))
        outputs = [found[name] for name in shown.outputs[: shown.own]]
        if functions is not None:
            functions.compare(found)
        steps, computed = _run(program, exact, {name: found[name] for name in shown.codes}, inputs)
        most, differing = max(most, steps.most), differing + steps.differing
        numbers, values, worst = numbers + steps.numbers, steps.values, steps.worst if steps.most == most else worst
        checks.append(compare(f"{step}: outputs", computed, outputs, OUTPUT_TOLERANCE))
        compare(f"{step}: integers shown", outputs, plain(*inputs), SHOWN_TOLERANCE)
    if most > BOUND:
        raise VerificationError(
            f"check `{step}` failed: `{worst}` differs by {most} of its steps, from the same integers before it",
            hint="this is a bug in slrc or in the runtime: please report it with the model; nothing was published",
        )
    named = tuple(p.name for p in probes)
    in_steps = Check(
        step=f"{step}, in steps: {values} rounded values, {differing:,} of {numbers:,} numbers differ",
        inputs=named,
        max_abs_error=most,
        max_rel_error=most,
        tolerance=BOUND,
        passed=True,
    )
    widest = max(checks, key=lambda c: c.max_rel_error)
    alike = [] if functions is None else [functions.check(named)]
    return [in_steps, widest.model_copy(update={"inputs": named}), *alike]


class _Functions:
    """Compares what nodes of slrc return with what their functions return for the same integers."""

    def __init__(self, step: str, reads: Sequence[str], packed: Sequence[str], file: Path, threads: int | None) -> None:
        from slrc.backends.ort.run import OnnxRuntimeRunner

        self._step, self._reads, self._packed = step, reads, packed
        self._run = OnnxRuntimeRunner(file, threads)

    def compare(self, found: Mapping[str, Tensor]) -> None:
        others = self._run(*(found[name] for name in self._reads))
        for name, other in zip(self._packed, others, strict=True):
            if not torch.equal(found[name], other):
                raise VerificationError(
                    f"check `{self._step}` failed: the kernel that computes `{name}` differs from what the file says",
                    hint="this is a bug in slrc or in the runtime: please report it with the model",
                )

    def check(self, inputs: tuple[str, ...]) -> Check:
        step = f"{self._step}, kernels = functions: {len(self._packed)} nodes of slrc, bit by bit"
        return Check(step=step, inputs=inputs, max_abs_error=0.0, max_rel_error=0.0, tolerance=0.0, passed=True)


def _in_float64(program: Program) -> GraphModule | None:
    """Return the graph in float64; `None` where it has an operator or constant that is float32 alone."""
    module = program.module()
    assert isinstance(module, GraphModule)
    module.double()
    try:
        outputs_of(module, tuple(_double(x) for x in program.flat_inputs()))
    except Exception:  # whatever an operator raises for two types
        return None
    return module


def _run(
    program: Program, exact: GraphModule | None, codes: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> tuple[_Steps, list[Tensor]]:
    steps = _Steps(program.graph_module if exact is None else exact, codes)
    with torch.no_grad():
        outputs = steps.run(*(inputs if exact is None else map(_double, inputs)))
    return steps, [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
