"""Overlays and score plots: outlines lie where the masks are, nothing odd breaks them."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tests.utils.report.pictures import on_white
from utils.classes import IGNORE
from utils.report.plots import PLANES, color_of
from utils.report.plots_segmentation import plot_overlay, plot_scores

SPACING = (1.0, 1.0, 2.0)


def scene(shape=(40, 44, 20)):
    """An image, and a mask with class 1 at the patient's right front, low down."""
    image = np.random.default_rng(0).normal(100, 5, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[28:36, 30:40, 3:7] = 1  # in RAS+ the last index is right, front, head
    return image, mask


def pixels_of(picture, color):
    """How many pixels have about a colour."""
    return int((np.abs(picture / 255.0 - to_rgb(color)).max(-1) < 0.1).sum())


def test_saved_as_returned(tmp_path):
    image, mask = scene()
    rgb = plot_overlay(tmp_path / "a.png", image, mask, mask, SPACING, ["one"], "line 2")
    assert rgb.dtype == np.uint8 and np.array_equal(on_white(tmp_path / "a.png"), rgb)


def test_slices_are_those_of_the_truth(tmp_path, monkeypatch):
    """A wrong prediction at the rim does not draw the eye away from the organ."""
    from utils.report import plots_segmentation

    titles = []
    real = plots_segmentation.slice_2d
    monkeypatch.setattr(plots_segmentation, "slice_2d", lambda *a: titles.append(a[1:]) or real(*a))
    image, truth = scene()
    prediction = np.zeros_like(truth)
    prediction[0], prediction[:, 0], prediction[:, :, 0] = 1, 1, 1
    for found, expected in ((truth, truth), (0 * truth, prediction)):
        titles.clear()
        plot_overlay(tmp_path / "a.png", image, prediction, found, SPACING, ["one"], "line 2")
        for plane, at in set(titles):
            axis = PLANES[plane][0]
            counts = (expected > 0).sum(axis=tuple({0, 1, 2} - {axis}))
            assert counts[at] == counts.max()


def test_slices_are_those_with_most_and_outlines_are_there(tmp_path, monkeypatch):
    """The contours drawn on the axial slice are around the mask, right on the picture's left."""
    from utils.report import plots_segmentation

    drawn = []
    monkeypatch.setattr(plots_segmentation, "MARGIN_MM", 1000.0)  # the whole volume is shown
    real = plots_segmentation._outline
    monkeypatch.setattr(
        plots_segmentation, "_outline", lambda ax, m, *a: drawn.append((ax, m)) or real(ax, m, *a)
    )
    image, mask = scene()
    mask[30, 32, 3:7] = 0  # the slice below has more
    plot_overlay(tmp_path / "a.png", image, mask, None, SPACING, ["one"], "line 2")
    (axial, flat), (_, coronal), (_, sagittal) = drawn
    assert flat.shape == (44, 40)
    rows, columns = np.nonzero(flat)
    assert (rows.min(), rows.max()) == (44 - 40, 44 - 31)  # front is up
    assert (columns.min(), columns.max()) == (40 - 36, 40 - 29)  # right is on the left
    (lines,) = axial.collections
    vertices = np.concatenate([p.vertices for p in lines.get_paths()])
    assert np.allclose(vertices.min(0), (columns.min() - 0.5, rows.min() - 0.5))
    assert np.allclose(vertices.max(0), (columns.max() + 0.5, rows.max() + 0.5))
    # pictures are to scale: a millimetre is as long in every plane and direction
    for ax, m in drawn:
        width, height = ax.get_window_extent().size
        axis = [a.shape for _, a in drawn].index(m.shape)
        mm = [(40, 44), (40, 40), (44, 40)][axis]
        assert width / height == pytest.approx(mm[0] / mm[1], rel=1e-3)
    assert coronal.shape == (20, 40) and sagittal.shape == (20, 44)


def test_truth_and_prediction_are_outlined(tmp_path):
    image, truth = scene()
    prediction = np.roll(truth, -8, axis=0)
    names = ["one", "two", "three"]
    both = plot_overlay(tmp_path / "a.png", image, prediction, truth, SPACING, names, "x")
    alone = plot_overlay(tmp_path / "b.png", image, prediction, None, SPACING, names, "x")
    assert both.shape[0] > 1.5 * alone.shape[0]
    parts = (image, 3 * prediction, 2 * truth, SPACING, names, "x")
    other = plot_overlay(tmp_path / "c.png", *parts)
    legend, half = int(other.shape[1] * 0.83), len(other) // 2  # truth above, prediction below
    above, below = other[:half, :legend], other[half:, :legend]
    assert pixels_of(above, color_of(2)) > 20 and pixels_of(below, color_of(2)) == 0
    assert pixels_of(below, color_of(3)) > 20 and pixels_of(above, color_of(3)) == 0
    for k in (2, 3):
        assert pixels_of(other[:, legend:], color_of(k)) > 20


@pytest.mark.parametrize("shape", [(40, 44, 1), (3, 3, 3), (1, 30, 30), (200, 20, 20)])
@pytest.mark.parametrize("content", ["nothing", "everything", "ignored", "one voxel"])
def test_odd_cases(tmp_path, shape, content):
    image = np.zeros(shape, np.int16)
    mask = np.zeros(shape, np.uint8)
    if content in ("everything", "ignored"):
        mask[:] = 1 if content == "everything" else IGNORE
    elif content == "one voxel":
        mask[tuple(n // 2 for n in shape)] = 1
    truth = None if content == "everything" else mask
    rgb = plot_overlay(tmp_path / "a.png", image, mask % 255, truth, SPACING, ["one"], "x")
    assert rgb.ndim == 3 and max(rgb.shape) < 2500


def test_many_classes(tmp_path):
    image = np.random.default_rng(0).normal(0, 1, (60, 60, 12))
    blocks = np.arange(100).reshape(10, 10).repeat(6, 0).repeat(6, 1)
    mask = np.stack([blocks] * 12, -1).astype(np.uint8)
    names = [f"class with a long name, number {k}" for k in range(1, 100)]
    title = "line 2: " + ", ".join(names[:20])
    rgb = plot_overlay(tmp_path / "a.png", image, mask, mask, SPACING, names, title)
    assert max(rgb.shape) < 2500
    colors = np.array([to_rgb(color_of(k)) for k in range(1, 42)])
    apart = np.abs(colors[:, None] - colors[None]).max(-1)
    assert apart[np.triu_indices(41, 1)].min() > 0.04


def test_scores(tmp_path):
    rows = [{"class": "a", "dice": d} for d in (0.9, 0.8, None)] + [{"class": "b", "dice": None}]
    assert plot_scores(tmp_path / "a.png", rows, ["a", "b"], "dice", "Dice").ndim == 3
    assert plot_scores(tmp_path / "b.png", rows[2:], ["a", "b"], "dice", "Dice") is None
    assert not (tmp_path / "b.png").exists()
