import csv

import numpy as np
import pytest

from data.cases import Case
from data.prepare.targets import Targets
from utils.metrics.predictions import pool, write_predictions

NASTY = ["=1+1", '"a", b', "肝\u2028x", "-"]  # "-" is missing


def nasty_cases(start=2):
    texts = [*NASTY, *NASTY]
    return [
        Case(f"+{text}{i}", "/x", "0", start + i, labels={"a\nb": text, "n": f"{i}.1"})
        for i, text in enumerate(texts)
    ]


def test_text_and_numbers_are_kept_as_they_are(tmp_path):
    cases = nasty_cases()
    targets, problems = Targets.fit(cases, ["a\nb"], ["n"])
    assert not problems and len(targets.classes["a\nb"]) == 3
    rng = np.random.default_rng(0)
    outputs = {"a\nb": rng.dirichlet([1, 1, 1], 8).astype(np.float32), "n": rng.normal(size=8)}
    write_predictions(tmp_path / "p.csv", targets, cases, outputs)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and rows[0]["PatientID"] == "+=1+10"
    assert rows[0]["truth"] == "=1+1" and rows[6]["truth"] == "" and rows[7]["truth"] == "3.1"
    best = targets.classes["a\nb"][outputs["a\nb"][0].argmax()]
    assert rows[0]["prediction"] == best
    assert float(rows[0][f"p_{best}"]) == outputs["a\nb"][0].max()
    assert rows[1]["p_=1+1"] == "" and float(rows[1]["prediction"]) == outputs["n"][0]
    names = [f"p_{name}" for name in targets.classes["a\nb"]]
    found = np.array([[float(row[name]) for name in names] for row in rows[::2]])
    assert (found == outputs["a\nb"]).all()
    assert [row["csv_line"] for row in rows[::2]] == [str(i) for i in range(2, 10)]


def test_pool():
    one, two = nasty_cases(), nasty_cases(start=20)
    cases, outputs = pool([(one, {"a": np.zeros((8, 2))}), (two, {"a": np.ones((8, 2))})])
    assert cases == [*one, *two] and outputs["a"][:, 0].tolist() == [0] * 8 + [1] * 8
    with pytest.raises(ValueError, match="line 2 of the CSV was tested in two folds"):
        pool([(one, {"a": np.zeros((8, 2))}), (one, {"a": np.ones((8, 2))})])
