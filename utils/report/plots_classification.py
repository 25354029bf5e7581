"""Pictures of a classifier's test: curves, confusion, calibration, the cases it was wrong about.

Each function saves a PNG, mostly a panel for each target, and returns its pixels, (H, W, 3) uint8.
Names of targets and classes are text from a CSV: they are drawn as they are, never as formulas, and
as a number where the font lacks their letters.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from sklearn import metrics as sk

from utils.metrics.classification import NUM_BINS, bin_of, calibration
from utils.report.plots import COLORS, LINES, PLANES, bare, figure, letters, save, slice_2d

MAX_TEXT = 24  # letters of a name
MAX_CURVES = 14  # classes with a curve of their own
MAX_CELLS = 12  # classes up to which the cells of a confusion matrix hold numbers


class Panel(NamedTuple):
    """A target on the rows that have a label, at least one.

    truth: (N,) index of the class, or number; outputs: (N, K) probabilities, or (N,) numbers;
    metrics: of `utils.metrics.classification`.
    """

    title: str
    classes: Sequence[str]  # empty for numbers
    truth: np.ndarray
    outputs: np.ndarray
    metrics: dict


def plot_roc(path, panels: Sequence[Panel]) -> np.ndarray:
    """ROC curves of the positive class, or of each class against the rest."""

    def draw(ax, panel):
        for positive, score, name, style in _curves(panel):
            fp, tp, _ = sk.roc_curve(positive, score, drop_intermediate=False)
            text = f"AUC {sk.roc_auc_score(positive, score):.2f}{_ends(panel, 'auc')}"
            ax.plot(fp, tp, label=f"{text}  {name}", **style)
        ax.plot([0, 1], [0, 1], color="black", lw=1, ls=":")
        _unit_square(ax, "1 - specificity", "sensitivity", "lower right")
        return _cut(panel)

    return _draw_panels(path, panels, draw)


def plot_precision_recall(path, panels: Sequence[Panel]) -> np.ndarray:
    """Precision over recall; the dotted line is the share of the class, what guessing gives."""

    def draw(ax, panel):
        for positive, score, name, style in _curves(panel):
            precision, recall, _ = sk.precision_recall_curve(positive, score)
            area = sk.average_precision_score(positive, score)
            text = f"AP {area:.2f}{_ends(panel, 'average_precision')}"
            # steps, as average precision adds them up
            ax.step(recall, precision, where="post", label=f"{text}  {name}", **style)
            ax.axhline(positive.mean(), color=style["color"], lw=1, ls=":")
        _unit_square(ax, "recall (sensitivity)", "precision", "lower left")
        return _cut(panel)

    return _draw_panels(path, panels, draw)


def plot_confusion(path, panels: Sequence[Panel]) -> np.ndarray:
    """Rows of each class by the class that was predicted; colour: share of the row."""

    def draw(ax, panel):
        counts = np.array(panel.metrics["confusion"])
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        names = drawable(panel.classes, "class")
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(len(names)), names, rotation=0 if len("".join(names)) < 24 else 90)
        ax.set_xlabel("predicted")
        ax.set_ylabel("truth")
        for (i, j), n in np.ndenumerate(counts) if len(names) <= MAX_CELLS else ():
            text = f"{n}\n{share[i, j]:.0%}" if counts[i].any() and len(names) < 7 else str(n)
            color = "white" if share[i, j] > 0.5 else "black"
            ax.text(j, i, text, ha="center", va="center", color=color, fontsize=8)

    return _draw_panels(path, panels, draw)


def plot_calibration(path, panels: Sequence[Panel]) -> np.ndarray:
    """Fraction that is right over confidence, in the bins of the calibration error."""

    def draw(ax, panel):
        confidence, right = calibration(panel.truth, panel.outputs)
        bins, largest = bin_of(confidence), np.bincount(bin_of(confidence)).max()
        ax.plot([0, 1], [0, 1], color="black", lw=1, ls=":")
        for b in range(NUM_BINS):
            inside = bins == b
            if inside.any():
                x, y, n = confidence[inside].mean(), right[inside].mean(), inside.sum()
                ax.plot([x, x], [x, y], color=COLORS[1], lw=1.5)
                ax.scatter(
                    x,
                    y,
                    s=20 + 180 * n / largest,
                    color=COLORS[0],
                    alpha=0.75,
                    zorder=3,
                    clip_on=False,
                )
                ax.annotate(str(n), (x, y), fontsize=7, ha="center", va="center", zorder=4)
        ax.set_xticks(np.linspace(0, 1, NUM_BINS + 1), minor=True)
        ax.grid(axis="x", which="minor", color="#eeeeee", lw=0.6)
        two = len(panel.classes) == 2
        name = drawable(panel.classes, "class")[-1]
        x, y = (
            (f"probability of {name}", f"fraction of {name}")
            if two
            else ("probability of the predicted class", "fraction right")
        )
        _unit_square(ax, x, y)
        error = panel.metrics["calibration_error"]
        return f"calibration error {error:.2f}{_ends(panel, 'calibration_error')}"

    return _draw_panels(path, panels, draw)


def plot_numbers(path, panels: Sequence[Panel]) -> np.ndarray:
    """Predicted numbers over true ones; the dotted line is where both are the same."""

    def draw(ax, panel):
        both = np.concatenate([panel.truth, panel.outputs])
        low, high = both.min(), both.max()
        ax.plot([low, high], [low, high], color="black", lw=1, ls=":")
        ax.scatter(panel.truth, panel.outputs, s=14, color=COLORS[0], alpha=0.6)
        ax.set_xlabel("truth")
        ax.set_ylabel("predicted")
        ax.set_aspect("equal")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        return f"mean absolute error {panel.metrics['mae']:.3g}{_ends(panel, 'mae')}"

    return _draw_panels(path, panels, draw)


def plot_cases(path, volumes: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Middle slices of a few cases in three planes, a column each.

    volumes: (X, Y, Z), values in 0..1. captions: a few lines above each; no names of patients.
    """
    side, columns = 1.75, len(volumes)
    top = 0.1 + 0.16 * max(text.count("\n") + 1 for text in captions)
    width, height = side * columns + 0.4, 3 * side + top
    fig = figure(width, height)
    grid = fig.add_gridspec(
        3, columns, left=0.3 / width, right=0.995, bottom=0.01, top=1 - top / height
    )
    grid.update(wspace=0.04, hspace=0.04)
    for column, (volume, caption) in enumerate(zip(volumes, captions, strict=True)):
        for row, plane in enumerate(PLANES):
            ax = fig.add_subplot(grid[row, column])
            middle = volume.shape[PLANES[plane][0]] // 2
            ax.imshow(slice_2d(volume, plane, middle), cmap="gray", vmin=0, vmax=1)
            bare(ax)
            if row == 0:
                ax.set_title(caption, fontsize=7.5, parse_math=False)
            if column == 0:
                ax.set_ylabel(plane, fontsize=8)
                letters(ax, PLANES[plane][1])
    return save(fig, path)


