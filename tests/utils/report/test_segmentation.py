"""test/ of a segmenter: tables, order, pictures, and no PatientID but in cases.csv."""

import csv
import json
import re

import numpy as np
import pytest

from utils.metrics.segmentation import case_metrics, predicted_volumes, summarize
from utils.report.segmentation import (
    describe,
    file_name,
    worst_first,
    write_predicted_report,
    write_test_report,
)

NAMES = ["near", "far"]
SPACING = (1.0, 1.0, 2.0)


def case(shift):
    """Prediction and truth, which disagree the more the larger the shift."""
    truth = np.zeros((24, 20, 12), np.uint8)
    truth[4:12, 4:12, 3:9], truth[14:20, 4:12, 3:9] = 1, 2
    return np.roll(truth, shift, axis=1), truth


CASES = {5: 1, 2: 4, 9: 0, 7: None}  # CSV line: shift; None: no mask


@pytest.fixture
def written(tmp_path):
    rows, read = [], {}
    for line, shift in CASES.items():
        prediction, truth = case(shift or 0)
        about = {"PatientID": f"DOE^{line}", "csv_line": line, "prediction": f"{line}.nii.gz"}
        about["fold"] = "1" if line == 5 else "0"
        if shift is None:
            of_case, truth = predicted_volumes(prediction, SPACING, NAMES), None
        else:
            of_case = case_metrics(prediction, truth, SPACING, NAMES, 1.5)
        rows += [about | row for row in of_case]
        image = np.zeros(prediction.shape, np.float32)
        read[line] = {"image": image, "prediction": prediction, "truth": truth}
        read[line]["spacing_mm"] = SPACING

    def write(**options):
        parts = (rows, NAMES, 1.5, read.__getitem__)
        return write_test_report(tmp_path, "A test", *parts, **options)

    return tmp_path, rows, write


def test_tables(written):
    folder, rows, write = written
    summary = write()
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["cases"], summary["predicted_only"]) == (3, 1)
    assert summary["surface_dice_tolerance_mm"] == 1.5
    with open(folder / "cases.csv", newline="") as file:
        found = list(csv.DictReader(file))
    order = [(int(row["csv_line"]), row["class"]) for row in found]
    assert order == [(line, name) for line in sorted(CASES) for name in NAMES]
    by_case = {(row["csv_line"], row["class"]): row for row in rows}
    for row in found:
        expected = by_case[int(row["csv_line"]), row["class"]]
        for name in ("dice", "hd95_mm", "surface_dice", "volume_ml", "volume_error_ml"):
            assert (float(row[name]) if row[name] else None) == expected[name]
        assert row["PatientID"] == f"DOE^{row['csv_line']}"
        assert row["prediction"] == f"{row['csv_line']}.nii.gz"
    dice = [r["dice"] for r in rows if r["class"] == "far" and r["dice"] is not None]
    assert summary["classes"]["far"]["dice"]["mean"] == pytest.approx(np.mean(dice))


def test_pictures_worst_first_and_no_names(written):
    folder, rows, write = written
    write(notes=["something to know"], settings={"a": {"b": 1}})
    assert list(worst_first(rows)) == [2, 5, 9, 7]
    names = sorted(path.name for path in (folder / "plots").glob("overlay*"))
    assert names == [f"overlay_{i:03}_line{n}.png" for i, n in enumerate([2, 5, 9, 7], 1)]
    page = (folder / "report.html").read_text()
    assert "DOE^" not in page and "DOE^" not in (folder / "summary.json").read_text()
    assert page.count("<img") == 4 + 2 and "something to know" in page
    viewed = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    assert [one["title"].split()[1] for one in viewed] == ["2", "5", "9", "7"]
    assert [one["has_truth"] for one in viewed] == [True, True, True, False]
    assert '<dl class="headline">' in page and "worst class, Dice" in page
    captions = [part.partition("<")[0] for part in page.split("<figcaption>")[1:]]
    assert [text.split()[1] for text in captions] == ["2", "5", "9", "7"]
    assert "predicted only" in captions[-1]
    assert {p.name for p in folder.iterdir()} == {
        "cases.csv",
        "plots",
        "report.html",
        "summary.json",
    }


