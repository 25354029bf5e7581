"""Running jobs with programs that only pretend: results, failures, stops, devices."""

import csv
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.utils.transfer.studies import config
from utils.errors import InputError
from utils.signals import Stopped
from utils.transfer import plan, running
from utils.transfer.plan import Job

ROWS = {name: [{"PatientID": name, "path": f"{name}.nii"}] for name in "abcdefgh"}
ROWS["b"] = [{"PatientID": "b", "path": f"b{i}.nii"} for i in (1, 2)]
STAGE = SimpleNamespace(batch_size=2, accumulate=1, csv_path="scans.csv")


class Stop:
    received = ""

    def __bool__(self):
        return bool(self.received)


@pytest.fixture
def study(tmp_path):
    draws = {(kind, d): list("abcd") for kind in (plan.TUNING, plan.COMPARED) for d in range(3)}
    arms = {"scratch": None, "dino": tmp_path / "dino.pt", "dino-permuted": None}
    cfg = config(out=str(tmp_path / "out"))
    return running.Study(cfg, STAGE, arms, [], ROWS, draws, ["e"], ["g", "h"], Stop())


class Programs:
    """What pretends to be the scripts: notes what is started, and writes scores."""

    def __init__(self, fail=(), stop_at=None):
        self.started, self.fail, self.stop_at = [], fail, stop_at

    def __call__(self, program, argv, device, output, stop):
        values = dict(argument.split("=", 1) for argument in argv if "=" in argument)
        values = {key: json.loads(value) for key, value in values.items()}
        self.started.append((program, values))
        if len(self.started) == self.stop_at:
            stop.received = "SIGTERM"
            return 75
        if values["experiment"] in self.fail:
            output.write_text("something\nthe reason\n")
            return 2
        folder = output.parent / "test"
        folder.mkdir(exist_ok=True)
        dice = {"dice": {"mean": 0.5}}
        text = json.dumps({"overall": dice, "classes": {"liver": dice}})
        (folder / "summary.json").write_text(text)
        return 0


def test_an_arm_has_settings_of_its_own_and_its_control_has_them_too(study):
    cfg = study.cfg.model_copy(update={"arm_settings": {"dino": {"finetune.encoder_lr": 0.1}}})
    study, folder = replace(study, cfg=cfg), Path("runs/x")
    for arm, expected in (("scratch", None), ("dino", 0.1), ("dino-permuted", 0.1)):
        values = running.settings_of(study, Job("runs", arm, 2, 0, 1, 20, 1e-3), folder)
        assert values.get("finetune.encoder_lr") == expected


JOBS = [Job("runs", arm, 2, 0, 1, 20, 1e-3) for arm in ("scratch", "dino")]


def test_a_job_trains_on_its_patients_and_tests_the_last_checkpoint(study, tmp_path):
    programs = Programs()
    row = running.perform(study, JOBS[1], "cpu", programs)
    assert row["score"] == 0.5 and row["classes"] == {"liver": 0.5} and row["arm"] == "dino"
    (_, train), (program, test) = programs.started
    assert program == "segmentation"
    assert train["dino_weights"] == str(tmp_path / "dino.pt") and test["dino_weights"] is None
    assert train["seed"] == 1 and train["learning_rate"] == 1e-3 and train["test_folds"] == []
    folder = tmp_path / "out" / "runs" / "dino_n2_d0_s1_t20"
    assert test["test_ckpt"] == str(folder / "checkpoints" / "last.pt")
    assert not train["allow_seen_patients"] and train["resume_training_from"] == "auto"
    with open(folder / "cases.csv") as file:
        rows = [(r["path"], r["fold"]) for r in csv.DictReader(file)]
    train_rows = [("a.nii", "train"), ("b1.nii", "train"), ("b2.nii", "train")]
    assert rows == train_rows + [("g.nii", "test"), ("h.nii", "test")]
    tuning = Job("tuning", "dino", 1, 0, 0, 20, 1e-3)
    running.perform(study, tuning, "cpu", programs)
    with open(tmp_path / "out" / "tuning" / tuning.name / "cases.csv") as file:
        assert [r["PatientID"] for r in csv.DictReader(file)] == ["a", "e"]  # not a test patient


def test_runs_of_all_arms_differ_in_their_weights_alone(study):
    programs = Programs()
    for job in JOBS:
        running.perform(study, job, "cpu", programs)
    scratch, dino = programs.started[0][1], programs.started[2][1]
    different = {key for key in scratch if scratch[key] != dino[key]}
    assert different == {"dino_weights", "experiment", "csv_path"}


