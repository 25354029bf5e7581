"""Pictures of a classifier's test: curves, confusion, calibration, the cases with the worst errors.

Functions save and return their pictures as those of `utils.report.plots` do. Names of targets and
classes are text from a CSV: they are drawn as they are, never as formulas, and are replaced by a
number where the font lacks one of their letters.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from sklearn import metrics as sk

from utils.metrics.classification import NUM_BINS, bin_of, calibration
from utils.report.page import number
from utils.report.plots import COLORS, INK, draw_middles, figure, line_style, save

UNIT_SQUARE = {"xlim": (-0.02, 1.02), "ylim": (-0.02, 1.02), "aspect": "equal"}
MAX_TEXT = 24  # characters of a name
MAX_CURVES = 14  # classes whose curves are drawn
MAX_CELLS = 12  # up to so many classes, the cells of a confusion matrix hold numbers


class Panel(NamedTuple):
    """A target, on its rows with a label, of which there is at least one."""

    title: str
    classes: Sequence[str]  # empty for numbers
    truth: np.ndarray  # (N,) class indices, or numbers
    outputs: np.ndarray  # (N, K) probabilities, or (N,) numbers
    metrics: dict  # result of `classification_metrics` or `regression_metrics`


def _per_target(draw: Callable) -> Callable:
    """Turn draw(axes, panel) into plot(path, panels), which draws a panel for each target.

    draw returns a second line for the title, or None.
    """

    def plot(path, panels: Sequence[Panel]) -> np.ndarray:
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
            texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label]
            for text in texts + (ax.legend_.get_texts() if ax.legend_ else []):
                text.set_parse_math(False)
        return save(fig, path)

    plot.__name__, plot.__doc__ = draw.__name__, draw.__doc__
    return plot


@_per_target
def plot_roc(ax, panel: Panel) -> str:
    """Draw the ROC curve of the positive class, or of each class against the rest."""
    for positive, score, name, style in _curves(panel):
        fp, tp, _ = sk.roc_curve(positive, score, drop_intermediate=False)
        text = f"AUC {number(sk.roc_auc_score(positive, score))}{_ends(panel, 'auc')}"
        ax.plot(fp, tp, label=f"{text}  {name}", **style)
    ax.plot([0, 1], [0, 1], color=INK, lw=1, ls=":")
    return _finish_curves(ax, panel, "1 - specificity", "sensitivity", "lower right")


@_per_target
def plot_precision_recall(ax, panel: Panel) -> str:
    """Draw precision over recall; the dotted line is the share of the class, as guessing gives."""
    for positive, score, name, style in _curves(panel):
        precision, recall, _ = sk.precision_recall_curve(positive, score)
        area = sk.average_precision_score(positive, score)
        text = f"AP {number(area)}{_ends(panel, 'average_precision')}"
        # steps, because average precision is the area below steps
        ax.step(recall, precision, where="post", label=f"{text}  {name}", **style)
        ax.axhline(positive.mean(), color=style["color"], lw=1, ls=":")
    return _finish_curves(ax, panel, "recall (sensitivity)", "precision", "lower left")


@_per_target
def plot_confusion(ax, panel: Panel) -> None:
    """Draw the number of rows by true and predicted class; the colour is the share of the row."""
    counts = np.array(panel.metrics["confusion"])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = drawable(panel.classes, "class")
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(names)), names, rotation=0 if len("".join(names)) < 24 else 90)
    ax.set(xlabel="predicted", ylabel="truth")
    for (i, j), n in np.ndenumerate(counts) if len(names) <= MAX_CELLS else ():
        text = f"{n}\n{share[i, j]:.0%}" if counts[i].any() and len(names) < 7 else str(n)
        color = "white" if share[i, j] > 0.5 else "black"
        ax.text(j, i, text, ha="center", va="center", color=color, fontsize=8)


@_per_target
def plot_calibration(ax, panel: Panel) -> str:
    """Draw the fraction that is right over confidence, in the bins of the calibration error."""
    confidence, right = calibration(panel.truth, panel.outputs)
    bins = bin_of(confidence)
    ax.plot([0, 1], [0, 1], color=INK, lw=1, ls=":")
    for b in np.unique(bins):
        inside = bins == b
        x, y, n = confidence[inside].mean(), right[inside].mean(), inside.sum()
        ax.plot([x, x], [x, y], color=COLORS[1], lw=1.5)
        size = 20 + 180 * n / np.bincount(bins).max()
        ax.scatter(x, y, s=size, color=COLORS[0], alpha=0.75, zorder=3, clip_on=False)
        ax.annotate(str(n), (x, y), fontsize=7, ha="center", va="center", zorder=4)
    ax.set_xticks(np.linspace(0, 1, NUM_BINS + 1), minor=True)
    ax.grid(axis="x", which="minor", lw=0.6)
    if len(panel.classes) == 2:
        name = drawable(panel.classes, "class")[-1]
        ax.set(xlabel=f"probability of {name}", ylabel=f"fraction of {name}", **UNIT_SQUARE)
    else:
        ax.set(xlabel="probability of the predicted class", ylabel="fraction right", **UNIT_SQUARE)
    error = panel.metrics["calibration_error"]
    return f"calibration error {number(error)}{_ends(panel, 'calibration_error')}"


@_per_target
def plot_numbers(ax, panel: Panel) -> str:
    """Draw predicted over true numbers; on the dotted line they are the same."""
    both = np.concatenate([panel.truth, panel.outputs])
    ends = [both.min(), both.max()]
    ax.plot(ends, ends, color=INK, lw=1, ls=":")
    ax.scatter(panel.truth, panel.outputs, s=14, color=COLORS[0], alpha=0.6)
    ax.set(xlabel="truth", ylabel="predicted", aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    return f"mean absolute error {number(panel.metrics['mae'])}{_ends(panel, 'mae')}"


def plot_cases(path, volumes: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Draw the middle slices of a few cases in three planes, with a column for each case.

    volumes: (X, Y, Z), values in 0..1. captions: a few lines above each; no names of patients.
    """
    side = 1.75  # inches
    top = 0.1 + 0.16 * max(text.count("\n") + 1 for text in captions)
    width, height = side * len(volumes) + 0.4, 3 * side + top
    fig = figure(width, height)
    edges = {"left": 0.3 / width, "bottom": 0.01, "top": 1 - top / height}
    columns = [(text, [volume]) for text, volume in zip(captions, volumes, strict=True)]
    draw_middles(fig, columns, [""], edges, title_size=7.5)
    return save(fig, path)


