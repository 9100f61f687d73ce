"""Tables and plots of what `convergence/run.py` has measured.

    python benchmarks/convergence/answers.py

Reads `benchmarks/results/convergence.jsonl`, prints tables, and draws `convergence_budgets.svg` beside it. The tables
of docs/method.md are these: `make tables` writes them there. Accuracies are those of the pruned network on test images,
in percent, unless said otherwise; ± is a 95 % interval of the mean over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contenders import CONTENDERS, PARTS
from plots import write_plots
from run import CASES, DEFAULT, EPOCHS, RESULTS, RIVALS, TUNED_ON, read_rows, short, tuned

Result = Mapping[str, Any]
Seeds = dict[str, float]
"""A figure by seed."""
STUDENT_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
"""Two-sided quantiles by degrees of freedom; from 14 on 2.145 to 1.96 is taken as 2.1."""
NETWORKS = {
    "fashion-resnet": "ResNet",
    "fashion-mixer": "Mixer",
    "cifar-resnet20": "ResNet-20, CIFAR-10",
    "imagenette-mobilenet_v2": "MobileNetV2, Imagenette",
    "cifar-vgg16": "VGG-16, CIFAR-10",
    "cifar-resnet18": "ResNet-18, CIFAR-10",
    "cifar-resnet110": "ResNet-110, CIFAR-10",
    "camvid-unet": "U-Net, CamVid, mean IoU",
    "camvid-lraspp": "LR-ASPP, CamVid, mean IoU",
    "coco-yolov3_tiny": "YOLOv3-tiny, COCO, mAP50",
    "scenes-lanes": "lanes, synthetic scenes, accuracy",
    "scenes-pillars": "PointPillars, synthetic scenes, mean AP",
}
MARGINS = (1.0, 2.0)
"""Points below dense, as targets."""


class Interval(NamedTuple):
    """A mean and half the width of its interval; infinite for a single value."""

    mean: float
    half: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Return the interval of some values' mean."""
        freedom = len(values) - 1
        if not freedom:
            return Interval(values[0], math.inf)
        quantile = STUDENT_95[freedom] if freedom < len(STUDENT_95) else 2.1
        return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))

    @property
    def verdict(self) -> str:
        """Whether a difference is one: a tie if its interval holds zero."""
        if abs(self.mean) <= self.half:
            return "tie"
        return "ahead" if self.mean > 0 else "behind"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f}" if math.isfinite(self.half) else f"{self.mean:+.2f}"


class Results:
    """The rows, by tier, case, contender with setting, epochs and seed."""

    def __init__(self, rows: Mapping[str, Result]) -> None:
        self.rows: dict[tuple[str, str, str, int], dict[str, Result]] = defaultdict(dict)
        for name, row in rows.items():
            tier, network, case, what, epochs, seed = name.split("/")
            self.rows[tier, f"{network}/{case}", what, int(epochs)][seed] = row

    def seeds(self, tier: str, case: str, what: str, epochs: int = EPOCHS, figure: str = "test") -> Seeds:
        """Return a figure by seed; empty where nothing was measured."""
        return {seed: row[figure] for seed, row in self.rows.get((tier, case, what, epochs), {}).items()}

    def difference(self, tier: str, case: str, first: str, second: str, figure: str = "test") -> list[float]:
        """Return the differences of two contenders in the seeds that both have."""
        ours, theirs = (self.seeds(tier, case, what, figure=figure) for what in (first, second))
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def cases(self, tier: str) -> list[str]:
        """Return a tier's cases, in order."""
        found = {case for (at, case, _, _) in self.rows if at == tier}
        return sorted(found, key=lambda case: ([*map(name_of, CASES), case].index(case), case))


def titles(cases: Sequence[str]) -> list[str]:
    """Return cases as tables show them, such as `ResNet, block:8x1 75 %`."""
    found = []
    for case in cases:
        network, pattern = case.split("/")
        kind, sparsity = pattern.split("@")
        found.append(f"{NETWORKS.get(network, network)}, `{kind}` {float(sparsity):.0%}")
    return found


def name_of(case: tuple[str, str, float]) -> str:
    """Return a case as rows name it."""
    network, pattern, sparsity = case
    return f"{network}/{pattern}@{sparsity}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def tuned_or_none(name: str, rows: Mapping[str, Result]) -> Mapping[str, Any] | None:
    """Return a contender's best settings, or nothing before it is tuned."""
    try:
        return tuned(name, rows)
    except SystemExit:
        return None


