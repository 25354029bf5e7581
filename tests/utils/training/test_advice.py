"""What is said of a run that goes wrong, and that a healthy one is left in peace."""

from types import SimpleNamespace

import numpy as np

from utils.training import advice
from utils.training.advice import warnings_of


def rows_of(losses, **columns) -> list[dict]:
    rows = [{"epoch": k, "loss": float(loss)} for k, loss in enumerate(losses, 1)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def kinds(losses, num_epochs=60, **columns) -> list[str]:
    return list(warnings_of(rows_of(losses, **columns), num_epochs, 0.01))


def test_a_falling_or_noisy_loss_is_left_in_peace():
    rng = np.random.default_rng(0)
    for loss in (0.7 * 0.97 ** np.arange(60), 1 - 0.02 * np.arange(40), np.full(60, 0.01)):
        for end in range(1, len(loss) + 1):
            assert kinds(loss[:end] * rng.uniform(0.9, 1.1, end)) == []
    assert kinds([0.7, 1.4, 0.8, 0.7]) == []  # one bad epoch
    assert kinds(np.full(19, 0.69)) == [] and kinds(np.full(40, 0.69), num_epochs=400) == []


def test_a_loss_that_rises_says_to_lower_the_learning_rate():
    text = warnings_of(rows_of([0.7, 0.6, 0.9, 1.0, 1.2]), 60, 0.01)["loss rises"]
    assert "0.7 in epoch 1, 1.2 in epoch 5" in text and "learning_rate=0.002" in text


def test_a_loss_that_stays_flat_says_where_to_look():
    text = warnings_of(rows_of(np.full(20, 0.693)), 60, 0.01)["loss stays flat"]
    assert "plots/" in text and "learning_rate=0.05 and 0.002" in text


def test_a_class_that_is_never_found_is_named():
    loss, n = np.linspace(1, 0.2, 30), 30
    sparse = [0.0 if k % 10 == 9 else None for k in range(n)]
    found = {"val_dice": [0.4] * n, "val_liver_dice": [0.8] * n, "val_lesion_dice": sparse}
    warned = warnings_of(rows_of(loss, **found), 60, 0.01)
    assert list(warned) == ["class never found: lesion"]
    assert "below 0.01 up to epoch 30" in warned["class never found: lesion"]
    found["val_lesion_dice"] = [0.0] * 10 + [0.05] + [0.0] * 19
    assert kinds(loss, **found) == []
    found["val_lesion_dice"] = [None] * n  # no val case has it
    assert kinds(loss, **found) == []
    assert kinds(loss[:10], val_lesion_dice=[0.0] * 10) == []


def test_a_warning_is_said_once_and_leaves_the_report_when_it_no_longer_holds():
    said, state = [], SimpleNamespace(warnings={"sides": "kept"})
    log = SimpleNamespace(rows=rows_of([0.7, 0.9, 1.0, 1.2]))
    cfg = SimpleNamespace(n_epochs=60, learning_rate=0.01)
    run = SimpleNamespace(log=log, cfg=cfg, say=said.append)
    advice.note(run, state)
    advice.note(run, state)
    assert len(said) == 1 and said[0].startswith("WARNING: the train loss rises")
    assert list(state.warnings) == ["sides", "loss rises"]
    log.rows += rows_of([0.5])
    advice.note(run, state)
    assert state.warnings == {"sides": "kept"}