def drawable(names: Sequence[str], word: str) -> list[str]:
    """Names as a picture can show them: on one line, short, and all different.

    Where the font lacks a letter of any of them, or they are no longer different, `word` and their
    number, counted from 1.
    """
    short = ["".join(c if c.isprintable() else "·" for c in name) for name in names]
    short = [name if len(name) <= MAX_TEXT else name[: MAX_TEXT - 1] + "…" for name in short]
    if len(set(short)) < len(names) or not all(_font_has(c) for c in "".join(short)):
        return [f"{word} {i + 1}" for i in range(len(names))]
    return short


@cache
def _font_has(letter: str) -> bool:
    return get_font(findfont(FontProperties())).get_char_index(ord(letter)) != 0


def _curves(panel: Panel) -> Iterator[tuple[np.ndarray, np.ndarray, str, dict]]:
    """(is positive, score, name, style) of each curve that is defined."""
    names = drawable(panel.classes, "class")
    shown = [1] if len(names) == 2 else range(min(len(names), MAX_CURVES))
    for i, c in enumerate(shown):
        positive = panel.truth == c
        if 0 < positive.sum() < len(positive):
            style = {"color": COLORS[i % len(COLORS)], "ls": LINES[i // len(COLORS)], "lw": 1.5}
            yield positive, panel.outputs[:, c], names[c], style


def _cut(panel: Panel) -> str:
    k = len(panel.classes)
    return f"the first {MAX_CURVES} of {k} classes" if k > MAX_CURVES else ""


def _ends(panel: Panel, metric: str) -> str:
    """The interval of a metric in brackets, where it is that of the one curve."""
    ends = panel.metrics.get(f"{metric}_interval")
    if ends is None or (len(panel.classes) > 2 and metric != "calibration_error"):
        return ""
    form = ".2f" if panel.classes else ".3g"
    return f" ({ends[0]:{form}} to {ends[1]:{form}})"


def _draw_panels(path, panels: Sequence[Panel], draw: Callable) -> np.ndarray:
    """draw(axes, panel) may return a second line for the title."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig = figure(4.3 * columns, 4.2 * rows, layout="constrained")
    titles = drawable([panel.title for panel in panels], "target")
    for i, panel in enumerate(panels):
        ax = fig.add_subplot(rows, columns, i + 1)
        below, n = draw(ax, panel), panel.metrics["n"]
        title = f"{titles[i]}  ({n} row{'s' * (n != 1)})" + (f"\n{below}" if below else "")
        ax.set_title(title, fontsize=10, parse_math=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        for text in (*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label):
            text.set_parse_math(False)
        for text in ax.legend_.get_texts() if ax.legend_ else ():
            text.set_parse_math(False)
    return save(fig, path)


def _unit_square(ax, x_label: str, y_label: str, legend: str | None = None) -> None:
    """Axes from 0 to 1, with a legend of the curves at that place, if there are any."""
    if any(not line.get_label().startswith("_") for line in ax.lines):
        ax.legend(fontsize=7, loc=legend, framealpha=0.8)
    elif legend:
        what = "undefined: all rows are of one class"
        ax.text(0.5, 0.5, what, ha="center", va="center", fontsize=8, backgroundcolor="white")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=x_label, ylabel=y_label)
