import json
import time
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from utils.metrics.bootstrap import percentiles, resamples
from utils.metrics.classification import (
    BINARY_NAMES,
    NAMES,
    above_control,
    classification_metrics,
    regression_metrics,
    resampled_errors,
    resampled_metrics,
)


def drawn(num_classes, rows=60, seed=0, ties=True):
    """Truth, probabilities with many ties, patients of two rows."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, rows)
    p = rng.dirichlet(np.ones(num_classes), rows) + 0.4 * np.eye(num_classes)[truth]
    p = np.round(p, 1) + 0.01 if ties else p
    return truth, p / p.sum(axis=1, keepdims=True), [f"p{i // 2}" for i in range(rows)]


def by_sklearn(truth, p):
    """The metrics once more, as scikit-learn's users call it."""
    k, found = p.shape[1], p.argmax(axis=1)
    if k == 2:
        score, average = p[:, 1], {}
        auc, precision = sk.roc_auc_score(truth, score), sk.average_precision_score(truth, score)
    else:
        average = {"average": "macro"}
        auc = sk.roc_auc_score(truth, p, multi_class="ovr")
        precision = sk.average_precision_score(np.eye(k)[truth], p)
    values = {
        "auc": auc,
        "average_precision": precision,
        "accuracy": sk.accuracy_score(truth, found),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, found),
        "f1": sk.f1_score(truth, found, **average),
        "calibration_error": plain_calibration_error(truth, p),
    }
    if k == 2:
        (tn, fp), (fn, tp) = sk.confusion_matrix(truth, found)
        values |= {"sensitivity": tp / (tp + fn), "specificity": tn / (tn + fp)}
    return values


def plain_calibration_error(truth, p):
    """Guo et al. 2017, equation 5, bin by bin."""
    if p.shape[1] == 2:
        confidence, right = p[:, 1], [t == 1 for t in truth]
    else:
        confidence, right = (
            p.max(axis=1),
            [t == row.argmax() for t, row in zip(truth, p, strict=True)],
        )
    error = 0.0
    for low in range(10):
        members = [i for i, c in enumerate(confidence) if low <= c * 10 < low + 1 + (low == 9)]
        if members:
            gap = np.mean([confidence[i] for i in members]) - np.mean([right[i] for i in members])
            error += len(members) / len(truth) * abs(gap)
    return error


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_values_are_those_of_scikit_learn(num_classes):
    truth, p, patients = drawn(num_classes)
    found = classification_metrics(truth, p, patients, list("abcde")[:num_classes], num=0)
    expected = by_sklearn(truth, p)
    assert expected.keys() == set(BINARY_NAMES if num_classes == 2 else NAMES)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert found["confusion"] == sk.confusion_matrix(truth, p.argmax(axis=1)).tolist()
    assert found["reasons"] == {} and found["n"] == 60 and found["patients"] == 30


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("ties", [True, False])
def test_resamples_are_those_of_scikit_learn(num_classes, ties):
    truth, p, patients = drawn(num_classes, ties=ties)
    fast = resampled_metrics(truth, p, patients, 50, seed=3)
    for i, times in enumerate(resamples(patients, 50, seed=3)):
        rows = np.repeat(np.arange(60), times)
        for name, value in by_sklearn(truth[rows], p[rows]).items():
            assert fast[name][i] == pytest.approx(value), name


def test_intervals_are_those_of_rows_that_are_repeated():
    truth, p, patients = drawn(2)
    found = classification_metrics(truth, p, patients, ["a", "b"], num=100, seed=1)
    rows = [np.repeat(np.arange(len(truth)), times) for times in resamples(patients, 100, seed=1)]
    values = [by_sklearn(truth[r], p[r]) for r in rows]
    for name in ("auc", "f1"):
        low, high = percentiles(np.array([value[name] for value in values], float))
        assert found[f"{name}_interval"] == pytest.approx([low, high])
        assert low < found[name] < high


def test_numbers_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.normal(70, 10, 40)
    values, patients = truth + rng.normal(0, 5, 40), [f"p{i // 2}" for i in range(40)]
    found = regression_metrics(truth, values, patients)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truth, values))
    assert found["r2"] == pytest.approx(sk.r2_score(truth, values))
    fast = resampled_errors(truth, values, patients, 50, seed=0)
    for i, times in enumerate(resamples(patients, 50, seed=0)):
        rows = np.repeat(np.arange(40), times)
        assert fast["mae"][i] == pytest.approx(sk.mean_absolute_error(truth[rows], values[rows]))
        assert fast["r2"][i] == pytest.approx(sk.r2_score(truth[rows], values[rows]))
    assert found["r2_interval"][0] < found["r2"] < found["r2_interval"][1]


def test_rows_without_a_label_change_nothing():
    truth, p, patients = drawn(3)
    extra = np.r_[truth, [-1] * 5], np.r_[p, p[:5]], patients + ["q"] * 5
    assert classification_metrics(*extra, "abc") == classification_metrics(
        truth, p, patients, "abc"
    )
    numbers = p[:, 0], p[:, 1], patients
    extra = np.r_[p[:, 0], [np.nan] * 5], np.r_[p[:, 1], np.ones(5)], patients + ["q"] * 5
    assert regression_metrics(*extra) == regression_metrics(*numbers)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("rows", [1, 5])
