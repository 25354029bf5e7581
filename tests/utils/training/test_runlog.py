import json
import math
import re

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.training.runlog import RunLog, read_metrics

ROWS = [
    {"epoch": 0, "step": 0, "val_loss": 1 / 3, "probe": 0.25},
    {"epoch": 1, "step": 2, "loss": np.float64(0.1), "val_loss": 1e-17},
    {"epoch": 2, "step": 4, "loss": math.nan, "val_loss": 2.0, "probe": None},
]


def write_run(folder, rows, steps):
    log = RunLog(folder)
    for step in range(steps):
        log.step(step, {"loss": 1 / (step + 1), "bad": math.inf})
    for row in rows:
        log.epoch(row, row["step"])
    log.close()


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_metrics_are_read_back_as_they_were(tmp_path):
    write_run(tmp_path, ROWS, 4)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert all(row.pop("seconds") >= 0 for row in rows)
    assert rows[0] == {**ROWS[0], "loss": None}
    assert rows[1] == {**ROWS[1], "probe": None}
    assert math.isnan(rows[2]["loss"]) and isinstance(rows[2]["epoch"], int)
    assert read_metrics(tmp_path / "nothing.csv") == []


def test_log_lines_are_json(tmp_path):
    write_run(tmp_path, [], 2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 1.0, "bad": None}, {"step": 1, "loss": 0.5, "bad": None}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write_run(tmp_path, ROWS, 5)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # the power went
    log = RunLog(tmp_path, step=3, epoch=1)
    assert [row["epoch"] for row in log.rows] == [0, 1]
    log.epoch(ROWS[2] | {"loss": 0.5}, 4)
    log.step(3, {"loss": 7.0})
    log.close()
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [None, 0.1, 0.5]
    RunLog(tmp_path, step=0).close()  # stopped before the first step: all anew
    assert steps_of(tmp_path) == []


def test_an_epoch_is_a_line_that_says_when_the_run_ends(tmp_path, capsys):
    log = RunLog(tmp_path, step=2, epoch=1, num_epochs=4)
    log.began -= 10
    for epoch in (2, 3, 4):
        log.epoch(
            {"epoch": epoch, "step": 2 * epoch, "loss": 0.25, "val_dice": None},
            2 * epoch,
            2 if epoch > 2 else 0,
        )
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert re.fullmatch(r"epoch 2/4 loss 0.25, 0 s, ends \d\d:\d\d", lines[0])
    assert lines[2] == "epoch 4/4 loss 0.25 best 2, 0 s"
    log.num_epochs = 40_000
    log.epoch({"epoch": 5, "step": 10}, 10)
    assert re.search(r", 0 s, ends \d{4}-\d\d-\d\d \d\d:\d\d$", capsys.readouterr().out)


def test_tensorboard_has_the_same_numbers(tmp_path):
    write_run(tmp_path, ROWS[:2], 3)
    log = RunLog(tmp_path, step=3, epoch=1)
    log.image("crops", np.zeros((4, 5, 3), np.uint8), 3)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, round(e.value, 6)) for e in board.Scalars("step/loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, 0.333333),
    ]
    assert [e.step for e in board.Scalars("epoch/val_loss")] == [0, 2]
    assert board.Tags()["images"] == ["crops"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.runlog.is_main", lambda: False)
    log = RunLog(tmp_path / "x")
    log.message("text"), log.step(0, {"loss": 1.0}), log.epoch(ROWS[0], 0)
    log.image("crops", np.zeros((4, 5, 3), np.uint8), 0), log.close()
    assert list(tmp_path.iterdir()) == []


def test_messages_are_shown_and_kept(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.message("eins, zwei – ä")
    log.close()
    RunLog(tmp_path, step=1).message("drei")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["eins, zwei – ä", "drei"]
    assert "drei" in capsys.readouterr().out
