"""Runs beside each other: what their folders say, and paired differences against their oracles."""

import json
import re

import numpy as np
import pytest

from tests.conftest import write_cases
from utils.compare.__main__ import in_columns, main, short_names
from utils.compare.runs import differing_settings, paired, read_run
from utils.errors import InputError
from utils.metrics.bootstrap import resamples
from utils.metrics.segmentation import dice_difference, summarize

ROWS = [{"epoch": 1, "loss": 0.9, "val_dice": 0.2}, {"epoch": 2, "loss": 0.5, "val_dice": 0.6}]


def make(folder, dice: dict | None = None, lr=0.01, volume=10.0, **settings):
    """A run's folder. dice: {class: Dice of each case}; two cases each are of one patient."""
    (folder / "test").mkdir(parents=True)
    text = f"experiment: {folder.name}\nbackbone: resunet\nlearning_rate: {lr}\n"
    text += "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "config.yaml").write_text(text + "data:\n  spacing: [1, 1, 1]\n")
    write_cases(folder / "metrics.csv", ROWS)
    if dice:
        rows = [
            {"PatientID": f"P{i // 2}", "csv_line": i + 2, "class": name, "dice": d}
            | {"true_volume_ml": volume + i}
            for name, values in dice.items()
            for i, d in enumerate(values)
        ]
        write_cases(folder / "test" / "cases.csv", [{**r, "dice": _cell(r["dice"])} for r in rows])
        filled = dict.fromkeys(("surface_dice", "hd95_mm", "volume_error_ml", "note"))
        summary = summarize([filled | row for row in rows])
        (folder / "test" / "summary.json").write_text(json.dumps(summary))
    return folder


def _cell(value):
    return "" if value is None else value


def test_two_segmentations(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.7, 12)
    dice = {"a": [*base], "b": [None, *base[1:]]}
    better = {"a": [*base + 0.1], "b": [None, *base[1:] + 0.2]}
    one = make(tmp_path / "one", dice, classes={"a": 1, "b": 2})
    two = make(tmp_path / "two", better, lr=0.02, classes={"a": 1, "b": 2})
    assert main([str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"one +resunet +2 +2 +0\.600 ", said)
    assert re.search(r"learning_rate +0\.01 +0\.02", said) and "experiment" not in said
    assert re.search(r"two minus one +Dice +dice +0\.150 +\+0\.150 to \+0\.150 +12 +6", said)
    assert re.search(r"two minus one +Dice b +dice +0\.200 +\+0\.200 to \+0\.200 +11 +6", said)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Settings that differ" in page and page.count("<img") == 1


def test_the_interval_is_that_of_plainly_drawn_patients():
    rng = np.random.default_rng(1)
    rows, others = (
        [
            {"PatientID": f"P{i // 2}", "csv_line": i, "class": "a", "dice": d}
            for i, d in enumerate(rng.uniform(0, 1, 10))
        ]
        for _ in range(2)
    )
    d = np.array([a["dice"] - b["dice"] for a, b in zip(rows, others, strict=True)])
    drawn = resamples([row["PatientID"] for row in rows], 1000, 0)
    means = [np.repeat(d, counts).mean() for counts in drawn]
    found = dice_difference(rows, others)["a"]
    assert found["difference"] == pytest.approx(d.mean())
    assert found["95 %"] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
    assert found["cases"] == 10 and found["patients"] == 5


def test_only_cases_with_the_same_truth_are_paired(tmp_path):
    one = read_run(make(tmp_path / "one", {"a": [0.5, 0.6, 0.7]}), "one")
    two = read_run(make(tmp_path / "two", {"a": [0.6, 0.6]}), "two")
    rows, notes = paired(one, two)
    assert rows[0]["cases"] == 2
    assert notes == ["two minus one, a: 2 cases are in both tests with the same truth, of 3 and 2"]
    other = read_run(make(tmp_path / "other", {"a": [0.5, 0.6, 0.7]}, volume=11.0), "other")
    assert paired(one, other)[0] == []
    untested = read_run(make(tmp_path / "untested"), "untested")
    assert paired(one, untested)[1] == [
        "untested minus one: no test of the same class or target in both"
    ]


def predictions(folder, p: list[float], n: list[float]):
    rows = []
    for i, (a, b) in enumerate(zip(p, n, strict=True)):
        who = {"PatientID": f"P{i}", "csv_line": i + 2, "fold": "4"}
        truth = {"target": "y", "truth": "hi" if i % 2 else "lo", "prediction": "hi"}
        rows.append(who | truth | {"p_hi": a, "p_lo": 1 - a})
        rows.append(who | {"target": "age", "truth": i, "prediction": b} | {"p_hi": "", "p_lo": ""})
    write_cases(folder / "test" / "predictions.csv", rows)


def test_two_classifications(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    number = np.arange(20)
    rng = np.random.default_rng(0)
    predictions(one, [*rng.uniform(0, 1, 20)], [*number + 3.0])
    predictions(two, [*(number % 2) * 0.5 + 0.25], [*number + 1.0])
    rows, notes = paired(read_run(one, "one"), read_run(two, "two"))
    assert not notes
    found = {row["score"]: row for row in rows}
    assert found["age"]["difference"] == pytest.approx(-2) and found["age"]["of"] == "mae"
    assert found["y"]["of"] == "auc" and 0 < found["y"]["difference"] <= 1
    low, high = found["y"]["95 %"]
    assert 0 < low <= found["y"]["difference"] <= high


def test_a_cv_and_an_earlier_test_are_compared_too(tmp_path, capsys):
    one, cv = make(tmp_path / "one", {"a": [0.5] * 4}), make(tmp_path / "cv", {"a": [0.7] * 4})
    (cv / "config.yaml").rename(cv / "test" / "config.yaml")
    (cv / "metrics.csv").unlink()
    (one / "test").rename(one / "test_2026")
    (one / "test_2026" / "config.yaml").write_text((one / "config.yaml").read_text())
    assert main([str(one / "test_2026"), str(cv), "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"cv minus test_2026 +Dice +dice +0\.200 ", capsys.readouterr().out)


def test_classes_of_one_test_alone_are_named(tmp_path):
    one = make(tmp_path / "one", {"a": [0.5] * 4, "b": [0.5] * 4})
    two = make(tmp_path / "two", {"a": [0.6] * 4, "c": [0.5] * 4})
    rows, notes = paired(read_run(one, "one"), read_run(two, "two"))
    assert len(rows) == 2 and notes == ["two minus one: only one of them has b, c"]


def test_the_report_of_a_run_is_not_replaced(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    with pytest.raises(InputError, match="--out: .*one holds a run, whose report would be replace"):
        main([str(one), str(two), "--out", str(one)])
    assert not (one / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path):
    run = make(tmp_path / "run")
    with pytest.raises(InputError, match="config.yaml: cannot be read.*give the folder of a run"):
        main([str(run), str(tmp_path)])
    with pytest.raises(InputError, match="1 different runs given: expected 2 to 7"):
        main([str(run), str(run)])


def test_names_and_columns(tmp_path):
    folders = [tmp_path / "a" / "fold_1", tmp_path / "b" / "fold_1"]
    assert short_names(folders) == ["a/fold_1", "b/fold_1"]
    assert in_columns([{"x": 1}, {"x": 0.12345, "y": None}]) == "  x      y\n  1      -\n  0.123  -"
    one, two = (read_run(make(f, extra=k), str(k)) for k, f in enumerate(folders))
    assert differing_settings([one, two]) == [{"setting": "extra", "0": "0", "1": "1"}]
