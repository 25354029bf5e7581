"""What rows of runs say, on rows written by hand."""

import math

import pytest

from utils.transfer import report, tables


def row(arm, labels, draw, score, method="fine_tune", **more):
    found = {"part": "runs", "method": method, "arm": arm, "labels": labels, "draw": draw}
    found |= {"seed": 0, "steps": 20, "learning_rate": 1e-3}
    return found | ({"error": "broke"} if score is None else {"score": score}) | more


def test_differences_are_paired_by_draw_and_seeds_are_averaged_first():
    rows = [row("scratch", 2, d, score) for d, score in enumerate((0.5, 0.6, 0.7))]
    rows += [row("dino", 2, d, score) for d, score in enumerate((0.6, 0.6, None))]
    rows += [row("dino", 2, 0, 0.8, seed=1)]
    (found,) = tables.comparisons(rows, [("dino", "scratch")])
    assert found["draws"] == 2 and found["difference"] == pytest.approx((0.2 + 0) / 2)
    # t of 1 degree of freedom: 12.706; standard error 0.1
    assert (found["low"], found["high"]) == pytest.approx((0.1 - 1.2706, 0.1 + 1.2706), abs=1e-4)
    assert found["p"] == 1.0


def test_holm_is_over_the_numbers_of_labels_of_one_pair():
    rows = [row("scratch", n, d, 0.5) for n in (2, 4) for d in range(5)]
    rows += [row("dino", n, d, 0.5 + 0.1 * (d + 1) * (n == 2)) for n in (2, 4) for d in range(5)]
    few, many = tables.comparisons(rows, [("dino", "scratch")])
    assert (few["p"], few["p_holm"]) == (2 / 32, 4 / 32) and many["p"] == many["p_holm"] == 1


def test_steps_to_a_score():
    curve = {10: 0.2, 20: 0.4, 40: 0.8}
    assert tables.steps_to(0.4, curve) == (20, "")
    assert tables.steps_to(0.6, curve) == (pytest.approx(20 * math.sqrt(2)), "")
    assert tables.steps_to(0.1, curve) == (10, "<=") and tables.steps_to(0.9, curve) == (40, ">")


def test_convergence_is_measured_by_the_final_score_of_random_weights():
    curves = {"scratch": {10: 0.0, 20: 0.5, 40: 1.0}, "dino": {10: 0.475, 20: 0.95, 40: 1.0}}
    rows = [
        row(arm, 4, d, score, steps=steps)
        for arm, curve in curves.items()
        for d in range(3)
        for steps, score in curve.items()
    ]
    scratch, dino = tables.convergence(rows, ["scratch", "dino"], "scratch")
    # 0.95 lies at 0.9 of the way from 20 to 40 in logarithms
    assert scratch["steps"] == pytest.approx(20 * 2**0.9) and dino["steps"] == pytest.approx(20)
    assert dino["times as fast"] == pytest.approx(2**0.9) and dino["never"] == 0
    assert dino["p"] == 2 / 2**3 and "p" not in scratch
    # an arm in which a draw lacks a length is compared in the others
    lost = [r for r in rows if (r["arm"], r["draw"], r["steps"]) != ("dino", 0, 40)]
    assert tables.convergence(lost, ["scratch", "dino"], "scratch")[1]["draws"] == 2


def test_the_best_rate_counts_failures_as_zero_and_takes_the_lower_of_equals():
    rows = []
    for arm, scores in {"a": (0.5, 0.6, None), "b": (0.4, 0.4, 0.3), "c": (None,) * 3}.items():
        for rate, score in zip((0.1, 0.2, 0.3), scores, strict=True):
            rows += [row(arm, 2, d, score, learning_rate=rate) for d in (0, 1)]
    rows.append(row("a", 2, 2, 0.9, learning_rate=0.3))  # the best of its draws, two others failed
    found = tables.choose_rates(rows, "abc", [0.1, 0.2, 0.3])
    assert found["chosen"] == {"a": 0.2, "b": 0.1, "c": None}
    assert found["scores"]["a"] == pytest.approx({"0.1": 0.5, "0.2": 0.6, "0.3": 0.3})
    assert tables.choose_rates([], "ab", [0.1])["chosen"] == {"a": 0.1, "b": 0.1}


def test_chosen_rates_stay_but_of_an_arm_whose_runs_had_all_failed():
    earlier = {"chosen": {"a": 1e-3, "b": None}, "scores": {"a": {"0.001": 0.5}, "b": {}}}
    now = {"chosen": {"a": 1e-2, "b": 1e-2}, "scores": {"a": {"0.01": 0.6}, "b": {"0.01": 0.4}}}
    kept = {"chosen": {"a": 1e-3, "b": 1e-2}, "scores": {"a": {"0.001": 0.5}, "b": {"0.01": 0.4}}}
    assert tables.keep_rates(earlier, now) == kept


def test_tables_are_markdown():
    lines = report.markdown([{"a": 1, "b": None}, {"a": 0.123456, "c": "x"}]).splitlines()
    assert [line.split() for line in lines] == [
        "| a | b | c |".split(),
        "| ------ | - | - |".split(),
        "| 1 | | |".split(),
        "| 0.1235 | | x |".split(),
    ]
