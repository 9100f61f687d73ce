"""Tables of what pruning costs in accuracy, by methods that train and by those that do not, and in time."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "convergence"))
sys.path.insert(1, str(Path(__file__).parents[1] / "pareto"))
import answers
from frontier import points
from reconstruct import CASES as RECONSTRUCTED
from reconstruct import NAMES as RECONSTRUCTED_NAMES
from reconstruct import more, row_key
from rendering.markdown import TO_FILL, made, ranged, read, table
from results import Row, file_of, rows_of
from tasks_accuracy import CASES as TASKS


def reconstruct() -> str:
    """Pruning without labels or training."""
    rows, lines = read("reconstruct"), []
    for network, cases in RECONSTRUCTED.items():
        for case in cases:
            if (key := row_key(network, *case)) not in rows:
                continue
            row = rows[key]
            pattern, sparsity, options = case
            name = f"{RECONSTRUCTED_NAMES[network]}, `{pattern}` {sparsity or 0.5:.0%}{more(options)}"
            figures = ("dense", "accuracy", "magnitude", "agreement")
            cells = [f"{row[f]:.1f}" if f in row else "–" for f in figures]
            peak = f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "–"
            lines.append([name, *cells, f"{row['seconds']:.0f} s", peak])
    titles = ("network, pattern", "dense", "reconstructed", "by magnitude", "agreement", "time", "peak memory")
    return table(titles, lines) + made(rows.values())


def pareto() -> str:
    """Accuracy over measured latency."""
    found, lines = list(points()), []
    trained = {(r["network"], r["contender"], r["share"]): r["epochs"] for r in rows_of(file_of("pareto")).values()}
    for p in found:
        epochs = str(trained.get((p.network, p.contender, p.asked), "–"))
        within = "" if p.interval is None else f" ± {p.interval:.1f}"
        asked = "–" if p.asked is None else f"{p.asked:.0%}"
        name = p.contender if p.asked is None else f"`{p.contender}`"
        accuracy = f"{p.dense:.1f}", f"{p.test:.1f}{within}", f"{p.test - p.dense:+.1f}"
        lines.append([p.network, name, asked, f"{p.share:.1f}%", f"{p.ms:.3f}", epochs, *accuracy])
    titles = ("network", "pruned by", "asked", "measured", "ms", "epochs", "dense", "accuracy", "beside dense")
    shown = [*rows_of(file_of("pareto_latency")).values(), *rows_of(file_of("pareto_int8")).values()]
    return table(titles, lines) + made(shown)


def tasks_accuracy() -> str:
    """What the examples of other tasks keep of their metric."""
    rows, lines, commands = read("tasks_accuracy"), [], ""
    for number, case in enumerate(TASKS, start=1):
        commands += f"{number}. `{case.command}`\n"
        if (row := rows.get(case.command)) is None:
            lines.append([str(number), case.network, case.how, *[TO_FILL] * 6])
            continue
        found, left = row["accuracy"], row["params"]["compiled"] / row["params"]["dense"]
        figures = [f"{100 * found[x]:.1f}" for x in ("dense", "hard_pruned", "final")]
        speed = ranged(row["speedup"], row["spread"])
        lines.append([str(number), case.network, case.how, found["metric"], *figures, f"{left:.0%}", speed])
    titles = (
        "",
        "network and data",
        "asked",
        "metric",
        "dense",
        "pruned",
        "compiled",
        "weights left",
        "speed-up",
    )
    return table(titles, lines) + "\n" + commands + made(rows.values())


def channel_permutation() -> str:
    """What reordering channels does for blocks."""
    rows, lines = read("channel_permutation"), []
    for name, row in rows.items():
        network, pattern, sparsity = name.rsplit(maxsplit=2)
        energy = f"{row['kept_plain']:.1%} → {row['kept_permuted']:.1%}"
        accuracy = "–"
        if "accuracy_plain" in row:
            accuracy = f"{row['accuracy_plain']:.1%} → {row['accuracy_permuted']:.1%}"
        lines.append([f"`{network}`", f"`{pattern}`, {float(sparsity):.0%}", energy, accuracy])
    return table(("network", "pattern", "energy kept", "accuracy, one shot"), lines) + made(rows.values())


def step_cost() -> str:
    """What the teacher and the method add to a training step."""
    rows, lines = read("step_cost"), []
    for row in rows.values():
        added = f"{row['distillation']:.0%}", f"{row['method']:.1%}"
        lines.append([row["network"], row["precision"], f"`{row['method_name']}`", f"{row['step_ms']:.0f} ms", *added])
    titles = ("network", "training", "method", "a step", "distillation adds", "the method adds")
    return table(titles, lines) + made(rows.values())


def methods() -> str:
    """The methods' accuracy after six epochs."""
    return answers.accuracy_table(answers.Results(compared()), "test") + made(compared("small").values())


def methods_against() -> str:
    """The default less each other method."""
    return answers.against_table(answers.Results(compared()), "small")


def methods_parts() -> str:
    """Parts of the default left out or changed."""
    return answers.parts_table(answers.Results(compared())) + made(compared("parts").values())


def methods_budgets() -> str:
    """Runs of few and of many epochs."""
    return answers.budgets_table(answers.Results(compared())) + made(compared("budgets").values())


def methods_large() -> str:
    """Larger networks."""
    rows = {**compared("middle"), **compared("large")}
    return answers.others_table(answers.Results(compared())) + made(rows.values())


def methods_tasks() -> str:
    """Segmentation, detection, lanes and lidar."""
    rows = compared("tasks")
    return answers.tasks_table(answers.Results(rows)) + made(rows.values())


def methods_inside() -> str:
    """What happens inside the methods."""
    return answers.inside_table(answers.Results(compared()))


def methods_settings() -> str:
    """What was the best for each method."""
    return answers.settings_table(compared()) + made(compared("tuning").values())


def compared(tier: str = "") -> dict[str, Row]:
    """Return the rows of the comparison, all or those of a tier."""
    rows = rows_of(file_of("convergence"))
    return {name: row for name, row in rows.items() if name.startswith(tier)}
