"""`report.html`: one self-contained page."""

from __future__ import annotations

from pathlib import Path

from slrc.report import Report


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(report.model_dump_json())
