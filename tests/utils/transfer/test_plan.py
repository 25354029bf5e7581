"""Draws and jobs: functions of the seed, nested, the same in all arms."""

import pytest

from tests.utils.transfer.studies import config
from utils.errors import InputError
from utils.transfer import plan

POOL = {f"P{i}": frozenset({"liver"} | ({"lesion"} if i % 5 == 0 else set())) for i in range(20)}


def test_draws_are_nested_hold_every_class_and_depend_on_the_seed_alone():
    cfg = config(label_counts=[2, 4, 8], draws=6)
    draws = plan.all_draws(cfg, POOL)
    assert draws == plan.all_draws(cfg, dict(reversed(POOL.items())))
    assert draws != plan.all_draws(config(label_counts=[2, 4, 8], draws=6, seed=1), POOL)
    compared = [draws[plan.COMPARED, d] for d in range(6)]
    assert all(len(set(patients)) == 8 for patients in compared)
    assert all(any("lesion" in POOL[p] for p in patients[:2]) for patients in compared)
    assert len({tuple(patients) for patients in compared}) == 6
    # a larger label count leaves the smaller ones as they were
    more = plan.all_draws(config(label_counts=[2, 4, 8, 16], draws=6), POOL)
    assert [more[plan.COMPARED, d][:8] for d in range(6)] == compared
    tuning = [draws[plan.TUNING, d] for d in range(2)]
    assert [len(patients) for patients in tuning] == [4, 4] and tuning[0] not in compared


def test_all_patients_come_first_about_equally_often():
    first = [plan.draw(POOL, 20, [0, 1, d])[0] for d in range(400)]
    assert 5 <= min(first.count(p) for p in POOL) and max(first.count(p) for p in POOL) <= 40


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="only 20 patients"):
        plan.all_draws(config(label_counts=[2, 21]), POOL)
    with pytest.raises(InputError, match="no 1 patients found that hold all of a, b"):
        plan.all_draws(config(label_counts=[1]), {"x": frozenset("a"), "y": frozenset("b")})


def test_without_val_folds_a_quarter_of_the_patients_is_held_out():
    held, rest = plan.hold_out(POOL, 0)
    assert len(held) == 5 and set(held) | set(rest) == set(POOL) and not set(held) & set(rest)
    assert any("lesion" in POOL[p] for p in held)


def test_all_arms_get_the_same_jobs():
    cfg = config(label_counts=[2, 4], draws=3, seeds=2, steps=20)
    jobs = plan.compared_runs(cfg, {"scratch": 1e-3, "dino": 1e-2})
    assert len({job.name for job in jobs if job.method == "fine_tune"}) == len(
        [job for job in jobs if job.method == "fine_tune"]
    )
    of_arm = {}
    for job in jobs:
        facts = (job.method, job.count, job.draw, job.seed, job.steps, job.random_seed)
        of_arm.setdefault(job.arm, []).append(facts)
    assert of_arm["scratch"] == of_arm["dino"] == of_arm["dino-permuted"]
    # 3 draws x 2 seeds x (2 probes, 2 comparisons, and of the lengths 10, 20, 40 those not there)
    assert len(of_arm["dino"]) == 3 * 2 * (2 + 2 + 2)
    assert len({(d, s): seed for _, _, d, s, _, seed in of_arm["dino"]}.values()) == 6
    rates = {(job.arm, job.rate) for job in jobs if job.method == "fine_tune"}
    assert rates == {("scratch", 1e-3), ("dino", 1e-2), ("dino-permuted", None)}


def test_every_arm_is_tuned_over_the_same_rates_and_draws():
    jobs = plan.tuning_runs(config(label_counts=[2, 4, 8]))
    by_arm = {arm: {(j.rate, j.draw, j.count) for j in jobs if j.arm == arm} for arm in ARMS}
    assert by_arm["scratch"] == by_arm["dino"] == by_arm["dino-permuted"]
    assert {count for _, _, count in by_arm["dino"]} == {4} and len(by_arm["dino"]) == 2 * 2
    one = config(tuning={"learning_rates": [1e-3], "draws": 2, "label_count": None})
    assert plan.tuning_runs(one) == []


ARMS = plan.arms_of(config())
