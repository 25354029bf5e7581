import json
import re
import warnings

import numpy as np
import pytest

from data.cases import Case
from data.prepare.targets import Targets
from tests.utils.report.pictures import on_white
from utils.metrics.classification import classification_metrics, regression_metrics
from utils.metrics.evaluation import evaluate
from utils.report.classification import in_words, write_test_report
from utils.report.page import number
from utils.report.plots_classification import (
    Panel,
    drawable,
    plot_calibration,
    plot_cases,
    plot_confusion,
    plot_numbers,
    plot_precision_recall,
    plot_roc,
)

CANARY = "CANARY"
NASTY = ["<script>alert(1)</script>", "_a$x^{", "a" * 90, r"\frac$ $", "{x} % \t%s", "肝臓", "😀"]


@pytest.fixture(autouse=True)
def no_warnings():
    """Neither of missing letters nor of undefined metrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make(rows=40, labels=("a", "b"), seed=0, name="y"):
    rng = np.random.default_rng(seed)
    cases = [Case(f"{CANARY}{i}", "/x", f"{i // 2 % 2}", i + 2) for i in range(rows)]
    for i, case in enumerate(cases):
        case.labels.update(
            {name: labels[i % len(labels)], "n": f"{i % 7}", "sex": "MF"[i // 4 % 2]}
        )
    targets, problems = Targets.fit(cases, [name], ["n"])
    assert not problems
    outputs = {name: rng.dirichlet(np.ones(len(labels)), rows), "n": rng.normal(size=rows)}
    control = {name: rng.dirichlet(np.ones(len(labels)), rows), "n": rng.normal(size=rows)}
    return targets, cases, outputs, control


def image_of(case):
    return np.random.default_rng(case.row).random((6, 8, 10))


def write(folder, *args, **options):
    """The metrics, and the text of the page; no patient's name in it nor in the metrics."""
    metrics = write_test_report(folder, "Test", *args, **options)
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text) == metrics
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert CANARY not in text and CANARY not in page
    return metrics, page


def test_all_of_it(tmp_path):
    targets, cases, outputs, control = make()
    metrics, page = write(
        tmp_path / "test",
        targets,
        cases,
        outputs,
        control,
        ["sex"],
        image_of,
        True,
        ["mind <this>"],
    )
    pictures = {p.stem for p in (tmp_path / "test" / "plots").iterdir()}
    assert pictures == {
        *("roc", "precision_recall", "confusion", "calibration", "numbers"),
        *("worst_1_y", "worst_2_n"),
    }
    assert page.count("<img") == 7
    lines = (tmp_path / "test" / "control.csv").read_text().splitlines()
    assert len(lines) == 81 and str(float(control["y"][0, 1])) in lines[1]
    for value in (metrics["y"]["auc"], metrics["y"]["control"]["auc"], metrics["n"]["mae"]):
        assert number(value) in page
    assert "mind &lt;this&gt;" in page and "The positive class is &#39;b&#39;" in page
    assert metrics["y"]["by"]["sex"].keys() == {"F", "M"} and "By sex" in page
    assert number(metrics["y"]["over_folds"]["auc"]["sd"]) in page


def test_scores_in_words():
    targets, cases, outputs, _ = make()
    lines = in_words(evaluate(targets, cases, outputs, by_fold=True)).splitlines()
    score = r"\S+ \(\S+ to \S+\)"
    over = "mean and sd over the folds"
    pooled = rf"pooled: AUC {score}, balanced accuracy {score}; 40 rows with a label"
    assert re.match(rf"y: {over}: AUC \S+ \+- \S+, .*; {pooled}$", lines[0])
    assert re.match(rf"n: .*; pooled: mean absolute error {score}, R² {score}; 40 rows", lines[1])
    one = in_words(evaluate(targets, cases[:1], {k: v[:1] for k, v in outputs.items()}))
    assert "1 rows with a label" in one and over not in one
    assert "(no interval)" in one and "None" not in one


