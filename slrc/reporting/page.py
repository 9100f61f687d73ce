"""`report.html`: one self-contained page, readable without scripts and without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slrc.methods.settings import MethodName
from slrc.reporting import plots
from slrc.reporting.report import Pair, Report

TEMPLATE = "report.html.j2"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(render_page(report), encoding="utf-8")


def render_page(report: Report) -> str:
    """Return the page; the same report gives the same bytes."""
    has_conditions = report.method in (MethodName.SLR, MethodName.SLR_TIGHTENING)
    accuracy = report.accuracy
    return render(
        TEMPLATE,
        report=report,
        has_conditions=has_conditions,
        training=Markup(
            plots.training_plot(
                report.curve,
                accuracy.metric if accuracy else "metric",
                accuracy.dense if accuracy else None,
            )
        ),
        layers=[Markup(svg) for svg in plots.layers_plots(report.layers)],
        latency=Markup(plots.latency_plot(report.latency)),
        history=Markup(plots.history_plot(report.history, has_conditions)),
    )


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of values."""
    environment = Environment(
        loader=PackageLoader("slrc"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "si": _si,
        "signed": _signed,
        "change": _change,
        "scientific": _scientific,
        "flatten": _flatten,
        "plural": _plural,
    }
    return environment.get_template(template).render(**values)


def _si(value: int, unit: str = "") -> str:
    """Three digits and a prefix: 381258 is 381 k."""
    for scale, prefix in PREFIXES:
        if value >= 0.9995 * scale:  # what rounds up to 1000 takes the next prefix
            return f"{value / scale:#.3g}".rstrip(".") + f"\u00a0{prefix}{unit}"
    return f"{value}\u00a0{unit}" if unit else str(value)


def _signed(value: float, spec: str = ".4f") -> str:
    """With a sign always, and a true minus."""
    return f"{value:+{spec}}".replace("-", "−")


def _change(pair: Pair[int]) -> str:
    """From dense to compiled, relative; empty where dense is nothing."""
    return _signed(pair.compiled / pair.dense - 1, ".1%") if pair.dense else ""


def _scientific(value: float) -> str:
    return f"{value:.1e}".replace("-", "−") if value else "0"


def _plural(count: int, noun: str) -> str:
    return f"{count:,}\u00a0{noun}{'' if count == 1 else 's'}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and readable values of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _readable(value)


def _readable(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_readable(x) for x in value) or "none"
    return str(value)
