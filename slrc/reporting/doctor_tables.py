"""The tables of `slrc doctor`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from slrc.doctor.diagnosis import Diagnosis, Reach, SpeedupPoint, Training
from slrc.reporting.tables import make_table

SLOWEST = 12
"""How many parts are shown."""
NAMES = 3


def doctor_tables(found: Diagnosis) -> Iterator[Table]:
    """The checks, then what can be pruned, where time goes, how fast it may become, and what training takes."""
    checks = make_table(f"{found.model}: examined in {found.seconds:.0f} s", "check", "", "")
    for f in found.findings:
        checks.add_row(f.check, str(f.status), f.said)
        if f.hint:
            checks.add_row("", "hint", f.hint)
    yield checks
    if found.reach:
        yield _reach_table(found.reach)
    if any(p.ms is not None for p in found.parts):
        yield _parts_table(found)
    if found.speedups:
        yield _speedups_table(found)
    if found.training:
        yield _training_table(found.training)


def _reach_table(reach: tuple[Reach, ...]) -> Table:
    table = make_table("what can be pruned, and what pins the rest", "pattern", "parameters", "MACs", "pinned")
    for x in reach:
        table.add_row(x.pattern, f"{x.params:.1%}", f"{x.macs:.1%}", "" if x.pins else "nothing")
        for pin in x.pins:
            names = ", ".join(pin.layers[:NAMES])
            more = f" and {len(pin.layers) - NAMES} more" if len(pin.layers) > NAMES else ""
            table.add_row("", "", "", f"{names}{more}: {pin.reason}")
    return table


def _parts_table(found: Diagnosis) -> Table:
    timed = sorted((p for p in found.parts if p.ms is not None), key=lambda p: -(p.ms or 0.0))
    total = sum(p.ms or 0.0 for p in timed)
    title = f"where the time goes on {found.target}, {found.threads} thread{'s' if found.threads > 1 else ''}"
    table = make_table(title, "part", "MACs", "ms", "share")
    for p in timed[:SLOWEST]:
        table.add_row(p.name, f"{p.macs:,}", f"{p.ms:.3f}", f"{(p.ms or 0.0) / total:.1%}")
    if rest := timed[SLOWEST:]:
        ms = sum(p.ms or 0.0 for p in rest)
        table.add_row(f"{len(rest)} more", f"{sum(p.macs for p in rest):,}", f"{ms:.3f}", f"{ms / total:.1%}")
    if late := [p for p in found.parts if p.ms is None]:
        table.add_row(f"{len(late)} more", f"{sum(p.macs for p in late):,}", "not timed", "")
    return table


def _speedups_table(found: Diagnosis) -> Table:
    sparsities = sorted({p.sparsity for p in found.speedups})
    table = make_table(
        "how fast it may become: the whole network pruned by magnitude, timed beside the dense one",
        "pattern",
        *(f"{s:.0%} pruned" for s in sparsities),
    )
    by_place = {(p.pattern, p.sparsity): p for p in found.speedups}
    for pattern in dict.fromkeys(p.pattern for p in found.speedups):
        table.add_row(pattern, *(_speedup(by_place.get((pattern, s))) for s in sparsities))
    return table


def _speedup(point: SpeedupPoint | None) -> str:
    if point is None:
        return ""
    if point.speedup is None or point.spread is None:
        return f"not timed: {point.why_not}"
    return f"{point.speedup:.2f}x ({point.spread[0]:.2f} to {point.spread[1]:.2f})"


def _training_table(t: Training) -> Table:
    table = make_table("what training takes", "", "")
    table.add_row("step", f"{t.step_seconds:.3g} s, {t.samples / t.step_seconds:,.0f} samples a second")
    if t.epoch_seconds is not None:
        table.add_row("epoch", f"{t.epoch_seconds:,.1f} s, {t.steps:,} steps")
    else:
        table.add_row("epoch", "the loader does not say how many batches it has")
    if t.evaluation_seconds is not None:
        more = "" if t.evaluation_is_whole else "more than "
        table.add_row("evaluation", f"{more}{t.evaluation_seconds:,.1f} s")
    if t.hours is not None:
        more = "" if t.evaluation_is_whole or t.evaluation_seconds is None else "more than "
        table.add_row("all of it", f"{more}{t.hours:.2f} hours, besides minutes for planning and timing")
    return table