def test_what_has_a_result_is_not_run_again_and_a_failure_is(study, capsys):
    first = Programs(fail={JOBS[0].name})
    failed, done = running.run_all(study, JOBS, first)
    assert "score" not in failed and "the reason" in failed["error"] and "2" in failed["error"]
    assert f"{JOBS[0].name}: FAILED" in capsys.readouterr().out
    again = Programs()
    rows = running.run_all(study, JOBS, again)
    assert [row["score"] for row in rows] == [0.5, 0.5] and rows[1] == done
    assert {values["experiment"] for _, values in again.started} == {JOBS[0].name}


def test_a_stop_leaves_no_result_and_starts_nothing_more(study):
    with pytest.raises(Stopped):
        running.run_all(study, JOBS[:1], Programs(stop_at=1))
    with pytest.raises(Stopped):
        running.run_all(study, JOBS, Programs())
    study.stop.received = ""
    programs = Programs()
    running.run_all(study, JOBS, programs)
    assert len(programs.started) == 4


def test_a_table_that_has_changed_is_refused(study):
    """Else runs on other patients would be averaged in silence."""
    assert running.refuse_other_cases(study, JOBS) is None  # nothing has begun
    running.run_all(study, JOBS, Programs(fail={JOBS[1].name}))
    running.refuse_other_cases(study, JOBS)
    for change in (
        {"rows": ROWS | {"a": [{"PatientID": "a", "path": "other.nii"}]}},
        {"draws": dict.fromkeys(study.draws, [*"efab"])},
        {"tested_on": ["g"]},
    ):
        running.refuse_other_cases(replace(study, **change), JOBS[1:])  # it failed
        with pytest.raises(InputError, match="has changed.*another folder"):
            running.refuse_other_cases(replace(study, **change), JOBS)


def test_an_arm_without_a_rate_fails_and_a_missing_score_does(study):
    row = running.perform(study, Job("runs", "dino", 2, 0, 0, 20, None), "cpu", Programs())
    assert "no learning rate" in row["error"]

    def undefined(program, argv, device, output, stop):
        (output.parent / "test").mkdir(exist_ok=True)
        text = json.dumps({"overall": {"dice": {"mean": None}}, "classes": {}})
        (output.parent / "test" / "summary.json").write_text(text)
        return 0

    assert "undefined" in running.perform(study, JOBS[0], "cpu", undefined)["error"]


def test_each_device_has_one_program_at_a_time(study, monkeypatch):
    monkeypatch.setattr(running, "places_of", lambda at_once: ["0", "3"])
    busy, seen = set(), set()

    class Slow(Programs):
        def __call__(self, program, argv, device, *others):
            assert device not in busy
            busy.add(device)
            time.sleep(0.05)
            seen.add(frozenset(busy))
            busy.remove(device)
            return super().__call__(program, argv, device, *others)

    jobs = [Job("probes", arm, 2, d) for d in range(3) for arm in study.arms]
    rows = running.run_all(study, jobs, Slow())
    assert [(row["arm"], row["draw"]) for row in rows] == [(job.arm, job.draw) for job in jobs]
    assert frozenset({"0", "3"}) in seen


def test_several_runs_at_once_share_a_device_and_the_cores(study, monkeypatch):
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sorted(running.places_of(2)) == ["0", "0", "1", "1"]
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that the test leaves it as it was
    monkeypatch.delenv("OMP_NUM_THREADS")
    several = replace(study, cfg=study.cfg.model_copy(update={"at_once": 2}))
    running.run_all(several, JOBS[:2], Programs())
    assert running.os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delattr(running.os, "sched_getaffinity")  # as on a Mac
    monkeypatch.setattr(running.os, "cpu_count", lambda: 6)
    running.run_all(several, JOBS[:2], Programs())
    assert running.os.environ["OMP_NUM_THREADS"] == "3"


def test_a_program_gets_its_device_and_is_asked_to_stop(tmp_path, monkeypatch):
    code = "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(float("
    monkeypatch.setitem(running.PROGRAMS, "sleep", ["-c", code + "sys.argv[1]))"])
    assert running.start("sleep", ["0"], "5", tmp_path / "output.txt", Stop()) == 0
    assert running.last_line(tmp_path / "output.txt") == "5"
    stop = Stop()
    stop.received = "SIGTERM"
    began = time.monotonic()
    assert running.start("sleep", ["60"], "5", tmp_path / "output.txt", stop) != 0
    assert time.monotonic() - began < 30 and sys.executable
