import json
import random
from dataclasses import replace

import numpy as np
import pytest

from data.cases import Case
from data.prepare.targets import Targets, is_missing, is_missing_number, minus_one, number


def cases_of(*texts, name="y", patients=None):
    """Line 2 is the first."""
    patients = patients or [f"p{i}" for i in range(len(texts))]
    return [
        Case(patient, f"/{i}.nii", "0", i + 2, labels={name: text})
        for i, (text, patient) in enumerate(zip(texts, patients, strict=True))
    ]


def fitted(*texts, **options):
    targets, problems = Targets.fit(cases_of(*texts, **options), ["y"])
    assert problems == []
    return targets


def problem_of(*texts, numeric=False, **options):
    """The only problem of a column."""
    columns = ([], ["y"]) if numeric else (["y"], [])
    targets, problems = Targets.fit(cases_of(*texts, **options), *columns)
    assert targets.names == [] and len(problems) == 1
    return problems[0]


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["small", "large"] * 2, ["large", "small"]),
        (["10", "9", "2", "9", "10", "2"], ["2", "9", "10"]),
        (["10", "9", "2a", "9", "10", "2a"], ["10", "2a", "9"]),
        (["-1", "1", "0.5", "1e-3", "-1", "1", "0.5", "1e-3"], ["-1", "1e-3", "0.5", "1"]),
        (["é", "z", "a", "é", "z", "a"], ["a", "z", "é"]),
    ],
)
def test_classes_are_sorted_whatever_the_order_of_rows(texts, classes):
    for seed in range(5):
        random.Random(seed).shuffle(texts)
        assert fitted(*texts).classes == {"y": classes}


def test_counts_weights_and_outputs():
    targets = fitted("a", "b", "b", "b", "")
    assert targets.counts == {"y": [1, 3]}
    weights = targets.class_weights()["y"]
    assert weights == [2.0, pytest.approx(2 / 3)]
    assert np.dot(weights, targets.counts["y"]) == pytest.approx(4)  # mean over rows 1
    assert targets.num_outputs == {"y": 2}


@pytest.mark.parametrize("text", ["", "nan", "NaN", "NA", "n/a", "N/A", "<NA>", "null", "?", "."])
def test_spellings_of_missing(text):
    targets = fitted("a", "b", text)
    assert targets.classes["y"] == ["a", "b"]
    assert targets.encode(cases_of(text)[0]) == {"y": -1}
    assert targets.check(cases_of(text)) == []
    assert is_missing_number(text)


def test_a_column_that_the_csv_lacks_is_missing():
    case = replace(cases_of("a")[0], labels={})
    both, _ = Targets.fit(cases_of("1", "2", "2"), ["y"], ["y"])
    assert fitted("a", "b").encode(case) == {"y": -1}
    assert np.isnan(Targets({}, {}, both.moments).encode(case)["y"])


def test_a_dash_is_missing_but_not_beside_a_plus():
    assert fitted("a", "b", "-").classes["y"] == ["a", "b"]
    assert fitted("+", "-", "").classes["y"] == ["+", "-"]
    assert is_missing("-", ["a", "b"]) and not is_missing("-", ["+", "x"])
    unknown = Targets({"y": ["+", "x"]}, {"y": [1, 1]}, {}).check(cases_of("-"))
    assert unknown[0].row == 2


def test_none_is_a_class_with_a_warning_and_refused_among_numbers():
    targets = fitted("none", "mild", "severe", "mild", "none", "severe")
    assert targets.classes["y"] == ["mild", "none", "severe"]
    assert any(n.startswith("WARNING") and "'none'" in n for n in targets.notes(cases_of("mild")))
    _, problems = Targets.fit(cases_of("0", "1", "None", "0", "1", "None"), ["y"])
    assert [p.row for p in problems] == [4, 7] and "'None' among numbers" in problems[0].what


def test_notes_say_what_was_taken_as_missing():
    cases = cases_of("a", "b", "NaN", "", "", "a")
    notes = fitted("a", "b", "NaN", "", "", "a").notes(cases)
    assert notes == [
        "y: 'a' 2, 'b' 1 train rows",
        "y: 3 of 6 rows have no value ('NaN' 1, empty 2)",
    ]
    notes = "\n".join(fitted("Left", "left", "right", "right", "Left", "left").notes([]))
    assert "'Left' and 'left' differ only in spelling" in notes


