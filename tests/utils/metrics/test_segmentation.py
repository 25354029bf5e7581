"""Overlap, surfaces and volumes: against plain loops, MONAI, and shapes one can measure."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from utils.classes import IGNORE, Classes
from utils.metrics.segmentation import (
    ABSENT,
    FALSE,
    MISSED,
    NOT_LABELLED,
    ONLY_PREDICTED,
    by_class,
    case_dice,
    case_metrics,
    mean_dice,
    predicted_volumes,
    summarize,
)

NAMES = ["one", "two", "three"]
SPACINGS = [(1.0, 1.0, 1.0), (0.5, 0.8, 3.0)]


def blobs(seed, shape=(17, 15, 13), num=3):
    """Connected shapes of all classes, some of them at the border."""
    noise = np.random.default_rng(seed).random((num + 1, *shape))
    return ndimage.gaussian_filter(noise, (0, 2, 2, 2)).argmax(0).astype(np.uint8)


def ball(shape, centre, radius, spacing=(1, 1, 1)):
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * spacing
    return (np.linalg.norm(at - np.multiply(centre, spacing), axis=-1) <= radius).astype(np.uint8)


def brute_force(prediction, truth, spacing, tolerance):
    """(HD95, surface Dice) of two binary masks, by all distances between all surface voxels."""
    points = []
    for mask in (prediction, truth):
        padded, surface = np.pad(mask, 1), []
        for x, y, z in np.argwhere(padded):
            steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
            if not all(padded[x + a, y + b, z + c] for a, b, c in steps):
                surface.append((x, y, z))
        points.append(np.array(surface) * spacing)
    apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    ways = apart.min(1), apart.min(0)
    near = sum((d <= tolerance + 1e-9).sum() for d in ways) / sum(map(len, ways))
    return max(np.percentile(d, 95) for d in ways), near


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_loop_and_monai(seed, spacing):
    prediction, truth, tolerance = blobs(seed), blobs(seed + 10), 1.5
    rows = case_metrics(prediction, truth, spacing, NAMES, tolerance)
    ml = np.prod(spacing) / 1000
    for k, row in enumerate(rows, 1):
        p, t = prediction == k, truth == k
        assert row["class"] == NAMES[k - 1] and row["note"] == ""
        assert np.isclose(row["dice"], 2 * (p & t).sum() / (p.sum() + t.sum()))
        hd95, near = brute_force(p, t, spacing, tolerance)
        assert np.isclose(row["hd95_mm"], hd95) and np.isclose(row["surface_dice"], near)
        assert np.isclose(row["volume_ml"], p.sum() * ml)
        assert np.isclose(row["true_volume_ml"], t.sum() * ml)
        assert np.isclose(row["volume_error_ml"], (p.sum() - t.sum() * 1.0) * ml)
        masks = [torch.from_numpy(m)[None, None] for m in (p, t)]
        same = {"include_background": True, "spacing": spacing}
        monai = compute_hausdorff_distance(*masks, percentile=95, **same)
        assert np.isclose(row["hd95_mm"], float(monai), atol=1e-4)
        monai = compute_surface_dice(*masks, [tolerance], **same)
        assert np.isclose(row["surface_dice"], float(monai), atol=1e-4)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.5)])
def test_balls_in_one_another(spacing):
    """A surface 4 mm outside the other: within half a voxel's diagonal."""
    shape, centre = (61, 61, 61), (30, 30, 30)
    inner, outer = (ball(shape, centre, r, spacing) for r in (20, 24))
    off = np.linalg.norm(spacing) / 2
    (row,) = case_metrics(outer, inner, spacing, ["ball"], 4 - off - 0.5)
    assert abs(row["hd95_mm"] - 4) < off and row["surface_dice"] < 0.05
    (row,) = case_metrics(outer, inner, spacing, ["ball"], 4 + off + 0.5)
    assert row["surface_dice"] == 1
    expected = 4 / 3 * np.pi * (24**3 - 20**3) / 1000
    assert np.isclose(row["volume_error_ml"], expected, rtol=0.05)
    assert np.isclose(row["dice"], 2 * 20**3 / (20**3 + 24**3), rtol=0.02)


def test_shifted_cube():
    """By 3 voxels of 0.8 mm: 2.4 mm, also as a tolerance, whatever the rounding."""
    truth, prediction = np.zeros((2, 30, 20, 20), np.uint8)
    truth[5:15, 5:15, 5:15] = 1
    prediction[8:18, 5:15, 5:15] = 1
    (row,) = case_metrics(prediction, truth, (0.8, 1, 1), ["cube"], 2.4)
    assert np.isclose(row["hd95_mm"], 2.4) and row["surface_dice"] == 1
    assert row["dice"] == pytest.approx(0.7) and row["volume_error_ml"] == 0
    (row,) = case_metrics(prediction, truth, (0.8, 1, 1), ["cube"], 2.39)
    assert row["surface_dice"] < 1
    (row,) = case_metrics(truth, truth, (0.8, 1, 1), ["cube"], 0.1)
    assert (row["dice"], row["hd95_mm"], row["surface_dice"]) == (1, 0, 1)