def test_one_class_only(num_classes, only, rows):
    p = np.random.default_rng(0).dirichlet(np.ones(num_classes), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification_metrics([only] * rows, p, range(rows), list("abc")[:num_classes])
    undefined = {"auc", "average_precision", "balanced_accuracy"}
    if num_classes == 2:
        undefined |= {"specificity"} if only else {"sensitivity", "f1"}
    names = set(BINARY_NAMES if num_classes == 2 else NAMES)
    assert {name for name in names if found[name] is None} == undefined
    assert all(repr("abc"[only]) in found["reasons"][name] for name in undefined)
    assert found["accuracy"] == pytest.approx((p.argmax(axis=1) == only).mean())
    assert (found["accuracy_interval"] is None) == (rows == 1)
    json.dumps(found, allow_nan=False)


def test_no_label_at_all_and_no_row_at_all():
    p = np.full((3, 2), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for truth, rows in (([-1] * 3, 3), ([], 0)):
            found = classification_metrics(np.array(truth, int), p[:rows], ["a"] * rows, "xy")
            assert all(found[name] is None for name in BINARY_NAMES) and found["n"] == 0
            assert set(found["reasons"].values()) == {"no row has a label"}
        found = regression_metrics(np.full(3, np.nan), np.ones(3), ["a"] * 3)
    assert found["mae"] is None and found["r2"] is None and found["mae_interval"] is None
    json.dumps(found, allow_nan=False)


def test_an_absent_class_is_left_out_of_the_means_and_said():
    truth, p, patients = drawn(3)
    truth[truth == 2] = 0
    found = classification_metrics(truth, p, patients, ["a", "b", "c"])
    areas = [sk.roc_auc_score(truth == c, p[:, c]) for c in (0, 1)]
    assert found["auc"] == pytest.approx(np.mean(areas))
    assert found["balanced_accuracy"] == pytest.approx(
        sk.recall_score(truth, p.argmax(axis=1), labels=[0, 1], average="macro")
    )
    assert "absent: 'c'" in found["reasons"]["f1"]
    for name in NAMES:
        assert found[f"{name}_interval"] is not None


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_resample_that_lacks_a_class_is_undefined(num_classes):
    truth, p, patients = (
        np.array([0, 0, 1, 1, 2, 2])[: 2 * num_classes],
        np.eye(num_classes),
        "abcdef",
    )
    p, patients = p[[0, 1, 1, 1, 0, 2][: len(truth)]], patients[: len(truth)]
    fast = resampled_metrics(truth, p, patients, 100, seed=0)
    drawn_classes = resamples(patients, 100, seed=0).reshape(100, num_classes, 2).any(axis=2)
    lacking = ~drawn_classes.all(axis=1)
    assert lacking.any() and not lacking.all()
    for name in ("auc", "average_precision", "balanced_accuracy"):
        assert (np.isnan(fast[name]) == lacking).all()
    if num_classes == 2:
        assert (np.isnan(fast["specificity"]) == ~drawn_classes[:, 0]).all()
        assert (np.isnan(fast["sensitivity"]) == ~drawn_classes[:, 1]).all()
        assert (np.isnan(fast["f1"]) == ~drawn_classes[:, 1]).all()
    else:
        assert (np.isnan(fast["f1"]) == lacking).all()
    assert not np.isnan([fast["accuracy"], fast["calibration_error"]]).any()


def test_a_class_with_one_patient_gives_no_interval_but_the_reason():
    truth, p, patients = drawn(2, rows=40)
    truth[:] = 0
    truth[7] = 1
    found = classification_metrics(truth, p, patients, ["a", "b"])
    assert found["auc"] is not None and found["auc_interval"] is None
    assert "of the resamples" in found["reasons"]["auc_interval"]
    assert found["accuracy_interval"] is not None
    one = classification_metrics([0, 1], p[:2], ["same", "same"], ["a", "b"])
    assert one["auc"] is not None and one["auc_interval"] is None
    assert one["reasons"]["auc_interval"] == "all rows are of one patient"


def test_numbers_that_are_all_the_same():
    found = regression_metrics(np.ones(4), np.arange(4.0), range(4))
    assert found["r2"] is None and "is the same" in found["reasons"]["r2"]
    assert found["mae"] == pytest.approx(1.0)
    few = regression_metrics(np.array([0.1, 0.1, 0.3]), np.zeros(3), "abc")
    assert few["r2"] is not None and few["r2_interval"] is None  # 11 % of resamples are constant


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        classification_metrics([0], np.array([[np.nan, 1]]), "a", "xy")
    with pytest.raises(ValueError, match="not finite"):
        regression_metrics([0.0], [np.inf], "a")


def test_above_control_is_paired():
    truth, p, patients = drawn(2)
    same = above_control(truth, p, p, patients)
    assert same == {"auc": 0.0, "auc_interval": [0.0, 0.0]}
    control = np.random.default_rng(1).dirichlet([1, 1], 60)
    found = above_control(
        np.r_[truth, -1], np.r_[p, p[:1]], np.r_[control, p[:1]], [*patients, "q"]
    )
    both = [classification_metrics(truth, x, patients, "ab", num=0)["auc"] for x in (p, control)]
    assert found["auc"] == pytest.approx(both[0] - both[1])
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
    assert above_control(np.zeros(3, int), p[:3], p[:3], "abc") == {
        "auc": None,
        "auc_interval": None,
    }
    numbers = above_control(np.arange(4.0), np.arange(4.0), np.arange(4.0) + 1, "abcd")
    assert numbers == {"mae": -1.0, "mae_interval": [-1.0, -1.0]}


def test_same_seed_same_intervals_and_quick():
    truth, p, patients = drawn(3, rows=500)
    start = time.perf_counter()
    one = classification_metrics(truth, p, patients, "abc", seed=5)
    assert time.perf_counter() - start < 2  # 0.1 s on a quiet machine
    assert one == classification_metrics(truth, p, patients, "abc", seed=5)
    assert one != classification_metrics(truth, p, patients, "abc", seed=6)
