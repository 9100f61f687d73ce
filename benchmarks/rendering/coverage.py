"""Tables of which networks can be planned, how exact every step is, and what the analysis takes."""

from __future__ import annotations

from textwrap import shorten

from analysis_growth import slope
from rendering.markdown import made, read, table
from zoo import EXACT


def zoo() -> str:
    """Families of networks: how many are exact, and the largest error."""
    rows, lines = read("zoo"), []
    for source in ("torchvision", "timm"):
        mine = {name: row for name, row in rows.items() if name.startswith(source)}
        worst = {name: max(max(x["slim_error"], x["ort_error"]) for x in row["levels"].values())
                 for name, row in mine.items() if "levels" in row}  # fmt: skip
        failed = [f"`{name.partition(':')[2]}`" for name in mine if name not in worst]
        exact = sum(error <= EXACT for error in worst.values())
        lines.append([source, str(len(mine)), str(exact), f"{max(worst.values()):.0e}", ", ".join(failed) or "none"])
    titles = ("library", "networks run", "equal", "largest error", "could not be planned")
    return table(titles, lines) + made(rows.values())


def detectors() -> str:
    """Detectors and feature extractors: what is left, and how exact every step is."""
    rows, lines = read("detectors"), []
    for name, row in rows.items():
        cells = [f"`{name}`", f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "–"]
        for pattern in ("channel", "block:8x1"):
            found = row.get(pattern, {"failed": "ended early"})
            failed = shorten(found.get("failed", ""), 80, placeholder=" …")
            cells.append(failed or f"{found['left']:.0%}, {found['error']:.0e}")
        lines.append(cells)
    titles = ("network", "parameters", "`channel`, 50%: left, error", "`block:8x1`, 75%: left, error")
    return table(titles, lines) + made(rows.values())


def analysis_growth() -> str:
    """How the analysis grows."""
    rows = read("analysis_growth")
    largest = max(rows, key=lambda name: rows[name]["operators"])
    exponent = slope(list(rows.values()), "operators")[0]
    row = rows[largest]
    text = (
        f"Over {len(rows)} networks the time grows as the number of operators to the power {exponent:.2f}.\n"
        f"The largest, `{largest}`, has {row['operators']} operators and takes {row['seconds']:.2f} seconds.\n"
    )
    return text + made(rows.values())