def test_absent_missed_and_false():
    truth, prediction = np.zeros((2, 10, 10, 10), np.uint8)
    truth[2:4, 2:4, 2:4], prediction[6:8, 6:8, 6:8] = 1, 2
    missed, false, absent = case_metrics(prediction, truth, (1, 1, 2), NAMES, 1.0)
    for row, note in ((missed, MISSED), (false, FALSE)):
        assert (row["dice"], row["surface_dice"], row["hd95_mm"]) == (0, 0, None)
        assert row["note"] == note
    assert (missed["volume_ml"], missed["volume_error_ml"]) == (0, -0.016)
    assert (false["true_volume_ml"], false["volume_error_ml"]) == (0, 0.016)
    assert absent["note"] == ABSENT and absent["volume_ml"] == absent["true_volume_ml"] == 0
    empty = [absent[k] for k in ("dice", "surface_dice", "hd95_mm", "volume_error_ml")]
    assert empty == [None] * 4
    rows = case_metrics(0 * truth, 0 * truth, (1, 1, 1), NAMES, 1.0)
    assert [row["note"] for row in rows] == [ABSENT] * 3 and mean_dice(rows) is None


def test_ignored_voxels_count_nowhere():
    prediction, truth = blobs(0), blobs(1)
    hidden = ball(truth.shape, (8, 7, 6), 4).astype(bool)
    clean = [np.where(hidden, 0, mask) for mask in (prediction, truth)]
    truth = np.where(hidden, IGNORE, truth)
    found = case_metrics(prediction, truth, (1, 1, 1), NAMES, 1.0)
    assert found == case_metrics(*clean, (1, 1, 1), NAMES, 1.0)
    assert case_dice(prediction, truth, NAMES) == case_dice(*clean, NAMES)


def test_memory_order_and_what_is_around_do_not_matter():
    prediction, truth = blobs(2), blobs(3)
    rows = case_metrics(prediction, truth, (1, 2, 3), NAMES, 1.0)
    flipped = [np.asfortranarray(mask)[:, ::-1] for mask in (prediction, truth)]
    assert case_metrics(*flipped, (1, 2, 3), NAMES, 1.0) == rows
    turned = [mask.transpose(2, 0, 1) for mask in (prediction, truth)]
    for one, other in zip(rows, case_metrics(*turned, (3, 1, 2), NAMES, 1.0), strict=True):
        assert one["hd95_mm"] == pytest.approx(other["hd95_mm"])
    padded = [np.pad(mask, ((3, 1), (0, 5), (2, 2))) for mask in (prediction, truth)]
    for one, other in zip(rows, case_metrics(*padded, (1, 2, 3), NAMES, 1.0), strict=True):
        assert one["hd95_mm"] == pytest.approx(other["hd95_mm"])
    with pytest.raises(ValueError, match="differ in shape"):
        case_metrics(prediction, truth[1:], (1, 2, 3), NAMES, 1.0)


def test_fast_dice_is_the_same():
    prediction, truth = blobs(4), blobs(5)
    prediction[prediction == 2], truth[truth == 2] = 0, 0
    rows = case_metrics(prediction, truth, (1, 1, 1), NAMES, 1.0)
    assert [row["dice"] for row in rows] == [
        row["dice"] for row in case_dice(prediction, truth, NAMES)
    ]
    assert rows[1]["dice"] is None


def test_volumes_alone():
    prediction = blobs(6)
    rows = predicted_volumes(prediction, (1, 1, 2), NAMES)
    full = case_metrics(prediction, blobs(7), (1, 1, 2), NAMES, 1.0)
    assert [row.keys() for row in rows] == [row.keys() for row in full]
    assert [row["volume_ml"] for row in rows] == [row["volume_ml"] for row in full]
    assert {row["note"] for row in rows} == {ONLY_PREDICTED} and mean_dice(rows) is None


# ---- over cases


def row(line, name, dice, patient=None, note="", error=0.0):
    numbers = {"dice": dice, "surface_dice": dice, "hd95_mm": None if not dice else 10 * dice}
    about = {"PatientID": patient or f"p{line}", "csv_line": line, "class": name, "note": note}
    return about | numbers | {"volume_error_ml": None if dice is None else error}