def mean_of(values: Seeds) -> str:
    """Print the mean over seeds."""
    return f"{statistics.fmean(values.values()):.2f}" if values else "–"


def accuracy_table(results: Results, figure: str) -> str:
    """Accuracy of every contender, and how many seeds it has."""
    cases = results.cases("small")
    rows = []
    for name in CONTENDERS:
        values = [results.seeds("small", case, name, figure=figure) for case in cases]
        if any(values):
            rows.append([name, *map(mean_of, values), str(max(map(len, values)))])
    starts = [
        results.seeds("small", case, DEFAULT, figure={"test": "dense", "val": "dense_val"}[figure]) for case in cases
    ]
    return table(["", *titles(cases), "seeds"], [["the dense start", *map(mean_of, starts), ""], *rows])


def against_table(results: Results, tier: str) -> str:
    """The default less each rival: in each case, over all of them, and how many are won, tied and lost."""
    cases, rows, score, means = results.cases(tier), [], [], []
    for rival in RIVALS:
        differences = [results.difference(tier, case, DEFAULT, rival) for case in cases]
        if rival == DEFAULT or not any(differences):
            continue
        intervals = [Interval.of(d) if d else None for d in differences]
        verdicts = [i.verdict for i in intervals if i]
        score += verdicts
        means += [i.mean >= 0 for i in intervals if i]
        pooled = Interval.of([d for one in differences for d in one])
        counts = "/".join(str(verdicts.count(v)) for v in ("ahead", "tie", "behind"))
        rows.append([rival, *(str(i) if i else "–" for i in intervals), str(pooled), counts])
    if score:
        share = (score.count("ahead") + 0.5 * score.count("tie")) / len(score)
        behind = score.count("behind") / len(score)
        ahead = statistics.fmean(means)
        last = f"{share:.0%} with ties as half; clearly behind in {behind:.0%}; the mean ahead in {ahead:.0%}"
        rows.append([f"all {len(score)}", *[""] * len(cases), "", last])
    return table(["", *titles(cases), "all", "ahead/tie/behind"], rows)


def parts_table(results: Results) -> str:
    """What the default loses without a part, on the validation split and on test images."""
    cases, rows = results.cases("parts"), []
    base = f"{DEFAULT}: the default"
    for setting in PARTS:
        name = f"{DEFAULT}: {setting}"
        means = [mean_of(results.seeds("parts", case, name)) for case in cases]
        cells = []
        for figure in ("test", "val"):
            pooled = [d for case in cases for d in results.difference("parts", case, name, base, figure)]
            cells.append(str(Interval.of(pooled)) if pooled and setting != "the default" else "")
        rows.append([setting, *means, *cells])
    return table(["", *titles(cases), "difference", "on validation"], rows)


def budgets_table(results: Results) -> str:
    """Accuracy after whole runs of few and of many epochs, and the shortest that reach targets below dense."""
    case = name_of(CASES[0])
    lengths = sorted({epochs for (tier, _, _, epochs) in results.rows if tier == "budgets"} | {EPOCHS})
    rows = []
    starts = results.seeds("small", case, DEFAULT, figure="dense").values()
    dense = statistics.fmean(starts) if starts else math.inf
    for name in RIVALS:
        by_epochs = {e: results.seeds("small" if e == EPOCHS else "budgets", case, name, e) for e in lengths}
        reached = []
        for margin in MARGINS:
            goal = dense - margin
            enough = [e for e, found in by_epochs.items() if found and statistics.fmean(found.values()) >= goal]
            reached.append(str(min(enough)) if enough else "–")
        if len([e for e in lengths if by_epochs[e]]) > 1:
            rows.append([name, *(mean_of(by_epochs[e]) for e in lengths), *reached])
    targets = [f"epochs to dense − {margin:.0f}" for margin in MARGINS]
    return table(["", *(f"{e} epochs" for e in lengths), *targets], rows)