def drawable(names: Sequence[str], word: str) -> list[str]:
    """Return names as a picture can show them: on one line, short, and all different.

    If the font lacks a letter of any name, or if two shortened names are equal, all names become
    `word` and a number that counts from 1.
    """
    short = ["".join(c if c.isprintable() else "·" for c in name) for name in names]
    short = [name if len(name) <= MAX_TEXT else name[: MAX_TEXT - 1] + "…" for name in short]
    if len(set(short)) < len(names) or not all(_font_has(c) for c in "".join(short)):
        return [f"{word} {i + 1}" for i in range(len(names))]
    return short


def writable(text: str) -> str:
    """Return a short text in which a dot stands for what a picture cannot show."""
    text = "".join(c if c.isprintable() and _font_has(c) else "·" for c in text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


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
            yield positive, panel.outputs[:, c], names[c], line_style(i)


def _finish_curves(ax, panel: Panel, x_label: str, y_label: str, legend: str) -> str:
    """Draw axes and legend; return the second line of the title, which says what is left out."""
    if any(not line.get_label().startswith("_") for line in ax.lines):
        ax.legend(fontsize=7, loc=legend, framealpha=0.8)
    else:
        what = "undefined: all rows are of one class"
        ax.text(0.5, 0.5, what, ha="center", va="center", fontsize=8)
    ax.set(**UNIT_SQUARE, xlabel=x_label, ylabel=y_label)
    k = len(panel.classes)
    return f"the first {MAX_CURVES} of {k} classes" if k > MAX_CURVES else ""


def _ends(panel: Panel, metric: str) -> str:
    """The interval of a metric in brackets; empty where the metric is a mean over the curves."""
    ends = panel.metrics.get(f"{metric}_interval")
    if ends is None or (len(panel.classes) > 2 and metric != "calibration_error"):
        return ""
    return f" ({number(ends[0])} to {number(ends[1])})"