def test_no_labels(tmp_path):
    targets, cases, outputs, control = make(rows=8)
    unlabelled = [Case(c.patient, c.path, c.fold, c.row) for c in cases]
    metrics, page = write(tmp_path, targets, unlabelled, outputs, control, ["sex"], image_of, True)
    assert metrics["y"]["auc"] is None and "no row has a label" in page
    assert list((tmp_path / "plots").iterdir()) == []
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 17


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")])
def test_one_row(tmp_path, labels):
    targets, cases, outputs, control = make(rows=12, labels=labels)
    one = ({name: x[:1] for name, x in part.items()} for part in (outputs, control))
    metrics, page = write(tmp_path, targets, cases[:1], *one, ["sex"], image_of, True)
    assert (
        metrics["y"]["auc"] is None
        and "the truth of all 1 rows is" in metrics["y"]["reasons"]["auc"]
    )
    assert metrics["n"]["r2"] is None and page.count("<img") >= 5


def test_one_class_in_test_without_control(tmp_path):
    targets, cases, outputs, _ = make()
    for case in cases:
        case.labels["y"] = "b"
    metrics, page = write(tmp_path, targets, cases, outputs)
    assert metrics["y"]["auc"] is None and metrics["y"]["sensitivity"] is not None
    assert "control" not in metrics["y"] and "Control" not in page
    assert not (tmp_path / "control.csv").exists()


def test_text_of_a_csv_is_only_text(tmp_path):
    name = NASTY[0]
    targets, cases, outputs, control = make(labels=NASTY, name=name, rows=70)
    metrics, page = write(tmp_path, targets, cases, outputs, control, ["sex", name], image_of, True)
    assert "<script" not in page and "肝臓" in page and "class 7" in page
    assert metrics[name]["classes"] == sorted(NASTY)
    names = [p.name for p in (tmp_path / "plots").iterdir()]
    assert all(re.fullmatch(r"\w+\.png", n) for n in names) and len(names) == 7


def test_cases_are_named_by_their_line(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "utils.report.classification.plot_cases",
        lambda path, volumes, captions: shown.extend(captions) or path.write_bytes(b""),
    )
    targets, cases, outputs, _ = make(rows=2)
    outputs = {"y": np.array([[0.25, 0.75], [0.125, 0.875]]), "n": np.array([0.0, 3.5])}
    write(tmp_path, targets, cases, outputs, images=image_of)
    assert shown == [
        "line 2\ntruth a (0.250)\npredicted b (0.750)",
        "line 3\ntruth 1.000\npredicted 3.500",
    ]


def test_the_same_twice_is_the_same(tmp_path):
    args = make()
    assert write(tmp_path / "a", *args) == write(tmp_path / "b", *args)


def test_drawable():
    assert drawable(["a_b", "$x$"], "class") == ["a_b", "$x$"]
    assert drawable(["é", "肝"], "class") == ["class 1", "class 2"]
    assert drawable(["x" * 30 + "a", "x" * 30 + "b"], "class") == ["class 1", "class 2"]
    assert drawable(["a\nb"], "class") == ["a·b"]
    assert len(drawable(["x" * 90], "class")[0]) == 24


def test_pictures_are_of_their_files_and_names_are_no_formulas(tmp_path):
    rng, panels = np.random.default_rng(0), []
    for k in (2, 15):
        classes = [rf"$\frac{{{i}$" for i in range(k)]  # no formula: drawn as one it would raise
        truth, p = rng.integers(0, k, 90), rng.dirichlet(np.ones(k), 90)
        metrics = classification_metrics(truth, p, range(90), classes)
        panels.append(Panel(classes[-1], classes, truth, p, metrics))
    numbers = rng.normal(size=(2, 30))
    metrics = regression_metrics(*numbers, range(30))
    plots = [(f, panels) for f in (plot_roc, plot_precision_recall, plot_confusion)]
    plots += [(plot_calibration, panels)]
    plots += [(plot_numbers, [Panel(r"$\frac{$", [], *numbers, metrics)])]
    volumes = [np.zeros((4, 5, 6)), np.ones((9, 2, 3))]
    plots += [(plot_cases, volumes, ["$\\frac{$\nb", "c"])]
    for plot, *rest in plots:
        rgb = plot(tmp_path / "a.png", *rest)
        assert rgb.dtype == np.uint8
        assert np.array_equal(on_white(tmp_path / "a.png"), rgb)