def test_bad_columns():
    assert "all 3 train rows with a value are 'a'" in problem_of("a", "a", "a", "").what
    assert "no train row has a value" in problem_of("", "NaN").what
    assert "is it an ID" in problem_of(*(f"id{i}" for i in range(9))).what
    many = problem_of(*(str(i) for i in range(30)), *(str(i) for i in range(20)))
    assert "reg_targets" in many.what
    found = problem_of("1", "1.0", "0", "0", "1", "1")
    assert found.row == 3 and "'1' (3 train rows) and '1.0' (1 train rows)" in found.what
    assert {found.kind} == {"targets"}


def test_an_id_of_patients_with_several_rows():
    patients = ["a", "a", "b", "b", "c", "c"]
    assert "ID" in problem_of("1", "1", "2", "2", "3", "3", patients=patients).what
    fitted("1", "1", "2", "2", "3", "3")  # six patients


def test_two_rows_of_two_classes_will_do():
    assert fitted("a", "b").classes["y"] == ["a", "b"]


def test_values_that_only_val_has_are_named_by_row():
    targets = fitted(*["small", "large", "1"] * 2)  # a number among words
    problems = targets.check(cases_of("small", "Small", "huge", "1.0", "", "none"))
    assert [p.row for p in problems] == [3, 4, 5, 7]
    assert [p.patient for p in problems] == ["p1", "p2", "p3", "p5"]
    assert "written 'small' there" in problems[0].what
    assert "'huge' is in no train row, which have '1', 'large', 'small'" in problems[1].what
    assert "written '1' there" in problems[2].what
    assert "leave the cell empty" in problems[3].what


def test_numbers_are_standardised_on_train_and_come_back():
    cases = cases_of("1", "2.5", "NA", "none", "4e0")
    targets, problems = Targets.fit(cases, [], ["y"])
    assert problems == []
    values = np.array([1, 2.5, 4])
    assert targets.moments["y"] == [pytest.approx(values.mean()), pytest.approx(values.std())]
    z = np.array([targets.encode(case)["y"] for case in cases])
    assert np.isnan(z[2:4]).all()
    assert z[[0, 1, 4]].mean() == pytest.approx(0) and z[[0, 1, 4]].std() == pytest.approx(1)
    np.testing.assert_allclose(targets.to_units("y", z), [1, 2.5, np.nan, np.nan, 4])
    np.testing.assert_array_equal(targets.truth(cases)["y"], [1, 2.5, np.nan, np.nan, 4])
    assert targets.num_outputs == {"y": 1} and targets.class_weights() == {}


def test_what_is_not_a_number():
    problem = problem_of("1", "2", "1,5", numeric=True)
    assert problem.row == 4 and "write a decimal point" in problem.what
    assert "have the same" in problem_of("2", "2.0", numeric=True).what
    assert "no train row" in problem_of("", "", numeric=True).what
    for text in ["inf", "1_000", "１", "0x1", "1e999", "1e31", "--1", "1 2", "nan"]:
        assert number(text) is None
    assert number("-1.5E+2") == -150
    targets, _ = Targets.fit(cases_of("1", "2"), [], ["y"])
    assert [p.row for p in targets.check(cases_of("3", "tall"))] == [3]


def test_all_problems_of_all_columns_at_once():
    cases = [
        Case(f"p{i}", "/x", "0", i + 2, labels={"a": "x", "b": f"{i}", "c": "yn"[i % 2], "d": "?"})
        for i in range(6)
    ]
    targets, problems = Targets.fit(cases, ["a", "b", "c"], ["d"])
    assert targets.names == ["c"]
    assert [p.what.split(":")[0] for p in problems] == ["a", "b", "d"]


def test_json_round_trip():
    cases = [
        replace(c, labels={"y": c.labels["y"], "z": f"{i}"})
        for i, c in enumerate(cases_of("é", "b", "é"))
    ]
    targets, _ = Targets.fit(cases, ["y"], ["z"])
    again = Targets.from_dict(json.loads(json.dumps(targets.to_dict())))
    assert again == targets
    assert [again.encode(c) for c in cases] == [targets.encode(c) for c in cases]


def test_minus_one_among_other_values_is_noticed():
    assert minus_one("y", cases_of("True", "False", "-1"))
    (notice,) = minus_one("y", cases_of("0", "-1", "1", "-1", ""))
    assert notice.is_notice and "-1, in 2 of the train rows, is" in notice.what and notice.row == 3
    for texts in (["-1", "-2", "1"], ["-1", ""], ["0", "1"], ["low", "True"]):
        assert not minus_one("y", cases_of(*texts))
