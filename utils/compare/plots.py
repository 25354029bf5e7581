"""The curves of several runs over each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from utils.report.plots import figure, line_style, save

FIRST = ("loss", "val_loss", "val_dice", "val_auc")
NO_CURVE = ("epoch", "step", "images_per_s", "data_wait", "seconds", "peak_memory_gb")
MAX_PANELS = 24


def plot_over_each_other(path: Path, runs: Mapping[str, Sequence[dict]]):
    """Draw a panel for each column that two runs or more have, with a line for each run.

    runs: {name: rows of metrics.csv}. Returns the picture (H, W, 3), None if nothing is shared.
    """
    columns = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row))
    series = {}
    columns = [*(name for name in FIRST if name in columns), *columns]
    for column in [name for name in dict.fromkeys(columns) if name not in NO_CURVE]:
        found = {
            run: [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]
            for run, rows in runs.items()
        }
        if sum(map(bool, found.values())) > 1:
            series[column] = found
    if not series:
        return None
    series = dict(list(series.items())[:MAX_PANELS])
    num_columns = min(4, len(series))
    num_rows = -(-len(series) // num_columns)
    fig = figure(3.4 * num_columns, 2.5 * num_rows + 0.5, layout="constrained")
    for n, (column, found) in enumerate(series.items(), 1):
        ax = fig.add_subplot(num_rows, num_columns, n)
        for i, points in enumerate(found.values()):
            if points:
                marker = "o" if len(points) <= 30 else ""
                ax.plot(*zip(*points, strict=True), marker=marker, ms=3, **line_style(i))
        ax.set_title(column.replace("_", " "), fontsize=10 if len(column) < 30 else 7.5)
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.grid(lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [fig.axes[0].plot([], [], **line_style(i))[0] for i in range(len(runs))]
    fig.legend(handles, list(runs), loc="outside upper center", ncols=min(len(runs), 4), fontsize=9)
    return save(fig, path)
