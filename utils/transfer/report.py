"""What a study says: tables, two figures, a page, and all of it as text."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.config.transfer import TransferConfig
from utils.files import replacing
from utils.report.page import Section, write_report
from utils.report.plots import INK, figure, line_style, save
from utils.transfer import plan, tables

METHODS = {"fine_tune": "Fine-tuned", "probe": "Frozen encoder, ridge regression"}
SCORES = {"segmentation": "test Dice", "classification": "test AUC"}
READING = [
    "A draw is a set of labelled patients, the same in all arms, with the same patches in the same "
    "order and the same decoder or head at the start; with finetune.fit_outputs the output layers "
    "of segmentation are then fitted to the maps of each arm. Scores are of the last checkpoint on "
    "the test folds, by which nothing was chosen. All intervals are over draws: they say how the "
    "result would vary with other labelled patients, not with other test patients.",
    "Differences are paired by draw; low and high are the 95 % interval of their mean by Student's "
    "t. p is that of the exact sign-flip test on the mean; p_holm is adjusted for the numbers of "
    "labels of the same method and pair of arms, not for the number of arms.",
    "NAME-permuted starts with the weights of NAME, shuffled within each tensor: what NAME gains "
    "over random weights but not over this control comes from the scale of the weights.",
    "Convergence: every length is a run with its own whole schedule, at the learning rate chosen "
    "for the length of the comparison.",
]


def write(
    cfg: TransferConfig, runs: Sequence[dict], tuning: Sequence[dict], rates: dict, notes: list[str]
) -> str:
    """Write results.csv, comparisons.csv, the figures and report.html; return the text to print.

    Args:
        runs, tuning: rows of `utils.transfer.running.perform`, those compared and those by which
            rates were chosen. rates: see `tables.choose_rates`.
        notes: warnings at the top.
    """
    out, baseline, arms = Path(cfg.out), plan.baseline_of(cfg), list(plan.arms_of(cfg))
    write_csv(out / "results.csv", [flat(row) for row in [*tuning, *runs]])
    compared = [r for r in runs if r["method"] == "probe" or r["steps"] == cfg.steps]
    compared = [r for r in compared if r["labels"] in cfg.label_counts]
    scores = tables.score_table(compared)
    differences = tables.comparisons(compared, plan.pairs_of(cfg))
    write_csv(out / "comparisons.csv", differences)
    count = cfg.convergence.label_count or plan.middle(cfg.label_counts)
    lengths = [
        r
        for r in runs
        if r["method"] == "fine_tune"
        and r["labels"] == count
        and r["steps"] in cfg.convergence.steps
    ]
    speed = tables.convergence(lengths, arms, baseline)
    failed = [r for r in [*tuning, *runs] if "error" in r]
    lost = [f"{r['part']}: {name_of(r)}: {r['error']}" for r in failed]
    chosen = [
        {"arm": arm, **rates["scores"].get(arm, {}), "chosen": rate}
        for arm, rate in rates["chosen"].items()
    ]
    pictures = [(out / "label_curve.png", "Means over draws; a point is a draw.")]
    plot_labels(pictures[0][0], compared, arms, SCORES[cfg.stage])
    if lengths:
        caption = f"Runs of different lengths on {count} labelled patients: means over draws."
        pictures.append((out / "convergence.png", caption))
        plot_steps(pictures[1][0], lengths, arms, baseline, SCORES[cfg.stage])
    notes = [*notes, *edges(cfg, rates)] + [f"{len(lost)} runs failed"] * bool(lost)
    title, faster = "Differences", f"Steps to {tables.SHARE:.0%} of {baseline}'s final score"
    sections = [
        Section("Warnings", [notes], warning=True),
        Section(title, [differences]),
        Section(SCORES[cfg.stage].capitalize(), [scores, pictures[0]]),
        Section("Convergence", [faster, speed, *pictures[1:]] if speed else pictures[1:]),
        Section("How to read it", [READING]),
        Section("Learning rates", [chosen]),
        Section("Runs that failed", [lost], warning=True),
        Section("Runs", [[flat(row) for row in runs]]),
        Section("Settings", [cfg.model_dump(mode="json")]),
    ]
    write_report(out / "report.html", f"Transfer: {out.name}", sections)
    texts = [(SCORES[cfg.stage], scores), (title, differences), (faster, speed)]
    texts += [("Learning rates, by the score on the tuning patients", chosen)]
    printed = [f"{name}\n\n{markdown(table)}" for name, table in texts if table]
    printed += [f"Runs that failed\n\n{chr(10).join(lost)}"] * bool(lost)
    printed += [f"WARNING: {note}" for note in notes]
    return "\n\n".join([*printed, str(out / "report.html")])


def edges(cfg: TransferConfig, rates: dict) -> list[str]:
    """Return a warning for each arm whose best learning rate is the first or last of the list."""
    tried = cfg.tuning.learning_rates
    return [
        f"{arm}: the best learning rate, {rate:g}, is at the edge of the list; a longer one may "
        "hold a better one"
        for arm, rate in rates["chosen"].items()
        if len(tried) > 1 and rate in (tried[0], tried[-1])
    ]


def name_of(row: dict) -> str:
    text = f"{row['arm']}, {row['labels']} labelled, draw {row['draw']}, seed {row['seed']}"
    text += f", {row['steps']} steps" * (row["steps"] > 0)
    return text + (f", learning rate {row['learning_rate']:g}" if row["learning_rate"] else "")


def flat(row: dict) -> dict:
    """Return a row with a column for each class."""
    return {k: v for k, v in row.items() if k != "classes"} | row.get("classes", {})


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[dict]) -> str:
    """Return a table in Markdown, aligned so that it can be read as text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([text_of(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [" | ".join(f"{c:<{w}}" for c, w in zip(x, widths, strict=True)) for x in cells]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


def text_of(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_labels(path: Path, rows: Sequence[dict], arms: Sequence[str], score: str) -> np.ndarray:
    """Draw the score over the number of labels, a panel for each method and a line for each arm."""
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    fig = figure(5.2 * len(methods), 4, layout="constrained")
    for n, method in enumerate(methods):
        ax = fig.add_subplot(1, len(methods), n + 1)
        of_method = [row for row in rows if row["method"] == method]
        draw_arms(ax, of_method, "labels", arms)
        ax.set(title=METHODS[method], xlabel="labelled patients", ylabel=score)
        ax.legend(fontsize=8)
    return save(fig, path)


def plot_steps(path: Path, rows, arms: Sequence[str], baseline: str, score: str) -> np.ndarray:
    """Draw the score over the length of the runs, with the score that is to be reached."""
    fig = figure(5.6, 4, layout="constrained")
    ax = fig.add_subplot()
    draw_arms(ax, rows, "steps", arms)
    longest = max(row["steps"] for row in rows)
    if final := tables.mean_by_draw(rows, arm=baseline, steps=longest):
        target = tables.SHARE * float(np.mean([*final.values()]))
        label = f"{tables.SHARE:.0%} of {baseline}'s final score"
        ax.axhline(target, color=INK, lw=1, ls=":", label=label)
    ax.set(xlabel="optimizer steps, each with a whole schedule", ylabel=score)
    ax.legend(fontsize=8)
    return save(fig, path)


def draw_arms(ax, rows: Sequence[dict], x: str, arms: Sequence[str]) -> None:
    """Draw a line through the means of each arm, and its draws as points."""
    values = sorted({row[x] for row in rows})
    for i, arm in enumerate(arms):
        found = {v: [*tables.mean_by_draw(rows, arm=arm, **{x: v}).values()] for v in values}
        beside = 1.02 ** (i - (len(arms) - 1) / 2)  # so that points of several arms are seen
        at = {v * beside: scores for v, scores in found.items() if scores}
        alone = {"marker": "_", "ms": 16} if len(values) == 1 else {}  # one mean makes no line
        means = [np.mean(scores) for scores in at.values()]
        ax.plot([*at], means, label=arm, **alone, **line_style(i))
        points = [(where, score) for where, scores in at.items() for score in scores]
        if points:
            ax.plot(*zip(*points, strict=True), "o", ms=4, alpha=0.6, color=line_style(i)["color"])
    ax.set_xscale("log")
    ax.set_xticks(values, [str(v) for v in values], minor=False)
    ax.set_xticks([], minor=True)
    if len(values) == 1:
        ax.set_xlim(values[0] / 1.2, values[0] * 1.2)
    ax.grid(lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