def test_the_folds_come_first(written):
    folder, rows, write = written
    summary = write(by_fold=True)
    per_fold = [summarize([r for r in rows if r["fold"] == f], num=0)["overall"] for f in "01"]
    dice = [found["dice"]["mean"] for found in per_fold]
    assert [summary["folds"][fold]["dice"] for fold in "01"] == dice
    over = summary["over_folds"]["dice"]
    assert over == {"mean": np.mean(dice), "sd": np.std(dice, ddof=1), "folds": 2}
    page = (folder / "report.html").read_text()
    assert page.index("mean over the folds") < page.index("<h2>Overall")


def test_predictions_without_a_truth(written):
    folder, _, _ = written
    prediction, _ = case(0)
    picture = {"image": prediction, "prediction": prediction, "truth": None, "spacing_mm": SPACING}
    rows = [{"name": name, "path": "/DOE", "far_ml": 1.5} for name in ("a/one", "two")]
    rows[1]["unlike_training"] = "spacing"
    texts = {"unlike": ["two: spacing"], "notices": ["one: thin"]}
    content = ("Predictions", rows, NAMES, lambda name: dict(picture))
    write_predicted_report(folder, *content, **texts, about={"network": "resunet"})
    page = (folder / "report.html").read_text()
    assert "<dd>resunet</dd>" in page and "unlike those of training" in page
    assert page.count("<img") == 2 and "a/one" in page and "/DOE" not in page
    assert page.index("two: spacing") < page.index("far_ml") < page.index("one: thin")
    viewed = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    told = [(one["title"], one["has_truth"], len(one["classes"])) for one in viewed]
    assert told == [("two", False, 2), ("a/one", False, 2)], "what is unlike training comes first"


def test_a_limit_on_pictures(written):
    folder, _, write = written
    write(num_pictures=2)
    assert len(list((folder / "plots").glob("overlay*"))) == 2
    assert "2 more cases are not drawn" in (folder / "report.html").read_text()


def test_without_any_mask(tmp_path):
    prediction, _ = case(0)
    about = {"PatientID": "p", "csv_line": 2, "fold": "0", "prediction": "a.nii.gz"}
    rows = [about | row for row in predicted_volumes(prediction, SPACING, NAMES)]
    picture = {"image": prediction, "prediction": prediction, "truth": None, "spacing_mm": SPACING}
    found = write_test_report(tmp_path, "A test", rows, NAMES, 1.0, lambda line: picture)
    assert found["cases"] == 0 and found["overall"]["dice"]["mean"] is None
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 1 and "nan" not in page.split("<h2>Overall")[1][:400]


def test_description():
    rows = [
        {"class": n, "dice": d, "note": ""}
        for n, d in zip("abcd", (0.9, 0.1, 0.5, 0.3), strict=True)
    ]
    assert describe(rows) == "mean Dice 0.450; worst: b 0.100, d 0.300, c 0.500"
    assert describe(rows[:1]) == "mean Dice 0.900; a 0.900"
    assert describe([{"class": "a", "dice": None}]) == "nothing to find or found"


def test_file_names():
    names = [file_name(p, 3) for p in ("Doe, Jane", "doe jane", "Doe. Jane", "李", "../../etc", "")]
    assert names[0].startswith("Doe-Jane_") and names[0].endswith("_line3")
    assert len({name.lower() for name in names}) == len(names)
    assert names[3].startswith("case_") and names[4].startswith("etc_")
    assert file_name("a", 2) != file_name("a", 3) and len(file_name("x" * 300, 2)) < 70
    for name in names:
        assert all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