def others_table(results: Results) -> str:
    """Larger networks: the accuracy on test images, and what the dense network had."""
    rows = []
    for (tier, case, name, epochs), found in sorted(results.rows.items()):
        if tier in ("middle", "large"):
            tests = {s: r["test"] for s, r in found.items()}
            starts = {s: r["dense"] for s, r in found.items()}
            rows.append([*titles([case]), name, str(epochs), mean_of(starts), mean_of(tests), str(len(found))])
    return table(["case", "contender", "epochs", "dense start", "accuracy", "seeds"], rows)


def tasks_table(results: Results) -> str:
    """Other tasks: the metric on test data, and after how many epochs the pruned network was as good as ADMM's ends."""
    rows = []
    for (tier, case, name, epochs), found in sorted(results.rows.items()):
        if tier == "tasks":
            goals = results.seeds(tier, case, "admm", epochs, "val")
            took = [first_at(goals[seed], row["curve"]) if seed in goals else "–" for seed, row in found.items()]
            tests = Interval.of([row["test"] for row in found.values()])
            within = f"{tests.mean:.2f}" + (f" ± {tests.half:.2f}" if math.isfinite(tests.half) else "")
            starts = {seed: row["dense"] for seed, row in found.items()}
            fast = ", ".join(took)
            rows.append([*titles([case]), name, str(epochs), mean_of(starts), within, str(len(found)), fast])
    return table(["case", "contender", "epochs", "dense start", "metric", "seeds", "epochs to ADMM's last"], rows)


def first_at(goal: float, curve: Sequence[float | None]) -> str:
    """Return the first epoch after which a metric is not below a goal."""
    return next((str(epoch) for epoch, value in enumerate(curve) if value is not None and value >= goal), "never")


def inside_table(results: Results) -> str:
    """What happens inside: how much of the first mask changes, which conditions hold, what a step takes."""
    rows = []
    for name in CONTENDERS:
        found = [
            r for (tier, _, what, _), by in results.rows.items() if (tier, what) == ("small", name) for r in by.values()
        ]
        if not found:
            continue
        changed = [r["changed"] for r in found if r["changed"] is not None]
        updates = [u for r in found for u in r["history"]]
        held = statistics.fmean(u["accepted"] / 2 for u in updates) if updates and name.startswith("slr") else None
        costs = [r["cost"] for r in found if r["cost"]]
        rows.append(
            [
                name,
                f"{min(changed):.1%} to {max(changed):.1%}" if changed else "–",
                "–" if held is None else f"{held:.0%}",
                f"{statistics.median(c['distillation'] for c in costs):.0%}",
                f"{statistics.median(c['method'] for c in costs):.1%}",
            ]
        )
    head = ["", "of the first mask changed", "conditions that held", "distillation adds to a step", "the method adds"]
    return table(head, rows)


def settings_table(rows: Mapping[str, Result]) -> str:
    """What was the best for each contender in its grid, on the validation split of two cases."""
    found = []
    for name, contender in CONTENDERS.items():
        tries = [r for r in rows.values() if r["row"].startswith("tuning/") and r["contender"] == name]
        if not contender.like and tries:
            if (best := tuned_or_none(name, rows)) is None:
                continue
            values = [r["val"] for r in tries if r["setting"] == short(best)]
            found.append([name, str(len(contender.settings())), short(best), ", ".join(f"{v:.2f}" for v in values)])
    on = " and ".join(titles([name_of(case) for case in TUNED_ON]))
    return table(["", "tried", "the best", f"validation: {on}"], found)


def main() -> None:
    """Print everything, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder of the plot")
    args = parser.parse_args()
    rows = read_rows(args.rows)
    results = Results(rows)
    sections = (
        (f"Accuracy after {EPOCHS} epochs, test images", accuracy_table(results, "test")),
        ("The same on the validation split", accuracy_table(results, "val")),
        ("The default less each other method, in points", against_table(results, "small")),
        ("Parts of the default left out or changed, one seed", parts_table(results)),
        (f"Whole runs of few and of many epochs, {name_of(CASES[0])}", budgets_table(results)),
        ("Larger networks", others_table(results)),
        ("Segmentation, detection, lanes and lidar", tasks_table(results)),
        ("What happens inside", inside_table(results)),
        ("Settings", settings_table(rows)),
    )
    print("\n".join(f"## {title}\n\n{body}" for title, body in sections))
    args.out.mkdir(exist_ok=True)
    write_plots(rows, args.out)


if __name__ == "__main__":
    main()
