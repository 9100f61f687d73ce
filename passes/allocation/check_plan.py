"""Make sure that a plan that was given fits a program."""

from __future__ import annotations

from slrc.errors import PlanError
from slrc.ir.program import Program
from slrc.passes.analysis.label_indices import label_indices
from slrc.passes.structure.permute_channels import check_orders
from slrc.sparsity.plans import Plan


def checked_plan(program: Program, given: Plan) -> Plan:
    """Return a plan that the user gave, made sure to fit the program.

    Raises:
        PlanError: it does not fit, or constrains nothing.
    """
    if not given.constraints:
        raise PlanError("the plan constrains nothing", hint="write one with `slrc inspect --plan-out plan.json`")
    given.check(program.tensors, {name: layer.groups for name, layer in program.layers.items()})
    _check_groups(program, given)
    check_orders(program, given)
    weights = [c.num_weights(program.tensors) for c in given]
    kept = sum(c.kept_weights(program.tensors) for c in given)
    sparsity = 1.0 - kept / sum(weights)
    # A latency that was predicted for other widths says nothing.
    latency = given.latency if abs(sparsity - given.sparsity) < 1e-9 else None
    return given.model_copy(update={"sparsity": sparsity, "latency": latency})


def _check_groups(program: Program, given: Plan) -> None:
    """Coupled groups must be the program's own, and their tensors under no other constraint."""
    coupled = [c for c in given if c.pattern.coupled]
    if not coupled:
        return
    labels = label_indices(program, given.attention, given.layer_norm)
    known = {(g.units, g.members, g.followers) for g in labels.groups}
    for c in coupled:
        if (c.groups, c.members, c.followers) not in known:
            raise PlanError(
                f"constraint `{c.name}`: its tensors are not removable together in {program.name}",
                hint="edit `keep` only, or write the plan anew with `slrc inspect --plan-out plan.json`",
            )
    governed = {s.tensor: c.name for c in coupled for s in c.members + c.followers}
    for c in given:
        if not c.pattern.coupled and (tensor := c.members[0].tensor) in governed:
            raise PlanError(
                f"`{tensor}` is constrained by {c.pattern} and lies in the channel group `{governed[tensor]}`",
                hint="leave one of the two constraints out",
            )
