import json

import numpy as np
import pytest

from data.cases import Case
from data.prepare.targets import Targets
from utils.metrics.classification import classification_metrics
from utils.metrics.evaluation import evaluate, most_wrong


@pytest.fixture
def test():
    """Targets, 60 cases of 30 patients in three folds, outputs, a control."""
    rng, cases = np.random.default_rng(0), []
    for i in range(60):
        labels = {"y": "ab"[rng.integers(2)], "n": f"{rng.normal():.3f}", "sex": "MF"[i // 2 % 2]}
        labels |= {"id": f"{i}", "site": "" if i < 10 else "north"}
        cases.append(Case(f"p{i // 2}", "/x", f"{i % 3}", i + 2, labels=labels))
    targets, _ = Targets.fit(cases, ["y"], ["n"])
    one, other = ({"y": rng.dirichlet([1, 1], 60), "n": rng.normal(size=60)} for _ in range(2))
    return targets, cases, one, other


def test_groups_folds_and_control_are_the_metrics_of_their_rows(test):
    targets, cases, one, other = test
    found = evaluate(*test, report_by=["sex", "id", "site"], by_fold=True, num=50, seed=2)
    json.dumps(found, allow_nan=False)

    def expected(rows, outputs):
        truth = targets.truth([cases[i] for i in rows])["y"]
        patients = [cases[i].patient for i in rows]
        return classification_metrics(truth, outputs["y"][rows], patients, ["a", "b"], 50, 2)

    y, every = found["y"], list(range(60))
    men = [i for i in every if cases[i].labels["sex"] == "M"]
    assert {k: y[k] for k in expected(every, one) if k != "reasons"} == {
        k: v for k, v in expected(every, one).items() if k != "reasons"
    }
    assert y["control"] == expected(every, other)
    assert y["above_control"]["auc"] == pytest.approx(y["auc"] - y["control"]["auc"])
    assert y["by"]["sex"] == {
        "F": expected(sorted(set(every) - set(men)), one),
        "M": expected(men, one),
    }
    assert y["by"]["site"]["(empty)"]["n"] == 10
    assert "id" not in y["by"] and y["reasons"]["by id"] == "has 60 values, more than 20"
    assert list(y["folds"]) == ["0", "1", "2"] and y["folds"]["1"] == expected(every[1::3], one)
    areas = [y["folds"][fold]["auc"] for fold in "012"]
    sd = np.sqrt(np.sum((areas - np.mean(areas)) ** 2) / 2)
    assert y["over_folds"]["auc"] == pytest.approx({"mean": np.mean(areas), "sd": sd, "folds": 3})
    assert set(found["n"]["over_folds"]) == {"mae", "r2"}


def test_an_undefined_fold_is_left_out_of_the_mean(test):
    targets, cases, one, _ = test
    for case in cases[::3]:
        case.labels["y"] = "a"
    found = evaluate(targets, cases, one, by_fold=True, num=0)["y"]
    assert found["folds"]["0"]["auc"] is None
    assert found["over_folds"]["auc"]["folds"] == 2
    assert found["over_folds"]["auc"]["mean"] == np.mean([found["folds"][f]["auc"] for f in "12"])
    assert not any(name.endswith("_interval") for name in found)
    alone = evaluate(targets, cases[:2], {k: v[:2] for k, v in one.items()}, by_fold=True, num=0)
    assert alone["n"]["over_folds"]["r2"] == {"mean": None, "sd": None, "folds": 0}


def test_most_wrong():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3], [0.01, 0.99]])
    assert most_wrong(np.array([1, 0, 1, 1, -1]), p, 5) == [0, 1, 3]
    assert most_wrong(np.array([1, 0, 1, 1, -1]), p, 2) == [0, 1]
    truth = np.array([1.0, 2.0, np.nan, 4.0])
    assert most_wrong(truth, np.array([1.5, 2.0, 9.0, 1.0]), 5) == [3, 0]