def test_means():
    rows = [row(2, "a", 0.8, error=-1), row(3, "a", 0.6, error=3), row(4, "a", 0.0, note=MISSED)]
    rows += [row(2, "b", 0.5), row(3, "b", None, note=ABSENT), row(4, "b", None, note=ABSENT)]
    rows += [row(2, "c", None, note=ABSENT), row(9, "a", None, note=ONLY_PREDICTED)]
    found = summarize(rows)
    assert (found["cases"], found["patients"], found["predicted_only"]) == (3, 3, 1)
    a, b, c = (found["classes"][name] for name in "abc")
    assert a["dice"]["mean"] == pytest.approx(1.4 / 3) and a["dice"]["counted"] == 3
    assert a["hd95_mm"]["mean"] == pytest.approx(7) and a["hd95_mm"]["counted"] == 2
    assert a["volume_error_ml"]["mean"] == pytest.approx(2 / 3)
    assert a["abs_volume_error_ml"]["mean"] == pytest.approx(4 / 3)
    assert (a["missed"], a["false"], a["absent"], b["absent"]) == (1, 0, 0, 2)
    assert b["dice"]["mean"] == 0.5 and b["dice"]["counted"] == 1
    assert c["dice"] == {"mean": None, "interval": None, "counted": 0}
    # the mean over classes, not over rows
    assert found["overall"]["dice"]["mean"] == pytest.approx((1.4 / 3 + 0.5) / 2)
    assert found["overall"]["dice"]["mean"] == pytest.approx(mean_dice(rows))
    assert found["overall"]["dice"]["counted"] == 2


def test_intervals_are_those_of_resampled_patients():
    """As a plain bootstrap finds them, rows of a patient drawn together."""
    rng = np.random.default_rng(0)
    lines, patients = range(40), [f"p{i // 2}" for i in range(40)]
    base = {p: rng.normal(0.7, 0.1) for p in patients}
    values = {n: [base[p] + rng.normal(0, 0.01) for p in patients] for n in "ab"}
    rows = [row(i, n, values[n][i], patients[i]) for i in lines for n in "ab"]
    found = summarize(rows)
    means = {"a": [], "b": []}
    for _ in range(4000):
        drawn = rng.integers(0, 20, 20)
        again = [i for p in drawn for i in (2 * p, 2 * p + 1)]
        for name, kept in means.items():
            kept.append(np.mean([values[name][i] for i in again]))
    for name in "ab":
        expected = np.percentile(means[name], [2.5, 97.5])
        assert np.allclose(found["classes"][name]["dice"]["interval"], expected, atol=0.006)
    both = np.mean([means["a"], means["b"]], axis=0)
    interval = found["overall"]["dice"]["interval"]
    assert np.allclose(interval, np.percentile(both, [2.5, 97.5]), atol=0.006)
    assert interval[1] - interval[0] > 0.06  # 40 cases would make it narrower than 20 patients
    assert summarize(rows) == found
    assert summarize(rows, num=0)["overall"]["dice"]["interval"] is None


def test_one_patient_and_none():
    one = summarize([row(2, "a", 0.5, "p"), row(3, "a", 0.7, "p")])
    assert one["overall"]["dice"] == {"mean": pytest.approx(0.6), "interval": None, "counted": 1}
    none = summarize([row(2, "a", None, note=ONLY_PREDICTED)])
    assert none["cases"] == 0 and none["predicted_only"] == 1 and none["classes"] == {}
    assert none["overall"]["dice"] == {"mean": None, "interval": None, "counted": 0}


def test_classes_that_are_not_labelled_keep_their_predicted_volume_alone():
    classes = Classes.from_config({"a": 1, "b": 2})
    prediction, truth = np.zeros((2, 4, 4, 4), np.uint8)
    prediction[:2], prediction[3], truth[:1] = 1, 2, 1

    def measure(found, true, names):
        return case_metrics(found, true, (10, 10, 10), names, 1.0)

    a, b = by_class(measure, prediction, truth, classes, ("a",))
    assert a == by_class(measure, prediction, truth, classes)[0] and a["dice"] == 2 / 3
    assert (b["dice"], b["volume_ml"], b["note"]) == (None, 16, NOT_LABELLED)
    assert mean_dice(by_class(case_dice, prediction, truth, classes, ("a",))) == 2 / 3


def test_regions_are_measured_one_by_one():
    classes = Classes.from_config({"whole": [1, 2], "core": 2})
    prediction, truth = np.zeros((2, 4, 4, 4), np.uint8)
    prediction[:2], truth[:2], truth[0] = 1, 1, 2  # in a row: rest, core
    assert [row["dice"] for row in by_class(case_dice, prediction, truth, classes)] == [1, 0]
