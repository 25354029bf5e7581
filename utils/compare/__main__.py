"""Compare runs: one table, their curves over each other, settings that differ, paired differences.

    python -m utils.compare RUN RUN ... [--out FOLDER]

RUN is a folder <results_dir>/<experiment>, of a run or of a --cv, or of an earlier test in it; the
others are compared with the first.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.compare.plots import plot_over_each_other
from utils.compare.runs import Row, differing_settings, overview, paired, read_run
from utils.errors import InputError
from utils.files import expand_path
from utils.report.page import Section, number, write_report
from utils.training.run import exit_code

MAX_RUNS = 7  # colours that can be told apart
EXPLANATION = (
    "Differences: the other run's score minus the first's, on the same cases of both tests. Their "
    "95 % intervals come from 1000 bootstrap resamples of the patients, the same for both runs, "
    "so that they are narrower than the intervals of two scores suggest. They know nothing of how "
    "the same settings would turn out with another seed."
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m utils.compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="<results_dir>/<experiment>")
    where = (
        "folder for report.html and curves.png, which are replaced (default: results/comparison)"
    )
    parser.add_argument("--out", default="results/comparison", metavar="FOLDER", help=where)
    args = parser.parse_args(argv)
    folders = [Path(expand_path(text)) for text in dict.fromkeys(args.runs)]
    if not 2 <= len(folders) <= MAX_RUNS:
        raise InputError(f"{len(folders)} different runs given: expected 2 to {MAX_RUNS}")
    out = Path(expand_path(args.out))
    if (out / "config.yaml").exists():
        raise InputError(f"--out: {out} holds a run, whose report would be replaced: name another")
    runs = [read_run(f, name) for f, name in zip(folders, short_names(folders), strict=True)]
    table, settings = overview(runs), differing_settings(runs)
    pairs = [paired(runs[0], other) for other in runs[1:]]
    rows, notes = [r for found, _ in pairs for r in found], [n for _, ns in pairs for n in ns]

    out.mkdir(parents=True, exist_ok=True)
    curves = plot_over_each_other(out / "curves.png", {run.name: run.rows for run in runs})
    differences = [[_readable(row) for row in rows]] if rows else []
    sections = [
        Section("Runs", [table]),
        Section("Differences", [*differences, *notes, EXPLANATION]),
        Section("Settings that differ", [settings or "none"]),
        Section("Curves", [(out / "curves.png", "One line for each run.")] * (curves is not None)),
    ]
    write_report(out / "report.html", f"Comparison of {', '.join(r.name for r in runs)}", sections)
    for title, found in (
        ("runs", table),
        ("settings that differ", settings),
        ("differences", rows),
    ):
        print(f"{title}:\n{in_columns([_readable(row) for row in found]) or '  none'}")
    for note in notes:
        print(f"note: {note}")
    print(out / "report.html")
    return 0


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError("two of the runs are one folder")


def _readable(row: Row) -> Row:
    """Return a row with its interval as text."""
    ends = row.get("95 %")
    text = "not defined"
    if isinstance(ends, list):
        text = " to ".join("+" * (end > 0) + number(end) for end in ends)
    return {k: text if k == "95 %" else v for k, v in row.items()}


def in_columns(rows: Sequence[Row]) -> str:
    """Return rows as a table of text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    lines = ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(x, widths, strict=True)) for x in cells]
    return "\n".join(line.rstrip() for line in lines) if rows else ""


def _text(value: object) -> str:
    return "-" if value is None else number(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(exit_code(main))
